"""The embedded world and the listing of scenes."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from raw_datasets import describe

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb, write_raster
from crfm_core.data.scenes import list_scenes, read_scenes
from crfm_core.data.sources.embedded import CLASSES, EmbeddedWorld, draw_scene
from crfm_core.settings import Dataset

GRID = {"crs": "EPSG:32631", "transform": (0.3, 0, 400_000, 0, -0.3, 5_000_000)}


def folder_dataset(root, labels="{split}/labels/*.png", images="{split}/images/*.png", suffix="", splits=("train", "test")):
    files = {split: {"images": images.format(split=split), "labels": labels.format(split=split)} for split in splits}
    source = {"kind": "folder", "root": str(root), "splits": files, "label_suffix": suffix}
    return Dataset(name="own", classes=["a", "b"], palette=[(0, 0, 0), (9, 9, 9)], source=source, tile={"size": 16})


@pytest.fixture
def folder(tmp_path):
    """Two splits of one scene each: train/{images,labels}/one.png and test/{images,labels}/two.png, 20x24 pixels."""
    rng = np.random.default_rng(0)
    for split, name in (("train", "one"), ("test", "two")):
        write_raster(tmp_path / split / "images" / f"{name}.png", rng.integers(0, 256, (20, 24, 3), np.uint8))
        write_raster(tmp_path / split / "labels" / f"{name}.png", rng.integers(0, 2, (20, 24), np.uint8))
    return tmp_path


def world(name: str, scenes: dict[str, int]) -> Dataset:
    source = {"kind": "embedded", "scenes": scenes, "size": 64}
    return Dataset(name=name, classes=list(CLASSES), palette=[(0, 0, 0)] * 7, source=source, tile={"size": 32})


def test_a_scene_depends_on_its_seed_alone():
    first = draw_scene(7)
    np.random.seed(1)
    draw_scene(8)
    again = draw_scene(7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], draw_scene(8)[0])


@pytest.mark.parametrize("size", [64, 200, 256])
def test_every_pixel_of_a_scene_has_a_class(size):
    image, label = draw_scene(3, size)
    assert image.shape == (size, size, 3) and label.shape == (size, size)
    assert image.dtype == label.dtype == np.uint8 and label.max() < len(CLASSES)


def test_every_scene_has_every_class_and_none_is_rare():
    counts = [np.bincount(draw_scene(seed)[1].ravel(), minlength=len(CLASSES)) for seed in range(6)]
    assert (np.min(counts, axis=0) > 0).all()
    assert (np.sum(counts, axis=0) / np.sum(counts) > 0.03).all()


def test_a_scene_is_drawn_fast():
    taken = []
    for seed in range(3):
        start = time.process_time()
        draw_scene(seed)
        taken.append(time.process_time() - start)
    assert min(taken) < 1.0  # about 0.15 s on a free core


def test_scenes_lie_apart_on_the_ground_and_differ_between_splits(tmp_path):
    scenes = EmbeddedWorld(world("world", {"train": 2, "test": 2})).find_scenes(tmp_path / "scenes")
    assert [scene.key for scene in scenes] == [("train-000",), ("train-001",), ("test-000",), ("test-001",)]
    boxes, pictures = [], []
    for scene in scenes:
        about = describe(scene.image)
        assert about == describe(scene.label) and "32631" in about["crs"]
        a, _, left, _, e, top = about["transform"]
        boxes.append((left, top + 64 * e, left + 64 * a, top))
        pictures.append(read_rgb(scene.image))
    for i in range(4):
        for j in range(i):
            (l0, b0, r0, t0), (l1, b1, r1, t1) = boxes[i], boxes[j]
            assert r0 < l1 or r1 < l0 or t0 < b1 or t1 < b0
            assert not np.array_equal(pictures[i], pictures[j])


def test_a_raster_comes_back_as_it_was_written(tmp_path):
    image, label = draw_scene(1, 64)
    for suffix, grid in ((".tif", GRID), (".tif", {}), (".png", {})):
        for array, read in ((image, read_rgb), (label, read_label)):
            write_raster(tmp_path / f"x{suffix}", array, **grid, tags={"prompt": "a field"})
            assert np.array_equal(read(tmp_path / f"x{suffix}"), array)
            about = describe(tmp_path / f"x{suffix}")
            assert about["transform"] == [float(v) for v in grid.get("transform", ())] and bool(about["crs"]) == bool(grid)


def test_an_embedded_dataset_lists_the_scenes_it_draws(tmp_path):
    list_scenes(world("world", {"train": 1, "test": 1}), tmp_path, tmp_path / "results" / "scenes.parquet")
    table = read_scenes(tmp_path / "results" / "scenes.parquet", "train")
    assert list(table.scene) == ["train-000"] and read_label(table.label[0]).shape == (64, 64)


def test_a_folder_is_listed_with_its_pairs(folder):
    list_scenes(folder_dataset("."), folder, folder / "out" / "scenes.parquet")
    table = pd.read_parquet(folder / "out" / "scenes.parquet")
    assert list(zip(table.split, table.scene, strict=True)) == [("train", "one"), ("test", "two")]
    assert table.image[0] == str(folder / "train" / "images" / "one.png")


def test_labels_may_lie_among_the_images_and_carry_a_suffix(tmp_path):
    EmbeddedWorld(world("own", {"train": 2, "test": 1})).find_scenes(tmp_path / "own")
    for labels in ("{split}/*.tif", "{split}/*_label.tif"):
        list_scenes(folder_dataset("own", labels, "{split}/*.tif", "_label"), tmp_path, tmp_path / "scenes.parquet")
        table = pd.read_parquet(tmp_path / "scenes.parquet")
        assert list(table.scene) == ["train-000", "train-001", "test-000"]
        assert table.label[0] == "own/train/train-000_label.tif"  # below the manifest, hence relative to it


def test_wildcards_of_folders_belong_to_the_scene(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for area in ("Urban", "Rural"):
            write_raster(tmp_path / split / f"{area} {split}" / "images" / "1.png", rng.integers(0, 256, (16, 16, 3), np.uint8))
            write_raster(tmp_path / split / f"{area} {split}" / "masks" / "1.png", np.zeros((16, 16), np.uint8))
    list_scenes(folder_dataset(".", "{split}/*/masks/*.png", "{split}/*/images/*.png"), tmp_path, tmp_path / "scenes.parquet")
    table = pd.read_parquet(tmp_path / "scenes.parquet")
    assert list(table.scene) == ["Rural_train-1", "Urban_train-1", "Rural_test-1", "Urban_test-1"]
    assert all(image.replace("images", "masks") == label for image, label in zip(table.image, table.label, strict=True))


def _remove_label(folder):
    (folder / "test" / "labels" / "two.png").unlink()


def _truncate_image(folder):
    path = folder / "test" / "images" / "two.png"
    path.write_bytes(path.read_bytes()[:20])


def _other_size(folder):
    write_raster(folder / "test" / "labels" / "two.png", np.zeros((20, 23), np.uint8))


def _same_content(folder):
    (folder / "test" / "images" / "two.png").write_bytes((folder / "train" / "images" / "one.png").read_bytes())


def _same_name(folder):
    for kind in ("images", "labels"):
        (folder / "test" / kind / "two.png").rename(folder / "test" / kind / "one.png")


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (lambda folder: None, {"images": "{split}/pictures/*.png"}, "no file matches"),
        (lambda folder: None, {"splits": ("train", "test", "more")}, "no file matches"),
        (_remove_label, {}, "1 of 1 images have no label.*two.png"),
        (_truncate_image, {}, "two.png: not a readable raster"),
        (_other_size, {}, "23x20 pixels, but its image"),
        (_same_content, {}, "two.png .split test. has the same content as .*one.png .split train."),
        (_same_name, {}, "has the same scene name 'one'"),
    ],
)
def test_a_bad_folder_is_refused_with_the_file_and_the_fault(folder, damage, settings, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        list_scenes(folder_dataset(folder, **settings), folder, folder / "scenes.parquet")
    assert not (folder / "scenes.parquet").exists()


def test_one_file_in_two_splits_is_refused(folder):
    dataset = folder_dataset(folder, "*/labels/*.png", "*/images/*.png")
    with pytest.raises(DataError, match="is the same file as"):
        list_scenes(dataset, folder, folder / "scenes.parquet")


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; set source\.root"):
        list_scenes(folder_dataset("nowhere"), tmp_path, tmp_path / "scenes.parquet")
