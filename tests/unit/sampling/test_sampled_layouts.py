"""Synthesis for new layouts: each is drawn once, whatever the shards, and what was drawn for another mask is drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from segmentor_tiles import CLASSES, PALETTE, write_tiles
from tiny_world import TEMPLATE, World, training_job

from crfm_core import DataError
from crfm_core.curation.mixing import mix
from crfm_core.data.rasters import read_label, read_rgb, write_raster
from crfm_core.files import sha256_of
from crfm_core.generator.training import train_generator
from crfm_core.layouts import draw_layouts
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.sampling.gathering import gather_shards
from crfm_core.sampling.sampler import SamplerSpec
from crfm_core.sampling.shards import synthesise_shard
from crfm_core.settings import AnyLayouts, AugmentedLayouts, Captions, Control, Dataset, PredictedLayouts, Sampler
from crfm_core.text.captions import caption_tiles
from crfm_core.text.encoders import encode_prompts_file

MADE = 3  #: copies for which there are layouts
TILES = 6


@dataclass(frozen=True)
class Studio:
    """A generator, and captioned layouts with their prompts."""

    world: World
    generator: Path
    root: Path

    def layouts(self, name: str, settings: AnyLayouts, copies: int = MADE) -> Path:
        out, captions = (self.root / kind / f"{name}.parquet" for kind in ("layouts", "captions"))
        draw_layouts(settings, self.root / "tiles" / "train.parquet", copies, CLASSES, out, self.root / "pseudo_labels.parquet")
        source = {"kind": "embedded", "scenes": {"train": 1, "test": 1}}
        dataset = Dataset(name="d", classes=CLASSES, palette=PALETTE, source=source, tile={"size": 32})
        table = caption_tiles(out, dataset, Captions(template=TEMPLATE), captions)
        encode_prompts_file(self.world.base, table.caption, self.prompts(name))
        return captions

    def prompts(self, name: str) -> Path:
        return self.root / "prompts" / f"{name}.json"

    def folder(self, name: str) -> Path:
        return self.root / "synthetic" / name / "plain"

    def draw(self, name: str, layouts: str, copies: int = 2, shards: int = 1) -> pd.DataFrame:
        """Draw and gather all images; the manifest's table."""
        spec = SamplerSpec("plain", Sampler(num_steps=1, batch_size=4, layouts=layouts), self.generator, CLASSES)
        captions = self.root / "captions" / f"{layouts}.parquet"
        parts = [self.folder(name) / f"shard-{shard}-of-{shards}.parquet" for shard in range(1, shards + 1)]
        for shard, out in enumerate(parts, start=1):
            synthesise_shard(spec, captions, self.prompts(layouts), copies, 0, out, shard, shards)
        gather_shards(parts, captions, copies, self.folder(name) / "all.parquet")
        return read_manifest(self.folder(name) / "all.parquet")

    def images(self, name: str, table: pd.DataFrame) -> dict[str, str]:
        paths = paths_of(self.folder(name) / "all.parquet", table, "image", self.root)
        return {path.name: sha256_of(path) for path in paths}


@pytest.fixture(scope="module")
def studio(world, tmp_path_factory) -> Studio:
    root = tmp_path_factory.mktemp("layouts") / "d"
    train_generator(training_job(world, root / "work", Control(steps=1, batch_size=2, learning_rate=1e-3), out=root / "generator"))
    write_tiles(root / "tiles" / "train.parquet", TILES, georeferenced=True)
    write_tiles(root / "pseudo_labels.parquet", 4, seed=1, prefix="u", georeferenced=True)
    studio = Studio(world, root / "generator", root)
    studio.layouts("rich", AugmentedLayouts(kind="augmented", shares="uniform"))
    studio.layouts("guessed", PredictedLayouts(kind="predicted"))
    return studio


@pytest.mark.parametrize("layouts", ["rich", "guessed"])
def test_every_layout_of_the_copies_is_drawn_once_for_its_own_mask(studio, layouts):
    table, captions = studio.draw(f"whole-{layouts}", layouts), read_manifest(studio.root / "captions" / f"{layouts}.parquet")
    assert len(table) == 2 * TILES and sorted(table.mask_of) == sorted(captions.tile_id[: 2 * TILES])
    assert table["copy"].value_counts().to_dict() == {0: TILES, 1: TILES} and set(table.source) == {"synthetic"}
    of_layout = captions.set_index("tile_id")
    labels = paths_of(studio.root / "captions" / f"{layouts}.parquet", captions, "label", studio.root)
    masks = dict(zip(captions.tile_id, labels, strict=True))
    manifest = studio.folder(f"whole-{layouts}") / "all.parquet"
    images, own = (paths_of(manifest, table, column, studio.root) for column in ("image", "label"))
    for row, image, label in zip(table.itertuples(), images, own, strict=True):
        assert row.layout_of == of_layout.mask_of[row.mask_of] and row.copy == of_layout["copy"][row.mask_of]
        assert label == masks[row.mask_of] and np.bincount(read_label(label).ravel(), minlength=256)[:3].tolist() == list(row.pixels)
        assert read_rgb(image).shape == (32, 32, 3)


def test_a_sample_lies_where_its_mask_lies_or_nowhere(studio):
    for layouts, georeferenced in (("rich", False), ("guessed", True)):
        table = studio.draw(f"placed-{layouts}", layouts, 1)
        for path in paths_of(studio.folder(f"placed-{layouts}") / "all.parquet", table, "image", studio.root):
            with rasterio.open(path) as image:
                assert path.suffix == ".tif" and (image.crs is not None) == georeferenced


def test_samples_do_not_depend_on_the_number_of_shards(studio):
    one, several = studio.draw("one", "rich"), studio.draw("several", "rich", shards=3)
    assert studio.images("one", one) == studio.images("several", several)
    columns = ["tile_id", "mask_of", "copy", "seed", "digest", "layouts", "pieces"]
    pd.testing.assert_frame_equal(one[columns], several[columns])


def test_fewer_copies_are_part_of_more_and_so_is_a_smaller_mix_of_a_larger_one(studio):
    few, many = studio.draw("few", "rich", 1), studio.draw("many", "rich", 3)
    assert set(few.tile_id) < set(many.tile_id) and many[many["copy"] == 0].tile_id.tolist() == few.tile_id.tolist()
    assert many.set_index("tile_id").seed[few.tile_id].tolist() == few.seed.tolist()
    mixed = {}
    for wanted in (1, 2, 3):
        out = studio.root / "mixes" / f"{wanted}.parquet"
        table = mix(studio.root / "tiles" / "train.parquet", studio.folder("many") / "all.parquet", out, wanted, root=studio.root)
        mixed[wanted] = set(table.tile_id)
        assert len(table) == TILES * (1 + wanted)
    assert mixed[1] < mixed[2] < mixed[3] and set(few.tile_id) < mixed[1]


def test_a_layout_that_is_now_another_is_drawn_again_and_the_others_are_not(studio):
    studio.layouts("changing", AugmentedLayouts(kind="augmented"))
    before = studio.images("changing", studio.draw("changing", "changing"))
    captions = studio.root / "captions" / "changing.parquet"
    table = read_manifest(captions)
    (label,) = paths_of(captions, table[:1], "label", studio.root)
    write_raster(label, np.zeros((32, 32), np.uint8))
    table.loc[0, "digest"] = "other"
    write_manifest(captions, table)
    after = studio.images("changing", studio.draw("changing", "changing"))
    assert {name for name in before if before[name] != after[name]} == {f"{table.tile_id[0]}-0.tif"}


def test_more_copies_than_there_are_layouts_are_refused(studio):
    with pytest.raises(DataError, match=r"captions/rich\.parquet: has masks for 3 copies, and 4 are to be drawn; delete it"):
        studio.draw("too-many", "rich", 4)


def test_gathering_misses_no_layout(studio):
    table = studio.draw("missed", "rich", shards=2)
    parts = [studio.folder("missed") / f"shard-{shard}-of-2.parquet" for shard in (1, 2)]
    with pytest.raises(DataError, match=f"instead of {len(table)}; delete the shards' manifests"):
        gather_shards(parts[:1], studio.root / "captions" / "rich.parquet", 2, studio.folder("missed") / "all.parquet")
