"""Synthesis in shards: what is drawn does not depend on how the work was cut, and a stopped shard loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from segmentor_tiles import CLASSES
from segmentors import train_on
from tiny_world import World, training_job

from crfm_core import ConfigError, DataError, ResourceError, WeightsError
from crfm_core.data.rasters import read_label, read_rgb, read_tags, write_raster
from crfm_core.files import read_json, sha256_of, write_json
from crfm_core.generator.training import train_generator
from crfm_core.manifest import in_subfolder, paths_of, read_manifest, write_manifest
from crfm_core.sampling import shards as shards_module
from crfm_core.sampling.gathering import gather_shards
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.sampler import SamplerSpec
from crfm_core.sampling.shards import batches_of, synthesise_shard
from crfm_core.settings import Control, Sampler, Segmentor

COPIES = 2
BATCH = 3
CORRECTED = {"num_steps": 3, "preset": "default", "rectify": {"steps": 2}}


@dataclass(frozen=True)
class Studio:
    """What a shard is sampled with."""

    world: World
    generator: Path
    critic: Path

    def shard(self, name: str, shard: int, shards: int, batch_size: int = 1, sampler_name: str = "crfm", **changes):
        """Sample a shard into the folder ``name``; its manifest. ``changes``: fields of the spec, or arguments."""
        spec = self.spec(batch_size, sampler_name)
        fields = {key: changes.pop(key) for key in ("settings", "generator", "classes", "critic") if key in changes}
        arguments = {"captions": self.world.captions, "prompts": self.world.prompts, "copies": COPIES, "seed": 0} | changes
        out = self.folder(name) / f"shard-{shard}-of-{shards}.parquet"
        return synthesise_shard(replace(spec, **fields), **arguments, out=out, shard=shard, shards=shards)

    def spec(self, batch_size: int, sampler_name: str = "crfm") -> SamplerSpec:
        return SamplerSpec(sampler_name, Sampler(**CORRECTED, batch_size=batch_size), self.generator, CLASSES, self.critic)

    def folder(self, name: str) -> Path:
        return self.world.root / "synthetic" / name / "crfm"

    def images(self, name: str) -> dict[str, Path]:
        return {path.name: path for path in sorted((self.folder(name) / "images").glob("*/*"), key=lambda path: path.name)}

    def with_label(self, name: str, row: int, path: Path) -> Path:
        """A copy of the captioned manifest in which one tile's label is another file."""
        table = read_manifest(self.world.captions)
        table.loc[row, "label"] = os.path.relpath(path, self.world.captions.parent)
        captions = self.world.captions.with_name(f"{name}.parquet")
        write_manifest(captions, table)
        return captions


@pytest.fixture(scope="module")
def studio(world) -> Studio:
    control = Control(steps=6, batch_size=2, learning_rate=1e-3, mask_init="copy")
    work, generator = world.root / "work", world.root / "generators" / "triattention"
    train_generator(training_job(world, work / "generator", control, out=generator))
    segmentor = Segmentor(architecture="segformer_tiny", iterations=4, batch_size=2, learning_rate=2e-3)
    critic = world.root / "segmentors" / "checkpoint.pth"
    train_on(world.tiles, critic, segmentor, work / "critic", root=world.root)
    return Studio(world, generator, critic)


@pytest.fixture(scope="module")
def whole(studio) -> Studio:
    """All images in one shard, in the folder "whole"."""
    studio.shard("whole", 1, 1)
    return studio


@pytest.fixture(scope="module")
def batched(studio) -> Studio:
    """All images in one shard, in batches, in the folder "batched"."""
    studio.shard("batched", 1, 1, batch_size=BATCH)
    return studio


def differing(one: dict[str, Path], other: dict[str, Path]) -> list[str]:
    """Names that are not in both folders with the same content."""
    return [
        name for name in one.keys() | other.keys() if name not in one or name not in other or sha256_of(one[name]) != sha256_of(other[name])
    ]


def test_all_images_are_cut_once_and_the_shards_share_the_batches():
    sizes = [(32, 32), (64, 32), (32, 32), (32, 32), (64, 32), (32, 32), (32, 32)]
    batches = batches_of(sizes, 3, 4)
    samples = [sample for batch in batches for sample in batch]
    assert len(samples) == len(set(samples)) == 21
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 4, 2]
    assert [(sample.row, sample.copy) for sample in batches[1]] == [(6, 0), (0, 1), (2, 1), (3, 1)]
    assert all(len({sizes[sample.row] for sample in batch}) == 1 for batch in batches)
    for shards in (2, 3, 4, 20):
        parts = [batches_of(sizes, 3, 4, shard, shards) for shard in range(1, shards + 1)]
        assert [parts[index % shards][index // shards] for index in range(len(batches))] == batches
        assert sum(map(len, parts)) == len(batches) and max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(DataError, match="shard 3 of 2: shards count from 1 to 2"):
        batches_of(sizes, 3, 4, 3, 2)


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_images_do_not_depend_on_the_number_of_shards(batched, shards):
    for shard in range(shards, 0, -1):
        batched.shard(f"in{shards}", shard, shards, batch_size=BATCH)
    assert len(batched.images("batched")) == 12
    assert differing(batched.images("batched"), batched.images(f"in{shards}")) == []


def test_images_do_not_depend_on_their_batch_but_for_rounding(whole, batched):
    one, other = whole.images("whole"), batched.images("batched")
    off = np.stack([np.abs(read_rgb(one[name]).astype(int) - read_rgb(other[name])) for name in one])
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
    table = whole.shard("plain", 1, 12, settings=Sampler(num_steps=2, batch_size=1), critic=tmp_path / "absent.pth")
    assert len(table) == 1 and table.critic_loss_before.isna().all() and list(table.note) == [""]


def test_a_loss_that_was_not_measured_is_no_number_in_the_manifest(whole):
    sampler = Sampler(**CORRECTED | {"rectify": {"steps": 2, "measure": False}})
    table = whole.shard("unmeasured", 1, 4, settings=sampler)
    assert table.critic_loss_before.notna().all() and table.critic_loss_after.isna().all() and table.critic_loss_after.dtype == float


def test_what_is_to_be_known_of_a_sample_stands_in_its_row_its_file_and_the_log(studio, capsys):
    label = read_label(paths_of(studio.world.captions, read_manifest(studio.world.captions), "label", studio.world.root)[4])
    ignored = studio.world.root / "ignored.tif"
    write_raster(ignored, np.full_like(label, 255))
    table = studio.shard("noted", 1, 1, batch_size=4, captions=studio.with_label("ignored", 4, ignored)).set_index("tile_id")
    noted = "no labelled pixel: not corrected"
    assert {name: note for name, note in table.note.items() if note} == {"t4-crfm-0": noted, "t4-crfm-1": noted}
    assert f"2 of 12 samples: {noted}\n" in capsys.readouterr().out
    images = studio.images("noted")
    assert read_tags(images["t4-0.tif"])["note"] == noted and "note" not in read_tags(images["t3-0.tif"])
    assert table.corrections["t4-crfm-0"] == "[]" and np.isnan(table.critic_loss_after["t4-crfm-0"])


def test_a_critic_for_other_classes_is_refused_before_anything_is_sampled(studio):
    with pytest.raises(WeightsError, match="water"):
        studio.shard("misjudged", 1, 1, classes=["soil", "ice", "wood"])
    assert not (studio.folder("misjudged") / "images").exists()


def test_the_critic_can_look_through_another_decoder(whole, monkeypatch, tmp_path):
    decoder = tmp_path / "decoder"
    shutil.copytree(whole.generator / "vae", decoder)
    sampler = Sampler(**CORRECTED, batch_size=4, critic_decoder=str(decoder))
    whole.shard("through", 1, 1, settings=sampler)
    through = whole.images("through")
    off = np.stack([np.abs(read_rgb(path).astype(int) - read_rgb(through[name])) for name, path in whole.images("whole").items()])
    assert (off <= 1).mean() >= 0.999, "its weights are the generator's own"
    weights = load_file(decoder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.weight"] *= -1
    save_file(weights, decoder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    before = {name: sha256_of_pixels(path) for name, path in through.items()}
    written = count_drawn(monkeypatch)
    whole.shard("through", 1, 1, settings=sampler)
    assert len(written) == 12 and all(before[name] != sha256_of_pixels(path) for name, path in whole.images("through").items())


def test_guidance_leads_away_from_the_empty_prompt(studio, tmp_path):
    generator = tmp_path / "generator"
    control = Control(steps=4, batch_size=2, learning_rate=1e-2, caption_dropout=0.5)
    train_generator(training_job(studio.world, tmp_path, control, out=generator))
    for scale in (1, 5):
        sampler = Sampler(num_steps=3, batch_size=4, guidance_scale=scale)
        studio.shard(f"guided{scale}", 1, 1, generator=generator, settings=sampler)
    plain, guided = studio.images("guided1"), studio.images("guided5")
    assert all(sha256_of_pixels(plain[name]) != sha256_of_pixels(guided[name]) for name in plain)


def test_networks_are_compiled_where_the_sampler_says_so(studio, monkeypatch):
    asked = []
    monkeypatch.setattr(MaskToImagePipeline, "compile_networks", lambda self, mode: asked.append(mode))
    for compile in (None, "reduce-overhead"):
        studio.shard(f"compiled-{compile}", 1, 4, settings=Sampler(num_steps=1, compile=compile))
    assert asked == ["reduce-overhead"]


# -------------------------------------------------------------------------------------------------------- interruptions


def count_drawn(monkeypatch, most: int | None = None) -> list[Path]:
    """The images that are written from now on; after ``most`` of them the process is interrupted."""
    written, write, one_by_one = [], shards_module.write_raster, threading.Lock()

    def counting(path, *arguments):
        with one_by_one:
            if len(written) == most:
                raise KeyboardInterrupt
            written.append(path)
        write(path, *arguments)

    monkeypatch.setattr(shards_module, "write_raster", counting)
    return written


@pytest.mark.parametrize("most", [2, 4])
def test_a_stopped_shard_continues_with_what_is_missing(batched, monkeypatch, most):
    name = f"stopped{most}"
    with monkeypatch.context() as patch:
        first = count_drawn(patch, most=most)
        with pytest.raises(KeyboardInterrupt):
            batched.shard(name, 1, 1, batch_size=BATCH)
    assert len(first) == most and not list(batched.folder(name).glob("*.parquet"))
    second = count_drawn(monkeypatch)
    table = batched.shard(name, 1, 1, batch_size=BATCH)
    assert len(second) == 12 - most and not set(first) & set(second) and len(table) == 12
    assert differing(batched.images("batched"), batched.images(name)) == []


#: Samples a shard and is killed after so many images are whole, with the next ones begun.
KILLED = """
import json, os, signal, sys, threading
from crfm_core.sampling.sampler import SamplerSpec
from crfm_core.sampling.shards import synthesise_shard
from crfm_core.settings import Sampler
from pathlib import Path
spec, arguments = json.loads(sys.argv[1])
spec |= {"settings": Sampler(**spec["settings"]), "generator": Path(spec["generator"]), "critic": Path(spec["critic"])}
paths = {name: Path(arguments.pop(name)) for name in ("captions", "prompts", "out")}
left, replace, one_by_one = int(sys.argv[2]), os.replace, threading.Lock()
def replace_until_killed(unfinished, target):
    global left
    with one_by_one:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        replace(unfinished, target)
os.replace = replace_until_killed
synthesise_shard(SamplerSpec(**spec), **arguments, **paths)
"""


def test_a_shard_killed_twice_ends_with_the_same_files(batched):
    spec, folder = batched.spec(BATCH), batched.folder("killed")
    arguments = {"captions": batched.world.captions, "prompts": batched.world.prompts, "copies": COPIES, "seed": 0}
    arguments["out"] = folder / "shard-1-of-1.parquet"
    given = json.dumps([vars(spec) | {"settings": spec.settings.model_dump()}, arguments], default=str)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for more, whole in ((2, 2), (5, 7)):
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, given, str(more)], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert len(list((folder / "images").glob("*/*.tif"))) == whole and not list(folder.glob("*.parquet"))
        assert list((folder / "images").glob("*/.*.tif.*")), "killed while it was writing"
    batched.shard("killed", 1, 1, batch_size=BATCH)
    assert differing(batched.images("batched"), batched.images("killed")) == []
    assert differing(*({"manifest": batched.folder(name) / "shard-1-of-1.parquet"} for name in ("batched", "killed"))) == []


def test_images_lie_in_folders_by_their_names_whatever_the_number_of_shards(batched):
    paths = list((batched.folder("batched") / "images").glob("*/*"))
    assert len(paths) == 12 and all(f"{path.parent.name}/{path.name}" == in_subfolder(path.name) for path in paths)
    counts = Counter(in_subfolder(f"6_{index}_0_0-3.png").partition("/")[0] for index in range(25_600))
    assert len(counts) == 256 and max(counts.values()) < 200


def test_only_a_shard_that_was_begun_before_looks_for_fragments_among_all_images(batched, monkeypatch):
    looks = []
    monkeypatch.setattr(shards_module, "_remove_fragments", lambda folder, names: looks.append(len(names)))
    for expected in ([], [6]):
        batched.shard("looked", 1, 2, batch_size=BATCH)
        assert looks == expected


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
    assert sorted(written) == sorted([truncated, emptied, gone, spoilt])
    assert sha256_of(*images.values()) == before


def test_nothing_is_drawn_twice(whole, monkeypatch):
    written = count_drawn(monkeypatch)
    before = (whole.folder("whole") / "shard-1-of-1.parquet").read_bytes()
    whole.shard("whole", 1, 1, batch_size=7)
    assert written == [] and (whole.folder("whole") / "shard-1-of-1.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("rectify", "change", "again"),
    [
        ({}, {"batch_size": 5}, 0),
        ({}, {"compile": "default"}, 0),
        ({}, {"pad": True}, 0),
        ({"reduction": "mean"}, {"compile": "default"}, 0),
        ({"reduction": "mean"}, {"batch_size": 5}, 12),
    ],
)
def test_settings_that_change_only_rounding_make_nothing_again(studio, monkeypatch, rectify, change, again):
    settings = {"num_steps": 2, "batch_size": 4, "preset": "default", "rectify": {"steps": 1} | rectify}
    name = f"settings-{'-'.join([*rectify, *change])}"
    studio.shard(name, 1, 1, settings=Sampler(**settings))
    written = count_drawn(monkeypatch)
    studio.shard(name, 1, 1, settings=Sampler(**settings | change))
    assert len(written) == again


def test_images_made_otherwise_are_made_again(whole, monkeypatch, tmp_path):
    shorter = {"settings": Sampler(**CORRECTED | {"num_steps": 2}, batch_size=2)}
    other_critic = tmp_path / "critic.pth"
    segmentor = Segmentor(architecture="segformer_tiny", iterations=4, batch_size=2, learning_rate=2e-3)
    w = whole.world
    train_on(w.tiles, other_critic, segmentor, root=w.root, iterations=2, seed=1)
    other_generator = tmp_path / "generator"
    control = Control(steps=1, batch_size=2, learning_rate=1e-3)
    train_generator(training_job(w, tmp_path, control, out=other_generator))
    changes = {"settings": shorter, "seed": {"seed": 1}, "critic": {"critic": other_critic}, "generator": {"generator": other_generator}}
    for name, change in changes.items():
        whole.shard(f"other-{name}", 1, 3, batch_size=2)
        with monkeypatch.context() as patch:
            written = count_drawn(patch)
            whole.shard(f"other-{name}", 1, 3, **{"batch_size": 2} | change)
            assert len(written) == 4, name


# ------------------------------------------------------------------------------------------------------- beside sampling


def test_the_next_batch_is_read_and_the_last_one_written_while_one_is_sampled(studio, monkeypatch):
    sample, read, write = MaskToImagePipeline.__call__, shards_module.read_label, shards_module.write_raster
    reads, second_samples, calls, seconds = [], threading.Event(), [], 20
    next_is_read = threading.Event()

    def reading(path):
        reads.append(path)
        if len(reads) == 5:  # the first of the second batch
            next_is_read.set()
        return read(path)

    def sampling(self, *arguments, **named):
        calls.append(len(named["masks"]))
        if len(calls) == 1:
            assert next_is_read.wait(seconds), "the second batch is read only after the first is sampled"
        else:
            second_samples.set()
        return sample(self, *arguments, **named)

    def writing(*arguments):
        assert second_samples.wait(seconds), "the second batch is sampled only after the first is written"
        write(*arguments)

    monkeypatch.setattr(MaskToImagePipeline, "__call__", sampling)
    monkeypatch.setattr(shards_module, "read_label", reading)
    monkeypatch.setattr(shards_module, "write_raster", writing)
    assert len(studio.shard("beside", 1, 1, settings=Sampler(num_steps=1, batch_size=4))) == 12 and calls == [4, 4, 4]


def test_slow_writing_holds_up_reading(studio, monkeypatch):
    read, write = shards_module.read_label, shards_module.write_raster
    reads, writes, ahead = [], [], []

    def reading(path):
        reads.append(path)
        ahead.append(len(reads) - len(writes))
        return read(path)

    def writing(*arguments):
        threading.Event().wait(0.05)
        write(*arguments)
        writes.append(arguments[0])

    monkeypatch.setattr(shards_module, "read_label", reading)
    monkeypatch.setattr(shards_module, "write_raster", writing)
    studio.shard("slow", 1, 1, settings=Sampler(num_steps=1, batch_size=2))
    assert len(writes) == 12 and max(ahead) <= 3 * 2, "one batch is read, one sampled, one written"


def test_a_shard_says_where_its_time_went(studio, capsys):
    studio.shard("timed", 1, 1, batch_size=5)
    line = re.search(r"^12 images sampled: .*$", capsys.readouterr().out, re.MULTILINE).group()
    names = ["loading", "sampling", "waiting for input", "waiting for output"]
    assert re.findall(r"(?:: |, )([a-z ]+) [\d.]+ s", line) == names and line.endswith(" images per second")
    *seconds, rate = map(float, re.findall(r"\d+\.\d+", line))
    assert seconds[0] > 0 and rate == pytest.approx(12 / sum(seconds[1:]), rel=0.1)
    studio.shard("timed", 1, 1, batch_size=5)
    assert "images sampled" not in capsys.readouterr().out, "nothing was"


def fail_to_write(path, *arguments):
    raise OSError(28, "No space left on device")


def test_an_image_that_cannot_be_written_stops_the_shard_with_its_name(studio, monkeypatch):
    write, read, reads = shards_module.write_raster, shards_module.read_label, []
    faulty = lambda path, *rest: (fail_to_write if path.name == "t2-0.tif" else write)(path, *rest)  # noqa: E731
    monkeypatch.setattr(shards_module, "write_raster", faulty)
    monkeypatch.setattr(shards_module, "read_label", lambda path: reads.append(path) or read(path))
    message = r"images/\w\w/t2-0\.tif: could not be written \(.*No space left on device\); see that the disk has room"
    with pytest.raises(ResourceError, match=message):
        studio.shard("unwritten", 1, 1, settings=Sampler(num_steps=1, batch_size=1))
    assert len(reads) <= 6, "sampling did not go on long after the fault"
    assert not list(studio.folder("unwritten").glob("*.parquet"))
    images = studio.images("unwritten")
    assert {"t0-0.tif", "t1-0.tif"} <= images.keys() and "t2-0.tif" not in images
    assert all(read_rgb(path).shape == (32, 32, 3) for path in images.values())


def test_writing_that_fails_stops_the_sampling_of_the_next_batch_at_its_next_step(studio, monkeypatch):
    failed, ends = threading.Event(), []

    def writing(path, *arguments):
        failed.set()
        fail_to_write(path)

    sample = MaskToImagePipeline.__call__

    def sampling(self, *arguments, callback_on_step_end, **named):
        def waiting(pipeline, step, *state):
            if ends:
                assert failed.wait(300)
                threading.Event().wait(0.1)  # until the thread has put the fault down
                assert step == 0, "a step too many"
            return callback_on_step_end(pipeline, step, *state)

        output = sample(self, *arguments, callback_on_step_end=waiting, **named)
        ends.append(output)
        return output

    monkeypatch.setattr(MaskToImagePipeline, "__call__", sampling)
    monkeypatch.setattr(shards_module, "write_raster", writing)
    with pytest.raises(ResourceError, match="could not be written"):
        studio.shard("prompt", 1, 1, settings=Sampler(num_steps=4, batch_size=4))
    assert len(ends) == 1


def test_a_label_that_cannot_be_read_stops_the_shard_with_its_name_and_keeps_what_is_done(studio):
    damaged = studio.world.root / "damaged.tif"
    damaged.write_bytes(b"II*\0")
    captions = studio.with_label("damaged", 4, damaged)
    with pytest.raises(DataError, match=r"damaged\.tif: not a readable raster"):
        studio.shard("unread", 1, 1, captions=captions, settings=Sampler(num_steps=1, batch_size=2))
    assert list(studio.images("unread")) == ["t0-0.tif", "t1-0.tif", "t2-0.tif", "t3-0.tif"]
    assert not list(studio.folder("unread").glob("*.parquet"))


# -------------------------------------------------------------------------------------------------------------- gather


def test_gathered_shards_are_all_images_once_in_an_order_of_their_own(whole):
    for shards in (1, 3):
        for shard in range(1, shards + 1):
            whole.shard(f"gather{shards}", shard, shards, settings=Sampler(num_steps=1, batch_size=3))
        parts = sorted(whole.folder(f"gather{shards}").glob("shard-*.parquet"))
        gather_shards(parts, whole.world.captions, COPIES, whole.folder(f"gather{shards}") / "all.parquet")
    one, several = (read_manifest(whole.folder(f"gather{shards}") / "all.parquet") for shards in (1, 3))
    assert list(several.tile_id) == [f"t{tile}-crfm-{copy}" for tile in range(6) for copy in range(COPIES)]
    columns = ["tile_id", "image", "label", "mask_of", "copy", "seed", "digest"]
    assert one[columns].equals(several[columns])


def test_shards_without_a_batch_have_empty_manifests_that_gather(studio):
    sampler = Sampler(num_steps=1, batch_size=8)
    folder = studio.folder("few")
    tables = [studio.shard("few", shard, 4, settings=sampler) for shard in range(1, 5)]
    assert [len(table) for table in tables] == [8, 4, 0, 0]
    parts = [folder / f"shard-{shard}-of-4.parquet" for shard in range(1, 5)]
    columns = [list(pd.read_parquet(part).columns) for part in parts]
    assert columns[0] == columns[1] == columns[2] == columns[3]
    gather_shards(parts, studio.world.captions, COPIES, folder / "all.parquet")
    assert len(pd.read_parquet(folder / "all.parquet")) == 12
    with pytest.raises(DataError, match="the shards hold 0 images instead of 12"):
        gather_shards(parts[2:], studio.world.captions, COPIES, folder / "all.parquet")
    parts[3].write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-4-of-4\.parquet: not a readable parquet file"):
        gather_shards(parts, studio.world.captions, COPIES, folder / "all.parquet")


def test_an_incomplete_set_of_shards_is_refused(whole):
    whole.shard("partial", 1, 3, settings=Sampler(num_steps=1, batch_size=4))
    out = whole.folder("partial") / "all.parquet"
    part = whole.folder("partial") / "shard-1-of-3.parquet"
    for parts, count in (([part], 4), ([part] * 3, 12)):
        with pytest.raises(DataError, match=f"all.parquet: the shards hold {count} images instead of 12"):
            gather_shards(parts, whole.world.captions, COPIES, out)
    assert not out.exists()


def test_weights_of_another_architecture_are_refused_with_the_shapes(studio, tmp_path):
    other = tmp_path / "generator"
    shutil.copytree(studio.generator, other)
    config = read_json(other / "transformer" / "config.json")
    write_json(other / "transformer" / "config.json", config | {"num_attention_heads": 4, "caption_projection_dim": 32})
    with pytest.raises(WeightsError, match=r"blocks\.0\.\S+ \(\d+.*\)"):
        studio.shard("refused", 1, 1, generator=other)


def test_a_sampler_that_corrects_without_a_critic_is_refused_before_anything_is_opened(tmp_path):
    with pytest.raises(ConfigError, match="sampler crfm: corrects its samples and has no critic"):
        SamplerSpec("crfm", Sampler(**CORRECTED), tmp_path / "not there", CLASSES).open()
