"""Each kind of source gives the scenes it holds; labels of other grids and polygons end up where GDAL would put them; a toy kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pandas as pd
import pyogrio
import pytest
import rasterio
import shapely
from loopback_files import archive_bytes
from PIL import Image
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.warp import reproject
from raw_datasets import (
    COLOURS,
    PLACE,
    UTM,
    as_palette,
    colour_data,
    dataset_of,
    folder_data,
    fusu_data,
    loveda_data,
    merged,
    pattern,
    raster_data,
    released_data,
    run,
    save,
    tif_data,
    vector_data,
    write_polygons,
    write_tif,
)

from crfm_core.data import sources
from crfm_core.data.grid import grid_of
from crfm_core.data.rasters import open_raster, read_label, read_rgb, read_tags, sample_bands
from crfm_core.data.scenes import list_scenes, read_scenes, scene_name
from crfm_core.data.sources import SceneSource, fetch_dataset, open_source
from crfm_core.data.tiling import read_mask, tile_scene, tile_split
from crfm_core.manifest import read_manifest
from crfm_core.settings import Dataset, Source


def scenes_of(tmp_path, config: dict) -> pd.DataFrame:
    list_scenes(dataset_of(config), tmp_path, tmp_path / "results" / "scenes.parquet")
    return read_scenes(tmp_path / "results" / "scenes.parquet")


def names(table: pd.DataFrame) -> dict[str, list[str]]:
    return {split: list(rows.scene) for split, rows in table.groupby("split")}


# ------------------------------------------------------------------------------------------------------------ folders


def test_colours_become_ids_and_other_colours_are_ignored_where_the_map_says_so(tmp_path):
    config = colour_data(tmp_path / "data")
    config["label_map"] |= {"#9b9b9b": 255}
    label = tmp_path / "data" / "test" / "labels" / "c.png"
    colours, ids = COLOURS[pattern(2)[1]], pattern(2)[1]
    colours[5:9, 2:20] = 0x9B
    save(label, colours)
    run(dataset_of(config), tmp_path / "results")
    ids[5:9, 2:20] = 255
    tile = read_label(tmp_path / "results" / "tiles" / "test" / "labels" / "c_0_0.png")
    assert np.array_equal(tile, ids[:8, :8])


def test_transparent_pixels_of_a_colour_label_are_ignored(tmp_path):
    config = colour_data(tmp_path / "data")
    rgba = np.dstack([COLOURS[pattern(2)[1]], np.full((24, 24), 255, np.uint8)])
    rgba[:4, :4] = 7, 7, 7, 0
    save(tmp_path / "data" / "test" / "labels" / "c.png", rgba)
    run(dataset_of(config), tmp_path / "results")
    tile = read_label(tmp_path / "results" / "tiles" / "test" / "labels" / "c_0_0.png")
    assert (tile[:4, :4] == 255).all() and (tile[4:] == pattern(2)[1][4:8, :8]).all()


def test_a_palette_label_of_ids_keeps_its_indices(tmp_path):
    config = folder_data(tmp_path / "data")
    run(dataset_of(config), tmp_path / "plain")
    for path in (tmp_path / "data").glob("*/labels/*.png"):
        as_palette(path, COLOURS)
    run(dataset_of(config), tmp_path / "palette")
    assert list(read_manifest(tmp_path / "plain/tiles/train.parquet").digest) == list(
        read_manifest(tmp_path / "palette/tiles/train.parquet").digest
    )


def test_a_value_that_the_map_names_is_no_nodata(tmp_path):
    image, label = write_tif(tmp_path / "a.tif", pattern(0)[0]), write_tif(tmp_path / "b.tif", pattern(0)[1], nodata=0)
    ids = pattern(0)[1]
    for label_map, expected in ((None, np.where(ids == 0, 255, ids)), ({0: 2, 1: 1, 2: 0}, 2 - ids)):
        rows = tile_scene(image, label, tmp_path / "tiles", 24, label_map=label_map, num_classes=3)
        assert np.array_equal(read_label(tmp_path / rows[0]["label"]), expected)


def test_scenes_may_be_left_out_and_split_by_what_the_path_says(tmp_path):
    root = tmp_path / "data"
    for town, index in (("north", 0), ("north", 1), ("south", 2), ("east", 3), ("east", 4)):
        image, ids = pattern(index)
        save(root / "images" / f"{town}_{index}.png", image)
        save(root / "labels" / f"{town}_{index}.png", ids)
    source = {"kind": "folder", "root": str(root), "images": "images/*.png", "labels": "labels/*.png", "exclude": ["*/east_4.png"]}
    split = {"by": "group", "group": "/([a-z]+)_", "shares": {"train": 0.7, "test": 0.3}}
    table = scenes_of(tmp_path, {"source": source, "split": split, "tile": {"size": 8}})
    assert sorted(table.scene) == ["east_3", "north_0", "north_1", "south_2"]
    assert table.groupby("group").split.nunique().max() == 1 and set(table.group) == {"north", "south", "east"}
    assert set(table.split) == {"train", "test"}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("Urban", "12"), "Urban-12"),
        (("a b (1)",), "a_b_1_"),
        (("Süd Öst",), "Sud_Ost"),
        (("..", "x"), "-x"),
        (("图像",), "scene-"),
        (("тест-7",), "-7-"),
    ],
)
def test_names_are_made_for_files(key, name):
    assert scene_name(key).startswith(name) and scene_name(key).isascii()


# ---------------------------------------------------------------------------------------------------------- benchmarks


def test_a_loveda_tree_gives_its_two_splits_and_areas(tmp_path):
    config = loveda_data(tmp_path / "data") | {"label_map": {0: 255, 1: 0, 2: 1}, "licence": "academic use"}
    table = scenes_of(tmp_path, config)
    assert names(table) == {"train": ["Urban-0", "Rural-1"], "val": ["Urban-2", "Rural-3"]} and set(table.group) == {"Urban", "Rural"}
    run(dataset_of(config), tmp_path / "results")
    tiles = read_manifest(tmp_path / "results" / "tiles" / "val.parquet")
    ids = pattern(2)[1]
    assert np.array_equal(
        read_label(tmp_path / "results/tiles" / tiles.label[0]), np.where(ids[:8, :8] == 0, 255, ids[:8, :8].astype(int) - 1)
    )
    assert set(tiles.licence) == {"academic use"} and read_tags(tmp_path / "results/tiles" / tiles.image[0])["licence"] == "academic use"


@pytest.mark.parametrize("labels", ["im1_label", "label1"])
def test_a_flat_fusu_tree_is_split_by_what_the_patches_share(tmp_path, labels):
    config = fusu_data(tmp_path / "data")
    if labels != "im1_label":
        (tmp_path / "data" / "im1_label").rename(tmp_path / "data" / labels)
    table = scenes_of(tmp_path, config)
    assert len(table) == 4 and set(table.split) == {"train", "test"} and list(table.group) == ["0", "1", "2", "3"]
    run(dataset_of(config), tmp_path / "results")


def test_a_fusu_tree_with_splits_and_two_dates_gives_the_asked_date(tmp_path):
    for split, index in (("train", 0), ("train", 1), ("test", 2)):
        for date in (1, 2):
            image, ids = pattern(10 * date + index)
            save(tmp_path / "data" / split / f"im{date}" / f"{index}_7.png", image)
            save(tmp_path / "data" / split / f"label{date}" / f"{index}_7.png", ids)
    source = {"kind": "fusu", "root": str(tmp_path / "data"), "splits": ["train", "test"], "date": 2}
    table = scenes_of(tmp_path, {"source": source, "tile": {"size": 8}})
    assert names(table) == {"train": ["0_7", "1_7"], "test": ["2_7"]} and all("/im2/" in image for image in table.image)
    assert np.array_equal(read_rgb(table.image[0]), pattern(20)[0])


def test_the_released_index_gives_pairs_and_prompts(tmp_path):
    config = released_data(tmp_path / "data")
    table = scenes_of(tmp_path, config)
    assert names(table) == {"train": ["train-images-a", "train-images-b"], "test": ["test-images-c"]}
    assert list(table.caption) == ["scene a", "scene b", "scene c"]
    run(dataset_of(config), tmp_path / "results")
    assert set(read_manifest(tmp_path / "results/tiles/train.parquet").given_caption) == {"scene a", "scene b"}


# ----------------------------------------------------------------------------------------------------- labels by place


def test_polygons_are_burned_as_gdal_burns_them(tmp_path):
    config = vector_data(tmp_path / "data")
    table = scenes_of(tmp_path, config)
    for row in table.itertuples():
        ids, column = read_label(row.label), np.arange(24) + 100 * "abc".index(row.scene[-1])
        expected = np.array([0, 1, 2] * 6)[((column + 0.5) * 18 // 224).astype(int)]
        assert np.array_equal(ids, np.broadcast_to(expected, (24, 24))), row.scene
        assert rasterio.open(row.label).transform == rasterio.open(row.image).transform


def later_lies_over(path):
    circle = shapely.Point(400_006, 4_999_994).buffer(4)
    write_polygons(path, ["wood", "water", "unknown"], [shapely.box(400_000, 4_999_988, 400_012, 5_000_000), circle, circle.buffer(-2)])


@pytest.mark.skipif(not shutil.which("gdal_rasterize"), reason="needs gdal_rasterize (Debian package gdal-bin)")
@pytest.mark.parametrize(("suffix", "crs"), [(".gpkg", UTM), (".geojson", "EPSG:4326"), (".shp", "EPSG:3857"), (".fgb", "EPSG:32632")])
def test_polygons_of_any_format_and_crs_lie_where_gdal_rasterize_puts_them(tmp_path, suffix, crs):
    config = vector_data(tmp_path / "data")
    later_lies_over(tmp_path / "source.gpkg")
    vectors = tmp_path / "data" / f"own{suffix}"
    subprocess.run(["ogr2ogr", "-t_srs", crs, vectors, tmp_path / "source.gpkg"], check=True)
    config = merged(config, source={"labels": f"own{suffix}"})
    config["label_map"] |= {"unknown": 255}
    config["source"]["splits"] = {"train": "train/images/a.tif"}
    dataset = dataset_of(config | {"test": "train"})
    list_scenes(dataset, tmp_path, tmp_path / "results" / "scenes.parquet")
    ours = read_label(read_scenes(tmp_path / "results" / "scenes.parquet").label[0])
    referee = tmp_path / "referee.tif"
    write_tif(referee, np.full((24, 24), 255, np.uint8))
    subprocess.run(["ogr2ogr", "-t_srs", UTM, tmp_path / "back.gpkg", vectors, "-nln", "ground"], check=True)
    for value, number in (("wood", 0), ("water", 2), ("unknown", 255)):
        command = ["gdal_rasterize", "-q", "-burn", str(number), "-l", "ground", "-where", f"class = '{value}'", tmp_path / "back.gpkg"]
        subprocess.run([*command, referee], check=True)
    assert np.array_equal(ours, read_label(referee)) and {0, 2, 255} == set(np.unique(ours).tolist())


@pytest.mark.parametrize(
    ("crs", "transform"),
    [(UTM, PLACE @ Affine.scale(2)), (UTM, PLACE @ Affine.translation(-5.3, -20.2) @ Affine.rotation(2)), ("EPSG:3857", None)],
    ids=["coarser", "turned", "another CRS"],
)
def test_a_label_raster_of_another_grid_lies_where_gdal_warps_it(tmp_path, crs, transform):
    config = raster_data(tmp_path / "data")
    rng = np.random.default_rng(0)
    if transform is None:
        bounds = rasterio.warp.transform_bounds(UTM, crs, 399_990, 4_999_980, 400_130, 5_000_010)
        transform = rasterio.transform.from_bounds(*bounds, 260, 60)
    ids = rng.integers(0, 3, (60, 260)).astype(np.uint8)
    ids[:, 40:44] = 77
    write_tif(tmp_path / "data" / "labels.tif", ids, crs, transform, nodata=77)
    config = merged(config, source={"background": 1})
    for row in scenes_of(tmp_path, config).itertuples():
        with rasterio.open(row.image) as image:
            place = {"dst_crs": image.crs, "dst_transform": image.transform}
        expected = np.full((24, 24), 99, np.uint8)
        reproject(
            ids, expected, src_crs=crs, src_transform=transform, resampling=Resampling.nearest, src_nodata=77, dst_nodata=99,
            init_dest_nodata=True, tolerance=0.001, **place,
        )  # fmt: skip
        assert np.array_equal(read_label(row.label), np.where(expected == 99, 1, expected)), row.scene


def test_labels_lie_over_each_other_in_the_order_of_their_globs(tmp_path):
    config = vector_data(tmp_path / "data")
    with rasterio.open(tmp_path / "data/train/images/a.tif") as image:
        left, bottom, right, top = rasterio.warp.transform_bounds(UTM, "EPSG:4326", *image.bounds)
    box = shapely.box(left - 1e-4, bottom - 1e-4, right, top + 1e-4)
    write_polygons(tmp_path / "data" / "over.geojson", ["water"], [box], crs="EPSG:4326")
    for labels, over in ((["ground.gpkg", "over.geojson"], True), (["over.geojson", "ground.gpkg"], False)):
        table = scenes_of(tmp_path, merged(config, source={"labels": labels}))
        assert (read_label(table.label[0]) == 2).all() == over


# ----------------------------------------------------------------------------------------- depth, bands, ground distance


def test_scaling_takes_percentiles_of_the_scene_or_of_the_training_scenes_and_ignores_what_is_no_number(tmp_path):
    config = tif_data(tmp_path / "data")
    rng = np.random.default_rng(0)
    pictures = {}
    for index, path in enumerate(sorted((tmp_path / "data").glob("*/images/*.tif"))):
        pictures[path.stem] = rng.normal(100 * index, 10, (24, 24, 3)).astype(np.float32)
        pictures[path.stem][:3, :3] = np.nan
        with rasterio.open(path) as source:
            place = source.transform
        write_tif(path, pictures[path.stem], transform=place)
    valid = {name: picture[np.isfinite(picture).all(-1)] for name, picture in pictures.items()}
    for over, used in (("scene", "a"), ("dataset", "ab")):
        run(dataset_of(merged(config, tile={"scale": {"low": 5, "high": 90, "over": over}})), tmp_path / over)
        low, high = np.percentile(np.concatenate([valid[name] for name in used]).astype(float), (5, 90), axis=0)
        expected = np.round(255 * np.clip((pictures["a"] - low) / (high - low), 0, 1))
        image, label = (
            read(tmp_path / over / f"tiles/train/{kind}s/a_0_0.tif") for kind, read in (("image", read_rgb), ("label", read_label))
        )
        assert np.array_equal(image[3:], expected[3:8, :8]) and (image[:3, :3] == 0).all()
        assert (label[:3, :3] == 255).all() and (label[3:] < 3).all()


def test_bands_are_chosen_and_an_alpha_band_hides(tmp_path):
    rng = np.random.default_rng(0)
    bands = rng.integers(0, 256, (24, 24, 5)).astype(np.uint8)
    bands[..., 1] = np.where(np.arange(24) < 10, 0, 255)
    image, label = tmp_path / "a.tif", write_tif(tmp_path / "b.tif", pattern(0)[1])
    write_tif(image, bands, alpha="yes")  # GDAL marks the first band beyond the picture's own, here the second
    rows = tile_scene(image, label, tmp_path / "tiles", 24, bands=[4, 3, 1], num_classes=3)
    assert np.array_equal(read_rgb(tmp_path / rows[0]["image"]), bands[..., [3, 2, 0]])
    tile = read_label(tmp_path / rows[0]["label"])
    assert (tile[:, :10] == 255).all() and np.array_equal(tile[:, 10:], pattern(0)[1][:, 10:])


@pytest.mark.parametrize("overviews", [False, True])
def test_a_halved_scene_is_the_mean_of_its_pixels_and_the_most_frequent_id(tmp_path, overviews):
    image, ids = pattern(0, 64)
    write_tif(tmp_path / "a.tif", image)
    write_tif(tmp_path / "b.tif", ids)
    if overviews:
        with rasterio.open(tmp_path / "a.tif", "r+") as target:
            target.build_overviews([2], Resampling.average)
    rows = tile_scene(tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "tiles", 16, ground_distance=1.0, num_classes=3)
    assert len(rows) == 4 and rows[0]["scene_width"] == 32
    tile = next(row for row in rows if (row["row"], row["col"]) == (16, 0))
    mean = image[32:, :32].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(read_rgb(tmp_path / tile["image"]) - mean).max() <= 0.5 + 1e-6
    assert np.array_equal(read_label(tmp_path / tile["label"]), ids[32:, :32][::2, ::2])
    assert tile["transform"] == pytest.approx([1, 0, 400_000, 0, -1, 5_000_000 - 16])
    splits = {name: {"images": "a", "labels": "b"} for name in ("train", "test")}
    dataset = dataset_of({"source": {"kind": "folder", "root": ".", "splits": splits}, "tile": {"size": 16, "ground_distance": 1.0}})
    mask, grid = read_mask(tmp_path / "a.tif", tmp_path / "b.tif", dataset)
    assert mask.shape == (32, 32) == (grid.height, grid.width) and np.array_equal(mask[16:, :16], read_label(tmp_path / tile["label"]))


def test_ground_distance_counts_metres_in_degrees_and_feet(tmp_path):
    for crs, step in (("EPSG:4326", (1 / 111_320 / np.cos(np.radians(60)), 1 / 111_320)), ("EPSG:2225", (1 / 0.3048, 1 / 0.3048))):
        origin = (10, 60) if crs == "EPSG:4326" else (2_000_000, 700_000)
        path = write_tif(tmp_path / "a.tif", pattern(0)[0], crs, Affine(step[0], 0, origin[0], 0, -step[1], origin[1]))
        with open_raster(path) as source:
            grid = grid_of(source, 0.5)
        assert (grid.width, grid.height) == (48, 48)
        assert grid.transform @ (48, 48) == pytest.approx((origin[0] + 24 * step[0], origin[1] - 24 * step[1]))


def test_a_padded_tile_shows_nothing_of_a_neighbouring_block(tmp_path):
    root, (image, ids) = tmp_path / "data", pattern(0, 40)
    write_tif(root / "images" / "a.tif", np.maximum(image, 1))
    write_tif(root / "labels" / "a.tif", ids)
    source = {"kind": "folder", "root": str(root), "images": "images/*.tif", "labels": "labels/*.tif"}
    split = {"by": "blocks", "block": 20, "shares": {"train": 0.5, "test": 0.5}}
    run(dataset_of({"source": source, "split": split, "tile": {"size": 16, "edge": "pad"}}), tmp_path / "results")
    for split in ("train", "test"):
        table = read_manifest(tmp_path / "results" / "tiles" / f"{split}.parquet")
        for row in table.itertuples():
            inside = np.zeros((16, 16), bool)
            inside[: 20 - row.row % 20, : 20 - row.col % 20] = True
            assert (read_rgb(tmp_path / "results/tiles" / row.image).any(-1) == inside).all()
            assert ((read_label(tmp_path / "results/tiles" / row.label) != 255) == inside).all()
        assert len(table) % 4 == 0 and table.tile_id.is_unique


# ------------------------------------------------------------------------------------------ what real files come with


def test_a_nodata_value_that_the_map_names_stays_a_class_when_the_label_shrinks(tmp_path):
    ids = (np.arange(64) >= 40).astype(np.uint8)[None].repeat(64, 0)
    image, label = write_tif(tmp_path / "a.tif", pattern(0, 64)[0]), write_tif(tmp_path / "b.tif", ids, nodata=0)
    for label_map, left in (({0: 0, 1: 1}, 0), ({1: 1}, 255)):
        rows = tile_scene(image, label, tmp_path / "tiles", 32, ground_distance=1.0, label_map=label_map, num_classes=2)
        tile = read_label(tmp_path / rows[0]["label"])
        assert (tile[:, :20] == left).all() and (tile[:, 20:] == 1).all()


def test_a_nodata_value_that_the_map_names_stays_a_class_on_another_grid(tmp_path):
    config = raster_data(tmp_path / "data") | {"label_map": {0: 0, 1: 1, 2: 2}}
    expected = [read_label(path) for path in scenes_of(tmp_path, config).label]
    with rasterio.open(tmp_path / "data" / "labels.tif", "r+") as labels:
        labels.nodata = 0
    again = [read_label(path) for path in scenes_of(tmp_path, config).label]
    assert all(np.array_equal(a, b) and 0 in a for a, b in zip(expected, again, strict=True))


def test_a_south_up_label_raster_is_found_and_turned(tmp_path):
    config = raster_data(tmp_path / "data")
    expected = [read_label(path) for path in scenes_of(tmp_path, config).label]
    with rasterio.open(tmp_path / "data" / "labels.tif") as source:
        ids, place = source.read(1), source.transform
    write_tif(tmp_path / "data" / "labels.tif", ids[::-1], transform=place @ Affine.translation(0, len(ids)) @ Affine.scale(1, -1))
    assert all(np.array_equal(a, read_label(b)) for a, b in zip(expected, scenes_of(tmp_path, config).label, strict=True))


def test_masked_transparent_and_undefined_label_pixels_are_ignored(tmp_path):
    image, ids = write_tif(tmp_path / "a.tif", pattern(0)[0]), pattern(0)[1]
    masked = write_tif(tmp_path / "masked.tif", ids)
    with rasterio.open(masked, "r+") as target:
        target.write_mask(np.broadcast_to(np.arange(24) >= 10, (24, 24)))
    numbers = ids.astype(np.float32)
    numbers[:, :10] = np.nan
    undefined = write_tif(tmp_path / "undefined.tif", numbers)
    palette = tmp_path / "palette.png"
    save(palette, np.where(np.arange(24) >= 10, ids, 3).astype(np.uint8))
    picture = Image.fromarray(np.asarray(Image.open(palette)), mode="P")
    picture.putpalette(np.vstack([COLOURS, [[9, 9, 9]]]).astype(np.uint8).tobytes())
    picture.save(palette, transparency=3)
    colours = {"#3C1098": 0, "#FEDD3A": 1, "#E2A929": 2}
    for label, label_map in ((masked, None), (undefined, None), (palette, colours)):
        rows = tile_scene(image, label, tmp_path / "tiles", 24, label_map=label_map, num_classes=3)
        tile = read_label(tmp_path / rows[0]["label"])
        assert (tile[:, :10] == 255).all() and np.array_equal(tile[:, 10:], ids[:, 10:]), label.name


def test_values_of_an_attribute_are_taken_as_they_are_written(tmp_path):
    config = vector_data(tmp_path / "data")
    (tmp_path / "data" / "ground.gpkg").unlink()
    write_polygons(tmp_path / "data" / "ground.gpkg", ["007", "7", None] * 6)
    config["label_map"] = {"007": 0, 7: 1, None: 255}
    ids = [read_label(path) for path in scenes_of(tmp_path, config).label]
    assert set(np.unique(ids).tolist()) == {0, 1, 255}
    with pytest.raises(ValueError, match=r"label_map: YAML reads a key as True; write it in quotes"):
        dataset_of(config | {"label_map": {True: 0}})
    with pytest.raises(ValueError, match="label_map: 1 occurs twice"):
        dataset_of(folder_data(tmp_path / "more") | {"label_map": {1: 0, "01": 0}})


def test_an_unclosed_ring_is_closed(tmp_path):
    config = vector_data(tmp_path / "data")
    open_ring = shapely.to_wkb(shapely.box(400_000, 4_999_988, 400_200, 5_000_000))
    open_ring = open_ring[:5] + (1).to_bytes(4, "little") + (4).to_bytes(4, "little") + open_ring[13:-16]
    (tmp_path / "data" / "ground.gpkg").unlink()
    values = [np.array(["wood"], object)]
    pyogrio.raw.write(
        tmp_path / "data" / "ground.gpkg",
        np.array([open_ring], object),
        values,
        ["class"],
        geometry_type="Polygon",
        crs=UTM,
        layer="ground",
    )
    assert (read_label(scenes_of(tmp_path, config).label[0]) == 0).all()


def test_the_overviews_of_an_image_are_read_where_they_are_fine_enough(tmp_path):
    image, label = write_tif(tmp_path / "a.tif", np.full((64, 64, 3), 10, np.uint8)), write_tif(tmp_path / "b.tif", pattern(0, 64)[1])
    with rasterio.open(image, "r+") as target:
        target.build_overviews([2, 4], Resampling.average)
    with rasterio.open(image, "r+", overview_level=0) as half:
        half.write(np.full((3, 32, 32), 200, np.uint8))
    for distance, value in ((0.5, 10), (0.75, 10), (1.0, 200), (1.5, 200), (2.0, 10)):
        rows = tile_scene(image, label, tmp_path / "tiles", 8, ground_distance=distance, num_classes=3)
        assert (read_rgb(tmp_path / rows[0]["image"]) == value).all(), distance


def test_ground_of_one_colour_may_be_in_two_splits(tmp_path):
    config = folder_data(tmp_path / "data")
    for path in (tmp_path / "data").glob("*/images/*.png"):
        picture = np.asarray(Image.open(path)).copy()
        picture[:8, :8] = 0
        save(path, picture)
    for path in (tmp_path / "data").glob("*/labels/*.png"):
        ids = np.asarray(Image.open(path)).copy()
        ids[:8, :8] = 1
        save(path, ids)
    run(dataset_of(config), tmp_path / "results")
    table = read_manifest(tmp_path / "results" / "tiles" / "test.parquet")
    assert list(table.tile_id[table.uniform]) == ["c_0_0"]


def test_scaling_does_not_look_at_transparent_pixels(tmp_path):
    bands = np.full((24, 24, 5), 1000, np.uint16) + np.arange(24, dtype=np.uint16)[None, :, None]
    bands[:12] = 0
    bands[12:, :, 1] = 65535
    write_tif(tmp_path / "a.tif", bands, alpha="yes")
    assert sample_bands(tmp_path / "a.tif", [1, 3, 4]).min() == 1000


def test_a_glob_of_everything_below_takes_files_at_any_depth(tmp_path):
    root = tmp_path / "data"
    for index, place in enumerate(("x", "x/y", ".")):
        image, ids = pattern(index)
        save(root / "images" / place / f"{index}.png", image)
        save(root / "labels" / place / f"{index}.png", ids)
    source = {"kind": "folder", "root": str(root), "images": "images/**", "labels": "labels/**"}
    split = {"by": "group", "group": "scene", "shares": {"train": 0.5, "test": 0.5}}
    assert sorted(scenes_of(tmp_path, {"source": source, "split": split, "tile": {"size": 8}}).scene) == ["2", "x-0", "x-y-1"]


def test_long_names_are_shortened_and_stay_apart():
    one, other = (scene_name(("a" * 150, "b" * 100, tail)) for tail in "xy")
    assert one != other and len(one) < 140


# ------------------------------------------------------------------------------------------------------------ the registry

TOY = '''
import os
from crfm_core.data.archives import extract
from crfm_core.data.sources import ExpectedScenes, SceneSource
from crfm_core.data.sources.folder import pair_files
from crfm_core.data.transfers import fetch
from crfm_core.files import write_json
from crfm_core.settings import FolderSplit

class Toy(SceneSource):
    """Pictures of a toy."""

    def lacking(self):
        return [] if (self.folder / "train").is_dir() else ["train/"]

    def download(self, work, command):
        archive = fetch(self.settings.url, work / "toy.zip", command=command)
        extract(archive, work / "toy")
        write_json(self.folder / "fetched.json", {"repo": self.settings.url, "files": {"toy.zip": {"size": archive.stat().st_size}}})
        for split in self.settings.split_names():
            (work / "toy" / split).rename(self.folder / split)
        archive.unlink(), os.rmdir(work / "toy")

    def find_scenes(self, out):
        files = {split: FolderSplit(images=f"{split}/i/*.png", labels=f"{split}/l/*.png") for split in self.settings.split_names()}
        return [scene for split, one in files.items() for scene in pair_files("toy", self.folder, split, one)]

    def expected(self, split):
        return ExpectedScenes(1, 8, "one toy")
'''


class ToySource(Source):
    CAN_DOWNLOAD = True
    kind: Literal["toy"]
    root: str = "toys"
    download: bool = True
    url: str

    def split_names(self) -> list[str]:
        return ["train", "test"]


class ToyDataset(Dataset):
    source: ToySource


def test_every_kind_of_source_has_a_module_of_its_name_that_describes_it():
    union = typing.get_args(Dataset.model_fields["source"].annotation)
    kinds = {typing.get_args(one.model_fields["kind"].annotation)[0]: one for one in union}
    assert set(kinds) == {path.stem for path in Path(sources.__file__).parent.glob("*.py")} - {"__init__"}
    for kind, settings in kinds.items():
        found = open_source(SimpleNamespace(name="x", source=SimpleNamespace(kind=kind)))
        about = type(found).__doc__
        assert [word for word in ("Features", "Format", "Classes", "Splits", "Licence", "Citation") if f"{word}:" not in about] == []
        assert (type(found).download is not SceneSource.download) == settings.CAN_DOWNLOAD
        assert (type(found).submission is not SceneSource.submission) == settings.HAS_SERVER
        assert (type(found).write_labels is not SceneSource.write_labels) == settings.WRITES_LABELS


def test_a_new_kind_that_fetches_itself_is_one_module_and_one_section(server, tmp_path, monkeypatch):
    files = {}
    for number, split in enumerate(("train", "test")):
        for kind, array in zip("il", pattern(number), strict=True):
            files[f"{split}/{kind}/{split}.png"] = save(tmp_path / "made.png", array).read_bytes()
    server.files["/toy.zip"] = archive_bytes(tmp_path / "toy.zip", files)
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "toy.py").write_text(TOY)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "kinds")])
    source = {"kind": "toy", "url": f"{server.url}/toy.zip"}
    dataset = ToyDataset(name="toy", classes=["a", "b", "c"], palette=["#000000"] * 3, source=source, tile={"size": 8})
    results = tmp_path / "results"
    try:
        fetch_dataset(dataset, tmp_path, results / "source.json")
        list_scenes(dataset, tmp_path, results / "scenes.parquet", results / "source.json")
        assert open_source(dataset).expected("train").basis == "one toy"
    finally:
        sys.modules.pop("crfm_core.data.sources.toy", None)
    tiles = tile_split(results / "scenes.parquet", dataset, "train", results / "tiles" / "train.parquet")
    assert len(tiles) == 9 and np.array_equal(read_label(results / "tiles" / tiles.label[0]), pattern(0)[1][:8, :8])
    assert [path.name for path in (tmp_path / "toys").iterdir() if path.name.startswith(".")] == []
