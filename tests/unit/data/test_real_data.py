"""Real imagery through the data stages by dataset files of a dozen lines: Dubai with coloured masks, New Brunswick with polygons."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import yaml
from paths import SHARED
from raw_datasets import run

from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.data.scenes import read_scenes
from crfm_core.data.tiling import mosaic
from crfm_core.manifest import read_manifest
from crfm_core.settings import Dataset

DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs real imagery in {DATA}")

DUBAI = """
name: dubai
licence: CC0 1.0
classes: [building, land, road, vegetation, water]
palette: ["#3C1098", "#8429F6", "#6EC1E4", "#FEDD3A", "#E2A929"]
label_map: {"#3C1098": 0, "#8429F6": 1, "#6EC1E4": 2, "#FEDD3A": 3, "#E2A929": 4, "#9B9B9B": 255, "#000000": 255}
source:
  kind: folder
  root: {data}/dubai
  splits:
    train: {images: "Tile [1-4]/images/*.jpg", labels: "Tile [1-4]/masks/*.png"}
    test: {images: "Tile [56]/images/*.jpg", labels: "Tile [56]/masks/*.png"}
tile: {size: 256}
"""

NEW_BRUNSWICK = """
name: new_brunswick
licence: MIT
classes: [class 1, class 2, class 3, class 4, class 5]
palette: ["#9B5C2E", "#2E6FB7", "#C8B560", "#2E8B3D", "#B03060"]
label_map: {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
source:
  kind: geotiff
  root: {data}/new_brunswick
  images: "*.tif"
  labels: "*.gpkg"
  attribute: Cinqclasses
split: {by: blocks, block: 128, buffer: 16, shares: {train: 0.6, test: 0.4}}
tile: {size: 64}
"""


def dataset(text: str) -> Dataset:
    assert len(text.strip().splitlines()) <= 15
    return Dataset(**yaml.safe_load(text.replace("{data}", str(DATA))))


def test_all_scenes_of_dubai_become_tiles_that_hold_their_pixels(tmp_path):
    run(dataset(DUBAI), tmp_path)
    scenes = read_scenes(tmp_path / "scenes.parquet")
    assert scenes.split.value_counts().to_dict() == {"train": 36, "test": 18} and len(set(scenes.group)) == 6
    for split, count in (("train", 423), ("test", 369)):
        tiles = read_manifest(tmp_path / "tiles" / f"{split}.parquet")
        assert len(tiles) == count and set(np.concatenate(tiles.classes.to_list())) == set(range(5))
    scene = scenes[scenes.scene == "5-image_part_004"].iloc[0]
    mosaic(tmp_path / "tiles" / "test.parquet", tmp_path, scene.scene, "image", tmp_path / "scene.png")
    assert np.array_equal(read_rgb(tmp_path / "scene.png"), read_rgb(scene.image))


def test_polygons_of_new_brunswick_become_labels_and_overlapping_scenes_share_their_blocks(tmp_path):
    run(dataset(NEW_BRUNSWICK), tmp_path)  # compares the splits' footprints too
    scenes = read_scenes(tmp_path / "scenes.parquet")
    for row in scenes.itertuples():
        with rasterio.open(row.image) as image, rasterio.open(row.label) as label:
            assert image.transform == label.transform and image.shape == label.shape
        assert {0, 1, 2, 3, 255} <= set(np.unique(read_label(row.label)))
    tables = [read_manifest(tmp_path / "tiles" / f"{split}.parquet") for split in ("train", "test")]
    assert all(len(table) > 20 and table.crs.nunique() == 1 and set(table.scene) == set(scenes.scene) for table in tables)
