"""Predictions as rasters in their place: of tiles, of scenes of any size, and of a benchmark's own test images."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import Affine
from raw_datasets import describe
from segmentor_tiles import CLASSES, PALETTE, write_tiles
from segmentors import network_of, pictures, write_checkpoint
from torch import nn

from crfm_core import DataError, WeightsError
from crfm_core.data.rasters import read_label, read_rgb, read_tags, scaled
from crfm_core.data.scenes import SCENE_COLUMNS
from crfm_core.data.tiling import mosaic, read_mask, tile_scene
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.segmentor import prediction
from crfm_core.segmentor.critic import as_critic, load_critic
from crfm_core.segmentor.evaluation import as_input, class_maps, predict
from crfm_core.segmentor.prediction import in_strips, predict_raster, predict_scene, predict_tiles
from crfm_core.settings import Dataset, Evaluation, Tiling

PLAIN = Evaluation()
CRS, TRANSFORM = "EPSG:32631", Affine(0.3, 0, 500_000, 0, -0.3, 5_000_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("predictions") / "checkpoint.pth", network_of(0).state_dict())


@pytest.fixture(scope="module")
def critic(checkpoint):
    return load_critic(checkpoint)


def write(path: Path, bands: np.ndarray, placed: bool = True, **profile) -> Path:
    """A raster of bands [n,H,W]."""
    place = {"crs": CRS, "transform": TRANSFORM} if placed else {}
    size = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="PNG" if path.suffix == ".png" else "GTiff", **size, **place, **profile) as target:
        target.write(bands)
    return path


def picture(height: int, width: int) -> np.ndarray:
    """Bands [3,H,W]."""
    return np.moveaxis(pictures(height, width, 1)[0], -1, 0)


def by_hand(critic, image: np.ndarray, window: int, stride: int, evaluation: Evaluation = PLAIN) -> np.ndarray:
    """The labels of a whole image uint8 [H,W,3] from the mean of all windows' answers, each looked at alone."""
    height, width = image.shape[:2]
    total, count = np.zeros((len(CLASSES), height, width)), np.zeros((height, width))
    for top in {min(start, max(0, height - window)) for start in range(0, height, stride)}:
        for left in {min(start, max(0, width - window)) for start in range(0, width, stride)}:
            part = np.ascontiguousarray(image[None, top : top + window, left : left + window])
            answer = class_maps(critic, as_input(part), evaluation)[0].numpy()
            total[:, top : top + window, left : left + window] += answer
            count[top : top + window, left : left + window] += 1
    return (total / count).argmax(0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("georeferenced", [True, False])
def test_predictions_of_tiles_lie_where_the_tiles_lie_and_stand_in_their_manifest(tmp_path, checkpoint, critic, georeferenced):
    manifest, root = write_tiles(tmp_path / "tiles" / "test.parquet", 5, georeferenced=georeferenced), tmp_path
    out = tmp_path / "predictions" / "real" / "segformer_tiny" / "seed0" / "test.parquet"
    how = Evaluation(flip=True, batch_size=2)
    predict_tiles(checkpoint, manifest, root, out, how)
    before, after = read_manifest(manifest), read_manifest(out)
    assert after.tile_id.tolist() == before.tile_id.tolist() and (after.predicted_by.str.len() == 12).all()
    assert [p.resolve() for p in paths_of(out, after, "image", root)] == [p.resolve() for p in paths_of(manifest, before, "image", root)]
    images = np.stack([read_rgb(path) for path in paths_of(out, after, "image", root)])
    for row, path, expected in zip(after.itertuples(), paths_of(out, after, "label", root), predict(critic, images, 2, how), strict=True):
        assert path.suffix == (".tif" if georeferenced else ".png") and np.array_equal(read_label(path), expected)
        place = describe(path)
        assert bool(place["crs"]) == georeferenced and place["transform"] == list(row.transform)
        assert row.pixels.tolist() == np.bincount(expected.ravel(), minlength=3).tolist()
        assert row.classes.tolist() == np.unique(expected).tolist()
    assert (after.digest != before.digest).all()


def test_tiles_without_labels_are_predicted_as_those_with_labels_are(tmp_path, checkpoint):
    image, label = write(tmp_path / "a.tif", picture(64, 32)), write(tmp_path / "b.tif", np.zeros((1, 64, 32), np.uint8))
    tables = []
    for name, own in (("test", label), ("unlabelled", None)):
        manifest = tmp_path / "tiles" / f"{name}.parquet"
        write_manifest(manifest, tile_scene(image, own, tmp_path / "tiles" / name, 32, num_classes=3, split=name, scene="a"))
        tables.append(predict_tiles(checkpoint, manifest, tmp_path, tmp_path / "predictions" / f"{name}.parquet"))
    assert [pixels.tolist() for pixels in map(np.array, tables[0].pixels)] == [list(pixels) for pixels in tables[1].pixels]
    assert read_manifest(tmp_path / "predictions" / "unlabelled.parquet").split.tolist() == ["unlabelled"] * 2


def test_what_tiles_show_beyond_their_scene_is_not_predicted_and_the_tiles_make_the_scene(tmp_path, checkpoint, critic):
    image, label = write(tmp_path / "a.tif", picture(50, 70)), write(tmp_path / "b.tif", np.zeros((1, 50, 70), np.uint8))
    manifest = tmp_path / "tiles" / "test.parquet"
    write_manifest(manifest, tile_scene(image, label, tmp_path / "tiles" / "test", 32, edge="pad", licence="CC0", num_classes=3))
    table = predict_tiles(checkpoint, manifest, tmp_path, tmp_path / "predictions" / "test.parquet")
    label = read_label(tmp_path / "predictions" / table.label.iloc[-1])
    assert (label[18:] == 255).all() and (label[:, 6:] == 255).all() and (label[:18, :6] != 255).all()
    assert read_tags(tmp_path / "predictions" / table.label.iloc[0])["licence"] == "CC0"
    mosaic(tmp_path / "predictions" / "test.parquet", tmp_path, "a", "label", tmp_path / "whole.tif")
    assert set(np.unique(read_label(tmp_path / "whole.tif"))) <= {0, 1, 2}
    assert describe(tmp_path / "whole.tif") == describe(image)


def test_a_stopped_prediction_goes_on_with_the_rest_and_keeps_nothing_of_another_origin(tmp_path, checkpoint, monkeypatch):
    manifest, out = write_tiles(tmp_path / "tiles" / "test.parquet", 6), tmp_path / "predictions" / "test.parquet"
    single = Evaluation(batch_size=1)
    folder, made = out.with_suffix(""), []
    write_tile = prediction.write_prediction

    def counting(path, *arguments):
        if len(made) == 3 and not out.exists():
            raise KeyboardInterrupt
        made.append(path.name)
        write_tile(path, *arguments)

    monkeypatch.setattr(prediction, "write_prediction", counting)
    with pytest.raises(KeyboardInterrupt):
        predict_tiles(checkpoint, manifest, tmp_path, out, single)
    assert made == ["t0.png", "t1.png", "t2.png"] and not out.exists()

    damaged = (folder / "t1.png").read_bytes()
    (folder / "t1.png").write_bytes(damaged[: len(damaged) // 2])
    (folder / "gone.png").write_bytes(b"of a tile that is no more")
    (folder / ".t3.png.abc").mkdir()
    made[:] = ["interrupted"] * 4
    predict_tiles(checkpoint, manifest, tmp_path, out, single)
    assert made[4:] == ["t1.png", "t3.png", "t4.png", "t5.png"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *(f"t{i}.png" for i in range(6))]
    whole = {path.name: path.read_bytes() for path in folder.glob("*.png")}

    def again(changed=checkpoint, how=single) -> list[str]:
        made.clear()
        predict_tiles(changed, manifest, tmp_path, out, how)
        return list(made)

    assert again(how=Evaluation(batch_size=4)) == []
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == whole
    assert len(again(how=Evaluation(flip=True))) == 6
    assert len(again(write_checkpoint(tmp_path / "other.pth", network_of(5).state_dict()), Evaluation(flip=True))) == 6
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} != whole
    with pytest.raises(WeightsError, match="its classes are not the dataset's"):
        predict_tiles(checkpoint, manifest, tmp_path, tmp_path / "x.parquet", classes=["soil", "lake", "wood"])


# ----------------------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize(
    ("height", "width", "window", "stride"),
    [(100, 130, 32, 21), (100, 130, 32, None), (64, 96, 32, 32), (32, 200, 64, 40), (30, 61, 64, 64)],
)
@pytest.mark.parametrize("strip", [1, 17, 1000])
def test_a_scene_in_strips_is_the_computation_on_the_whole_array(tmp_path, critic, height, width, window, stride, strip):
    image = write(tmp_path / "a.tif", picture(height, width))
    how = Evaluation(window=window, stride=stride, batch_size=1)
    predict_raster(critic, image, tmp_path / "out.tif", Tiling(size=16), how, palette=PALETTE, strip=strip)
    expected = by_hand(critic, read_rgb(image), window, stride or 2 * window // 3)
    found = read_label(tmp_path / "out.tif")
    assert len(np.unique(found)) > 1 and np.array_equal(found, expected)
    assert describe(tmp_path / "out.tif") == describe(image)


def test_windows_in_batches_and_views_give_the_same_scene_but_for_rounding(tmp_path, critic):
    image = write(tmp_path / "a.png", picture(70, 110), placed=False)
    for how in (Evaluation(), Evaluation(flip=True, scales=[1.0, 1.5])):
        predict_raster(critic, image, tmp_path / "out.png", Tiling(size=32), how)
        expected = by_hand(critic, read_rgb(image), 32, 21, how)
        assert (read_label(tmp_path / "out.png") == expected).mean() > 0.999


def test_a_scene_is_read_as_its_tiles_are(tmp_path, critic):
    rng = np.random.default_rng(0)
    bands = np.concatenate([rng.integers(0, 9, (1, 80, 120)), picture(80, 120).astype(int) * 40]).astype(np.uint16)
    image = write(tmp_path / "a.tif", bands)
    limits = ([500.0, 0.0, 900.0], [8000.0, 9000.0, 10000.0])
    predict_raster(critic, image, tmp_path / "out.tif", Tiling(size=32, bands=[4, 3, 2], scale={}), Evaluation(batch_size=1), limits)
    seen = np.moveaxis(scaled(bands[[3, 2, 1]], *limits), 0, -1)
    assert np.array_equal(read_label(tmp_path / "out.tif"), by_hand(critic, seen, 32, 21))
    with pytest.raises(DataError, match=r"a\.tif: pixels are uint16, not uint8; set tile\.scale"):
        predict_raster(critic, image, tmp_path / "none.tif", Tiling(size=32), None)
    assert not (tmp_path / "none.tif").exists()


def test_a_scene_is_predicted_on_the_grid_of_the_wanted_ground_distance(tmp_path, critic):
    source = {"kind": "embedded", "scenes": {"train": 1, "test": 1}}
    dataset = Dataset(name="d", classes=CLASSES, palette=PALETTE, source=source, tile={"size": 32, "ground_distance": 0.5})
    image, label = write(tmp_path / "a.tif", picture(90, 130)), write(tmp_path / "b.tif", np.zeros((1, 90, 130), np.uint8))
    predict_raster(critic, image, tmp_path / "out.tif", dataset.tile, Evaluation(batch_size=1))
    _, grid = read_mask(image, label, dataset)
    rows = tile_scene(image, label, tmp_path / "tiles", 32, ground_distance=0.5, num_classes=3)
    write_manifest(tmp_path / "tiles.parquet", rows)
    mosaic(tmp_path / "tiles.parquet", tmp_path, "a", "image", tmp_path / "seen.tif")
    assert describe(tmp_path / "out.tif")["transform"] == pytest.approx(tuple(grid.transform)[:6])
    assert np.array_equal(read_label(tmp_path / "out.tif"), by_hand(critic, read_rgb(tmp_path / "seen.tif"), 32, 21))


def test_where_a_scene_has_no_picture_nothing_is_predicted_and_windows_of_it_are_passed_over(tmp_path, monkeypatch):
    torch.manual_seed(0)
    critic, bands = as_critic(nn.Conv2d(3, 3, 1), CLASSES), np.maximum(picture(100, 90), 1)
    bands[:, :40, 10:] = 0
    bands[:, 60:70, 20:30] = 0
    image = write(tmp_path / "a.tif", bands, nodata=0)
    looked = []
    monkeypatch.setattr(prediction, "class_maps", lambda critic, images, how: looked.append(len(images)) or class_maps(critic, images, how))
    predict_raster(critic, image, tmp_path / "out.tif", Tiling(size=10), Evaluation(stride=10), palette=PALETTE)
    hidden = (bands == 0).all(0)
    assert np.array_equal(read_label(tmp_path / "out.tif") == 255, hidden)
    assert np.array_equal(read_label(tmp_path / "out.tif")[~hidden], predict(critic, read_rgb(image)[None])[0][~hidden])
    assert sum(looked) == 90 - 4 * 8 - 1
    with rasterio.open(tmp_path / "out.tif") as written:
        assert written.nodata == 255
        assert [written.colormap(1)[index] for index in range(3)] == [(*colour, 255) for colour in PALETTE]


def test_a_picture_of_labels_has_the_datasets_colours_and_ids_in_it(tmp_path, critic):
    image = write(tmp_path / "a.png", picture(40, 64), placed=False)
    predict_raster(critic, image, tmp_path / "out.png", Tiling(size=32), palette=PALETTE)
    with Image.open(tmp_path / "out.png") as written:
        assert written.mode == "P"
        ids, colours = np.array(written), np.array(written.getpalette(), np.uint8).reshape(-1, 3)
    assert np.array_equal(ids, read_label(tmp_path / "out.png")) and set(np.unique(ids)) <= {0, 1, 2}
    assert np.array_equal(colours[ids], np.array(PALETTE)[ids])


def test_the_memory_for_a_scene_does_not_grow_with_its_height(tmp_path):
    torch.manual_seed(0)
    critic = as_critic(nn.Conv2d(3, 3, 1), CLASSES)
    image = write(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 256, (3, 8192, 256), np.uint8), compress="deflate")
    tracemalloc.start()
    try:
        predict_raster(critic, image, tmp_path / "out.tif", Tiling(size=64), Evaluation(stride=64), strip=64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < 8192 * 256
    with rasterio.open(tmp_path / "out.tif") as written:
        part = written.read(1, window=rasterio.windows.Window(0, 8000, 256, 192))
    with rasterio.open(image) as source:
        seen = np.moveaxis(source.read(window=rasterio.windows.Window(0, 8000, 256, 192)), 0, -1)
    assert np.array_equal(part, predict(critic, np.ascontiguousarray(seen)[None])[0])


def test_strips_are_the_same_rows_again():
    rows = np.arange(23)[:, None]
    for cuts in ([5, 6, 20], [1, 2, 3, 4], [23], []):
        for height in (1, 4, 7, 23, 100):
            strips = list(in_strips(np.split(rows, cuts), height))
            assert np.array_equal(np.concatenate(strips), rows) and all(len(strip) == height for strip in strips[:-1])


def scene_list(folder: Path, dataset: Dataset, **scenes: Path) -> Path:
    """A scene manifest of images whose labels are not there."""
    own = {"dataset": dataset.name, "split": "test", "group": "", "caption": "", "label": "nowhere/label.tif"}
    rows = [{**own, "scene": name, "image": str(image), "low": [10.0] * 3, "high": [200.0] * 3} for name, image in scenes.items()]
    pd.DataFrame(rows)[list(SCENE_COLUMNS)].to_parquet(folder / "scenes.parquet")
    return folder / "scenes.parquet"


def test_a_listed_scene_is_predicted_without_its_label_and_says_how(tmp_path, checkpoint, critic):
    source = {"kind": "embedded", "scenes": {"train": 1, "test": 1}}
    dataset = Dataset(
        name="d", licence="CC0", classes=CLASSES, palette=PALETTE, source=source, tile={"size": 32, "scale": {"low": 1, "high": 99}}
    )
    image = write(tmp_path / "a.tif", picture(50, 80))
    scenes = scene_list(tmp_path, dataset, a=image)
    predict_scene(checkpoint, scenes, "a", dataset, tmp_path / "out.tif", Evaluation(batch_size=1))
    seen = np.moveaxis(scaled(picture(50, 80), [10] * 3, [200] * 3), 0, -1)
    assert np.array_equal(read_label(tmp_path / "out.tif"), by_hand(critic, seen, 32, 21))
    tags = read_tags(tmp_path / "out.tif")
    assert tags["licence"] == "CC0" and tags["prediction_of"] == "a" and tags["classes"] == "soil, water, wood"
    with pytest.raises(DataError, match=r"scenes\.parquet: no scene 'b'; it has a, "):
        predict_scene(checkpoint, scenes, "b", dataset, tmp_path / "b.tif")


def test_a_scene_that_breaks_off_is_named_and_nothing_is_left_of_its_prediction(tmp_path, critic):
    noise = np.random.default_rng(0).integers(1, 256, (3, 64, 2000), np.uint8)
    image = write(tmp_path / "a.tif", noise, nodata=0, compress="deflate")
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    with pytest.raises(DataError, match=r"a\.tif: not a readable raster"):
        predict_raster(critic, image, tmp_path / "out" / "a.tif", Tiling(size=32))
    assert list((tmp_path / "out").iterdir()) == []
