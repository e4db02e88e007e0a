"""Synthesis in shards: what is drawn does not depend on how the work was cut, and a stopped shard loses nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from segmentor_tiles import CLASSES, PALETTE
from tiny_world import World, training_job

from crfm_core import DataError, WeightsError
from crfm_core.data.rasters import read_rgb, read_tags
from crfm_core.files import read_json, sha256_of, write_json
from crfm_core.generator.training import train_generator
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.sampling import shards as shards_module
from crfm_core.sampling.gathering import gather_shards
from crfm_core.sampling.shards import synthesise_shard, tasks_of
from crfm_core.segmentor.training import train_segmentor
from crfm_core.settings import Control, Sampler, Segmentor

COPIES = 2
CORRECTED = {"num_steps": 3, "preset": "default", "rectify": {"steps": 2}}


@dataclass(frozen=True)
class Studio:
    """What a shard is sampled with."""

    world: World
    generator: Path
    critic: Path

    def shard(self, name: str, shard: int, shards: int, batch_size: int = 1, sampler_name: str = "crfm", **changes):
        """Sample a shard into the folder ``name``; its manifest."""
        arguments = {"generator": self.generator, "captions": self.world.captions, "prompts": self.world.prompts, "critic": self.critic}
        arguments |= {"sampler": Sampler(**CORRECTED, batch_size=batch_size), "sampler_name": sampler_name, "copies": COPIES, "seed": 0}
        out = self.folder(name) / f"shard-{shard}-of-{shards}.parquet"
        return synthesise_shard(**(arguments | changes), shard=shard, shards=shards, out=out)

    def folder(self, name: str) -> Path:
        return self.world.root / "synthetic" / name / "crfm"

    def images(self, name: str) -> dict[str, Path]:
        return {path.name: path for path in sorted((self.folder(name) / "images").iterdir())}


@pytest.fixture(scope="module")
def studio(world) -> Studio:
    control = Control(steps=6, batch_size=2, learning_rate=1e-3, mask_init="copy")
    work, generator = world.root / "work", world.root / "generators" / "triattention"
    train_generator(training_job(world, work / "generator", control, out=generator))
    segmentor = Segmentor(architecture="segformer_tiny", iterations=4, batch_size=2, learning_rate=2e-3)
    critic = world.root / "segmentors" / "checkpoint.pth"
    train_segmentor(world.tiles, world.root, critic, work / "critic", segmentor, CLASSES, PALETTE, iterations=4, seed=0)
    return Studio(world, generator, critic)


@pytest.fixture(scope="module")
def whole(studio) -> Studio:
    """All images in one shard, in the folder "whole"."""
    studio.shard("whole", 1, 1)
    return studio


def test_the_shards_share_all_images_between_them_whatever_their_number():
    everything = tasks_of(5, 3, 1, 1)
    assert len(set(everything)) == 15
    for shards in (2, 3, 4, 20):
        parts = [tasks_of(5, 3, shard, shards) for shard in range(1, shards + 1)]
        assert sorted((task.copy, task.row) for part in parts for task in part) == [(task.copy, task.row) for task in everything]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(DataError, match="shard 3 of 2: shards count from 1 to 2"):
        tasks_of(5, 3, 3, 2)


@pytest.mark.parametrize("shards", [2, 3])
def test_images_do_not_depend_on_the_number_of_shards(whole, shards):
    for shard in range(shards, 0, -1):
        whole.shard(f"in{shards}", shard, shards)
    one, several = whole.images("whole"), whole.images(f"in{shards}")
    assert one.keys() == several.keys() and len(one) == 12
    assert [name for name in one if sha256_of(one[name]) != sha256_of(several[name])] == []


def test_images_do_not_depend_on_their_batch_but_for_rounding(whole):
    whole.shard("batched", 1, 1, batch_size=5)
    one, batched = whole.images("whole"), whole.images("batched")
    off = np.stack([np.abs(read_rgb(one[name]).astype(int) - read_rgb(batched[name])) for name in one])
    assert (off <= 1).mean() >= 0.999


def test_every_copy_and_every_sampler_has_noise_of_its_own(whole):
    one = {sha256_of_pixels(path) for path in whole.images("whole").values()}
    assert len(one) == 12
    whole.shard("renamed", 1, 1, sampler_name="other")
    assert not one & {sha256_of_pixels(path) for path in whole.images("renamed").values()}


def sha256_of_pixels(path: Path) -> bytes:
    return read_rgb(path).tobytes()


def test_the_seed_of_a_sample_is_pinned(whole):
    # these numbers may never change: images of older runs could not be made again
    table = read_manifest(whole.folder("whole") / "shard-1-of-1.parquet").set_index("tile_id")
    assert table.seed["t0-crfm-0"] == 8329383103358517754
    assert table.seed["t5-crfm-1"] == 7847721298641757439


def test_a_synthetic_tile_lies_where_its_mask_lies_and_says_how_it_was_made(whole):
    manifest = whole.folder("whole") / "shard-1-of-1.parquet"
    table, captions = read_manifest(manifest), read_manifest(whole.world.captions).set_index("tile_id")
    images, labels = (paths_of(manifest, table, column, whole.world.root) for column in ("image", "label"))
    for row, image, label in zip(table.itertuples(), images, labels, strict=True):
        with rasterio.open(image) as ours, rasterio.open(label) as mask:
            assert ours.crs == mask.crs and ours.crs.to_epsg() == 32631
            assert ours.transform == mask.transform and ours.shape == mask.shape
        tags = read_tags(image)
        assert tags["mask_of"] == row.mask_of and tags["prompt"] == captions.caption[row.mask_of]
        assert (tags["sampler"], int(tags["seed"])) == ("crfm", row.seed)
        assert [entry["step"] for entry in json.loads(tags["corrections"])] == [0, 1]
        assert row.critic_loss_before == json.loads(row.corrections)[0]["loss_before"]
    assert set(table.source) == {"synthetic"} and set(table["copy"]) == {0, 1}


def test_a_plain_sampler_needs_no_critic(whole, tmp_path):
    table = whole.shard("plain", 1, 12, sampler=Sampler(num_steps=2), critic=tmp_path / "absent.pth")
    assert len(table) == 1 and table.critic_loss_before.isna().all()


# -------------------------------------------------------------------------------------------------------- interruptions


def count_drawn(monkeypatch, most: int | None = None) -> list[Path]:
    """The images that are written from now on; after ``most`` of them the process is interrupted."""
    written, write = [], shards_module.write_raster

    def counting(path, *arguments):
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(shards_module, "write_raster", counting)
    return written


def test_a_stopped_shard_continues_with_what_is_missing(whole, monkeypatch):
    with monkeypatch.context() as patch:
        first = count_drawn(patch, most=4)
        with pytest.raises(KeyboardInterrupt):
            whole.shard("stopped", 1, 1)
    assert len(first) == 4 and not list(whole.folder("stopped").glob("*.parquet"))
    second = count_drawn(monkeypatch)
    table = whole.shard("stopped", 1, 1)
    assert len(second) == 8 and not set(first) & set(second) and len(table) == 12
    one, stopped = whole.images("whole"), whole.images("stopped")
    assert [name for name in one if sha256_of(one[name]) != sha256_of(stopped[name])] == []


def test_only_damaged_images_are_made_again(whole, monkeypatch):
    whole.shard("damaged", 1, 1)
    images = whole.images("damaged")
    before = sha256_of(*images.values())
    truncated, emptied, gone, spoilt = list(images.values())[:4]
    truncated.write_bytes(truncated.read_bytes()[:-200])
    emptied.write_bytes(b"")
    gone.unlink()
    with Image.open(spoilt) as opened:
        pixels = opened.tag_v2[273][0]  # where the first strip of pixels begins; the tags stay readable
    content = bytearray(spoilt.read_bytes())
    content[pixels + 2 : pixels + 42] = bytes(40)
    spoilt.write_bytes(content)
    written = count_drawn(monkeypatch)
    whole.shard("damaged", 1, 1)
    assert sorted(written) == [truncated, emptied, gone, spoilt]
    assert sha256_of(*images.values()) == before


def test_nothing_is_drawn_twice(whole, monkeypatch):
    written = count_drawn(monkeypatch)
    before = (whole.folder("whole") / "shard-1-of-1.parquet").read_bytes()
    whole.shard("whole", 1, 1, batch_size=7)
    assert written == [] and (whole.folder("whole") / "shard-1-of-1.parquet").read_bytes() == before


def test_images_made_otherwise_are_made_again(whole, monkeypatch, tmp_path):
    shorter = {"sampler": Sampler(**CORRECTED | {"num_steps": 2}, batch_size=4)}
    other_critic = tmp_path / "critic.pth"
    segmentor = Segmentor(architecture="segformer_tiny", iterations=4, batch_size=2, learning_rate=2e-3)
    w = whole.world
    train_segmentor(w.tiles, w.root, other_critic, tmp_path / "work", segmentor, CLASSES, PALETTE, iterations=2, seed=1)
    other_generator = tmp_path / "generator"
    control = Control(steps=1, batch_size=2, learning_rate=1e-3)
    train_generator(training_job(w, tmp_path, control, out=other_generator))
    changes = {"sampler": shorter, "seed": {"seed": 1}, "critic": {"critic": other_critic}, "generator": {"generator": other_generator}}
    for name, change in changes.items():
        whole.shard(f"other-{name}", 1, 6, batch_size=4)
        with monkeypatch.context() as patch:
            written = count_drawn(patch)
            whole.shard(f"other-{name}", 1, 6, **{"batch_size": 4} | change)
            assert len(written) == 2, name


# -------------------------------------------------------------------------------------------------------------- gather


def test_gathered_shards_are_all_images_once_in_an_order_of_their_own(whole):
    for shards in (1, 3):
        for shard in range(1, shards + 1):
            whole.shard(f"gather{shards}", shard, shards, batch_size=4, sampler=Sampler(num_steps=1))
        parts = sorted(whole.folder(f"gather{shards}").glob("shard-*.parquet"))
        gather_shards(parts, whole.world.captions, COPIES, whole.folder(f"gather{shards}") / "all.parquet")
    one, several = (read_manifest(whole.folder(f"gather{shards}") / "all.parquet") for shards in (1, 3))
    assert list(several.tile_id) == [f"t{tile}-crfm-{copy}" for tile in range(6) for copy in range(COPIES)]
    columns = ["tile_id", "image", "label", "mask_of", "copy", "seed", "digest"]
    assert one[columns].equals(several[columns])


def test_an_incomplete_set_of_shards_is_refused(whole):
    whole.shard("partial", 1, 3, batch_size=4, sampler=Sampler(num_steps=1))
    out = whole.folder("partial") / "all.parquet"
    part = whole.folder("partial") / "shard-1-of-3.parquet"
    for parts, count in (([part], 4), ([part] * 3, 12)):
        with pytest.raises(DataError, match=f"all.parquet: the shards hold {count} images, 12 were asked for"):
            gather_shards(parts, whole.world.captions, COPIES, out)
    assert not out.exists()


def test_weights_of_another_architecture_are_refused_with_the_shapes(studio, tmp_path):
    other = tmp_path / "generator"
    shutil.copytree(studio.generator, other)
    config = read_json(other / "transformer" / "config.json")
    write_json(other / "transformer" / "config.json", config | {"num_attention_heads": 4, "caption_projection_dim": 32})
    with pytest.raises(WeightsError, match=r"blocks\.0\.\S+ \(\d+.*\)"):
        studio.shard("refused", 1, 1, generator=other)
