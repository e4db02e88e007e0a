"""What is wrong with a user's data is said before it costs anything: the file or the key, the fault, where and how often, the remedy.

Each case takes a good dataset, spoils one thing, and runs the stages that a user runs: listing, tiling, comparing the splits.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from paths import SUPPORT
from PIL import Image
from rasterio.transform import Affine
from raw_datasets import (
    COLOURS,
    PLACE,
    as_palette,
    changes,
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

from crfm_core import ConfigError, CrfmError, DataError
from crfm_core.manifest import write_manifest


def colour_tif_data(root: Path) -> dict:
    """The same with labels of colours."""
    config = tif_data(root)
    for path in root.glob("*/labels/*.tif"):
        with rasterio.open(path) as source:
            ids, place = source.read(1), source.transform
        write_tif(path, COLOURS[ids], transform=place)
    return config | {"label_map": {"#3C1098": 0, "#FEDD3A": 1, "#E2A929": 2}}


def cut(path: Path, keep: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def edit(path: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change the pixels of a picture in place."""
    array = np.asarray(Image.open(path)).copy()
    save(path, array if (changed := change(array)) is None else changed)


def put(value: int, *place) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return change


def copy_scene(root: Path, source: str, target: str) -> None:
    for kind in ("images", "labels"):
        for path in (root / source.split("/")[0] / kind).glob(f"{source.split('/')[1]}.*"):
            shutil.copy(path, root / target.split("/")[0] / kind / f"{target.split('/')[1]}{path.suffix}")


def spoils(action: Callable[[Path], object]):
    """A case that changes the files alone."""

    def case(root: Path, config: dict) -> dict:
        action(root)
        return config

    return case


def jpg_data(root: Path) -> dict:
    return folder_data(root, ".jpg")


def without_georeference(root: Path) -> None:
    write_tif(root / "train" / "images" / "a.tif", pattern(0)[0], crs=None)


def turned(root: Path) -> None:
    write_tif(root / "train/images/a.tif", pattern(0)[0], transform=PLACE @ Affine.rotation(20))


BLOCKS = {"by": "blocks", "block": 12, "shares": {"train": 0.5, "test": 0.5}}

CASES = [
    # ---- files that are broken
    ("truncated PNG", folder_data, spoils(lambda r: cut(r / "train/images/a.png")), r"train/images/a\.png: not a readable raster"),
    ("truncated PNG read whole", lambda r: merged(folder_data(r), tile={"size": 24}), spoils(lambda r: cut(r / "train/images/a.png")),
     r"train/images/a\.png: not a readable raster"),
    ("truncated JPG read whole", lambda r: merged(jpg_data(r), tile={"size": 24}), spoils(lambda r: cut(r / "train/images/a.jpg", 0.9)),
     r"train/images/a\.jpg: not a readable raster"),
    ("truncated JPG", jpg_data, spoils(lambda r: cut(r / "test/images/c.jpg")), r"test/images/c\.jpg: not a readable raster"),
    ("truncated TIFF", tif_data, spoils(lambda r: cut(r / "train/images/b.tif")), r"train/images/b\.tif: not a readable raster"),
    ("truncated label", folder_data, spoils(lambda r: cut(r / "train/labels/b.png")), r"train/labels/b\.png: not a readable raster"),
    ("empty image", folder_data, spoils(lambda r: cut(r / "train/images/a.png", 0)), r"a\.png: is empty \(0 bytes\); copy or download it"),
    ("empty label", folder_data, spoils(lambda r: cut(r / "test/labels/c.png", 0)), r"labels/c\.png: is empty \(0 bytes\)"),
    ("no image", folder_data, spoils(lambda r: (r / "train/images/a.png").write_text("a")), r"images/a\.png: not a readable raster"),
    # ---- files that are missing, or too many
    ("label missing", folder_data, spoils(lambda r: (r / "train/labels/b.png").unlink()),
     r"split train: 1 of 2 images have no label matching train/labels/\*\.png \(stem of the image\): .*b\.png; add the labels, correct"),
    ("image missing", folder_data, spoils(lambda r: shutil.rmtree(r / "test/images")), r"split test: no file matches images: test/images"),
    ("root missing", folder_data, spoils(shutil.rmtree), r"data: no such folder; set source\.root of dataset own"),
    ("glob outside", folder_data, lambda r, c: merged(c, source={"splits": None, "images": "../*.png", "labels": "*"}, split=BLOCKS),
     r"the glob \.\./\*\.png leads outside .*data"),
    ("all excluded", folder_data, changes(source={"exclude": ["test/*"]}), r"split test: no file matches images"),
    ("one name twice", folder_data, lambda r, c: merged(c, source={"splits": {s: {"images": "*/images/*.png", "labels": "*/labels/*.png"}
     for s in ("train", "test")}}), r"c\.png \(split test\) is the same file as .*c\.png \(split train\)"),
    ("one name in two splits", folder_data, spoils(
        lambda r: (copy_scene(r, "train/a", "test/a"), edit(r / "test/images/a.png", put(9, 0)))),
     r"test/images/a\.png \(split test\) has the same scene name 'a' as .*train/images/a\.png \(split train\); a scene belongs to one"),
    ("two names alike", folder_data, spoils(lambda r: (copy_scene(r, "train/a", "train/x y"), copy_scene(r, "train/b", "train/x_y"))),
     r"train/images/x_y\.png \(split train\) has the same scene name 'x_y' as .*x y\.png"),
    ("copied to another split", folder_data, spoils(lambda r: copy_scene(r, "train/a", "test/d")),
     r"test/images/d\.png \(split test\) has the same content as .*a\.png \(split train\)"),
    # ---- labels
    ("sizes differ", folder_data, spoils(lambda r: edit(r / "train/labels/a.png", lambda a: a[:, :20])),
     r"labels/a\.png: 20x24 pixels, but its image .*a\.png has 24x24; resample the label"),
    ("unknown id", folder_data, spoils(lambda r: edit(r / "train/labels/a.png", put(9, slice(5, 7), 11))),
     r"a\.png: unknown label id 9 in 2 pixels, first at row 5, column 11; allowed are 0\.\.\.2 and 255\. Add it to label_map"),
    ("two unknown ids", folder_data, spoils(lambda r: edit(r / "train/labels/a.png", lambda a: (put(9, 3, 4)(a), put(77, 5)(a))[0])),
     r"unknown label id 77 in 24 pixels, first at row 5, column 0; id 9 in 1 pixels, first at row 3, column 4"),
    ("id outside the map", folder_data, changes(label_map={0: 255, 1: 0}),
     r"unknown label id 2 in \d+ pixels.*those of label_map \(0, 1\)"),
    ("unknown colour", colour_data, spoils(lambda r: edit(r / "test/labels/c.png", put([1, 2, 3], slice(8, 10), 7))),
     r"c\.png: unknown label colour #010203 in 2 pixels, first at row 8, column 7; allowed are those of label_map \(#3C1098, #E2A929"),
    ("colour off by one", colour_data, spoils(lambda r: edit(r / "train/labels/a.png", put(COLOURS[0] + 1, 0, 0))),
     r"unknown label colour #3D1199 in 1 pixels, first at row 0, column 0"),
    ("palette PNG of another colour", colour_data, spoils(lambda r: (save(r / "train/labels/a.png", pattern(0)[1]),
     as_palette(r / "train/labels/a.png", COLOURS + 1))), r"a\.png: unknown label .*colour #3D1199 in \d+ pixels"),
    ("grey label for colours", colour_data, spoils(lambda r: save(r / "train/labels/a.png", pattern(0)[1])),
     r"a\.png: 1 band without a palette, and label_map has colours; give it ids as keys"),
    ("colour label for ids", folder_data, spoils(lambda r: save(r / "train/labels/a.png", COLOURS[pattern(0)[1]])),
     r"a\.png: 3 bands, expected one band of class ids; if these are colours, give label_map keys like '#RRGGBB'"),
    ("RGBA label for ids", folder_data, spoils(lambda r: save(r / "train/labels/a.png", np.zeros((24, 24, 4), np.uint8))),
     r"a\.png: 4 bands, expected one band of class ids"),
    ("16-bit colours", colour_tif_data, spoils(lambda r: write_tif(r / "train/labels/a.tif", np.zeros((24, 24, 3), np.uint16))),
     r"a\.tif: colours of uint16, expected uint8; save it as an 8-bit picture"),
    ("16-bit label", folder_data, spoils(lambda r: save(r / "train/labels/a.png", np.full((24, 24), 300, np.uint16))),
     r"a\.png: unknown label id 300 in 576 pixels"),
    ("fractions", tif_data, spoils(lambda r: write_tif(r / "train/labels/a.tif", np.full((24, 24), 0.5, np.float32))),
     r"a\.tif: 0\.5 is no class id, first at row 0, column 0; expected whole numbers 0\.\.\.65535\. Declare it as nodata"),
    ("negative ids", tif_data, spoils(lambda r: write_tif(r / "train/labels/a.tif", np.full((24, 24), -1, np.int16))),
     r"a\.tif: -1 is no class id"),
    ("one class to train on", folder_data, spoils(lambda r: [save(p, np.full((24, 24), 1, np.uint8)) for p in r.glob("train/labels/*")]),
     r"all 18 tiles of the training split 'train' show one class, field; a segmentor learns nothing"),
    ("nothing labelled", folder_data, spoils(lambda r: save(r / "test/labels/c.png", np.full((24, 24), 255, np.uint8))),
     r"split 'test' has no tile with labelled pixels: all are nodata or ignored; check label_map"),
    ("least labelled share", folder_data, lambda r, c: merged(c, tile={"min_labelled": 1.0}) if [edit(p, put(255, slice(0, 24, 4)))
     for p in r.glob("test/labels/*")] else c, r"split 'test' has no tile with labelled pixels.*tile\.min_labelled"),
    # ---- images
    ("16-bit image", tif_data, spoils(lambda r: write_tif(r / "train/images/a.tif", pattern(0)[0].astype(np.uint16))),
     r"a\.tif: pixels are uint16, not uint8; set tile\.scale"),
    ("float image", tif_data, spoils(lambda r: write_tif(r / "train/images/a.tif", pattern(0)[0].astype(np.float32))),
     r"a\.tif: pixels are float32, not uint8; set tile\.scale"),
    ("all NaN", lambda r: merged(tif_data(r), tile={"scale": {}}), spoils(
        lambda r: write_tif(r / "train/images/a.tif", np.full((24, 24, 3), np.nan, np.float32))),
     r"a\.tif: has no valid pixel, all are nodata or not a number"),
    ("band not there", folder_data, changes(tile={"bands": [1, 2, 5]}), r"a\.png: has 3 bands and no band 5; correct tile\.bands"),
    ("smaller than a tile", folder_data, changes(tile={"size": 32}), r"a\.png: 24x24 pixels, smaller than a tile of 32; lower tile\.size"),
    # ---- places
    ("ground distance without a place", folder_data, changes(tile={"ground_distance": 1.0}),
     r"a\.png: has no coordinate system, so its ground distance is unknown; leave out tile\.ground_distance"),
    ("label in another CRS", tif_data, spoils(lambda r: write_tif(r / "train/labels/a.tif", pattern(0)[1], "EPSG:32632")),
     r"labels/a\.tif: is in another coordinate system than its image .*images/a\.tif; resample the label .* kind geotiff, which does"),
    ("label elsewhere", tif_data, spoils(lambda r: write_tif(r / "train/labels/a.tif", pattern(0)[1],
     transform=PLACE @ Affine.translation(3, 0))), r"labels/a\.tif: lies elsewhere on the ground than its image"),
    ("label of other pixels", tif_data, spoils(
        lambda r: write_tif(r / "train/labels/a.tif", pattern(0)[1], transform=PLACE @ Affine.scale(1.1))),
     r"labels/a\.tif: lies elsewhere on the ground than its image"),
    ("label raster of colours", raster_data, spoils(lambda r: write_tif(r / "labels.tif", pattern(0)[0])),
     r"labels\.tif: 3 bands, expected one"),
    ("splits overlap", tif_data, spoils(lambda r: [write_tif(r / f"test/{k}/c.tif", pattern(2)[i], transform=PLACE
     @ Affine.translation(2, 2)) for i, k in enumerate(("images", "labels"))]),
     r"tile a_0_0 and .*tile c_0_0 are overlapping on the ground; splits must not share ground"),
    ("turned grid in blocks", lambda r: merged(tif_data(r), source={"splits": None, "images": "*/images/*.tif", "labels": "*/labels/*.tif"},
     split=BLOCKS), spoils(lambda r: (turned(r), (r / "train/labels/a.tif").unlink(), write_tif(r / "train/labels/a.tif", pattern(0)[1],
     transform=PLACE @ Affine.rotation(20)))), r"scene train-a: its grid is turned or mirrored.*warp it \(gdalwarp\), or split by group"),
    ("scene without CRS", vector_data, spoils(without_georeference),
     r"a\.tif: has no coordinate system, so no label can be found .*gdal_edit"),
    ("label raster without CRS", raster_data, spoils(lambda r: write_tif(r / "labels.tif", pattern(0)[1], crs=None)),
     r"labels\.tif: has no coordinate system, so no scene can be found"),
    ("label raster elsewhere", raster_data, spoils(lambda r: write_tif(r / "labels.tif", pattern(0)[1], transform=PLACE
     @ Affine.translation(0, 999))), r"a\.tif: none of 1 label files lies on its ground"),
    ("label raster of unknown ids", raster_data, spoils(
        lambda r: write_tif(r / "labels.tif", np.full((12, 112), 8, np.uint8), transform=PLACE @ Affine.scale(2))),
     r"labels\.tif: unknown label id 8 in 1344 pixels, first at row 0, column 0"),
    # ---- polygons
    ("no attribute named", vector_data, lambda r, c: merged(c, source={"attribute": None}, label_map={0: 0}) | {"label_map": None},
     r"source\.attribute: .*ground\.gpkg holds features; name the field"),
    ("no such attribute", vector_data, changes(source={"attribute": "kind"}),
     r"source\.attribute: layer ground of .* has no field 'kind'; it has: class"),
    ("no such layer", vector_data, changes(source={"layer": "sky"}), r"source\.layer: .*ground\.gpkg has the layers ground; name one"),
    ("unknown value", vector_data, spoils(lambda r: write_polygons(r / "ground.gpkg", ["wood", "moor", "moor"])),
     r"ground\.gpkg: field class holds 'moor' in 2 features; allowed are those of label_map \(wood, field, water\)"),
    ("no value", vector_data, spoils(lambda r: write_polygons(r / "ground.gpkg", ["wood", None])),
     r"field class holds 'null' in 1 features"),
    ("points", vector_data, spoils(lambda r: (r / "ground.gpkg").unlink() or write_polygons(r / "ground.gpkg", ["wood"],
     [shapely.Point(400_001, 4_999_999)])), r"layer ground holds 1 Point, expected polygons only; buffer or remove"),
    ("broken vector file", vector_data, spoils(lambda r: cut(r / "ground.gpkg", 0.01)), r"ground\.gpkg: not a readable vector file"),
    ("polygons without CRS", vector_data, lambda r, c: write_polygons(r / "ground.shp", ["wood"], crs=None) or merged(c, source={"labels":
     "ground.shp"}), r"ground\.shp: layer ground has no coordinate system; write it into the file \(ogr2ogr"),
    ("polygons elsewhere", vector_data, spoils(lambda r: (r / "ground.gpkg").unlink() or write_polygons(r / "ground.gpkg", ["wood"],
     [shapely.box(0, 0, 9, 9)])), r"a\.tif: none of 1 label files lies on its ground"),
    ("labels missing", vector_data, changes(source={"labels": ["x/*.gpkg", "y.shp"]}), r"no file matches labels: x/\*\.gpkg, y\.shp below"),
    # ---- the released code's index
    ("line that is no JSON", released_data, spoils(lambda r: (r / "train.jsonl").write_text('{"source": 1}\n{"')),
     r'train\.jsonl, line 1: not an object with "source", "target" and "prompt"'),
    ("path outside", released_data, spoils(lambda r: (r / "test.jsonl").write_text('{"source": "../x", "target": "../y", "prompt": ""}')),
     r"test\.jsonl, line 1: path '\.\./y' leads outside"),
    ("listed file missing", released_data, spoils(lambda r: (r / "train/labels/b.png").unlink()),
     r"train\.jsonl, line 2: there is no .*b\.png"),
    ("empty index", released_data, spoils(lambda r: (r / "test.jsonl").write_text("\n")), r"test\.jsonl: lists nothing; correct source"),
    ("index missing", released_data, spoils(lambda r: (r / "test.jsonl").unlink()), r"test\.jsonl: no such file; correct source\.root"),
    # ---- the two benchmarks
    ("LoveDA numbers in both splits", loveda_data, spoils(lambda r: [(r / "Val/Urban" / k / "2.png").rename(r / "Val/Urban" / k / "0.png")
     for k in ("images_png", "masks_png")]), r"1 scene numbers occur twice, such as 0\.png; LoveDA numbers each scene once"),
    ("LoveDA without an area", loveda_data, spoils(lambda r: shutil.rmtree(r / "Val/Rural")),
     r"no file matches images: Val/Rural/images_png"),
    ("FUSU in folders of splits", fusu_data, spoils(lambda r: [shutil.move(r / d, r / "train" / d) for d in ("im1", "im1_label")
     if (r / "train").mkdir(exist_ok=True) is None]),
     r"has no im1 .* beside it; it has splits of its own: set source\.splits to \[train\]"),
    ("FUSU without splits", fusu_data, lambda r, c: merged(c, source={"splits": ["train", "test"]}) | {"split": None},
     r"has no im1 .* it has no splits: leave out source\.splits and add the section split"),
    # ---- images without labels
    ("unlabelled images missing", folder_data, changes(source={"unlabelled": ["train/images/*", "more/*.png"]}),
     r"no file matches unlabelled: more/\*\.png below .*; correct the glob or the root"),
    ("unlabelled images elsewhere", folder_data, changes(source={"unlabelled": "../*"}), r"the glob \.\./\* leads outside"),
    ("scored scene unlabelled", tif_data, changes(source={"unlabelled": "*/images/*.tif"}),
     r"c\.tif \(split unlabelled\) is the same file as .*c\.tif \(split test\); a scene belongs to one split"),
    ("unlabelled pixels of another size", tif_data, lambda r, c: write_tif(r / "more.tif", pattern(9)[0], transform=PLACE @
     Affine.translation(900, 0) @ Affine.scale(4)) and merged(c, source={"unlabelled": "more.tif"}),
     r"more\.tif: has pixels of 2 m, and those of the labelled scenes have 0\.5 m; set tile\.ground_distance"),
    # ---- splits and selections
    ("fewer groups than splits", fusu_data, changes(split={"shares": dict.fromkeys(("train", "test", "c", "d", "e"), 1.0)}),
     r"split: 4 groups or blocks for 5 splits"),
    ("no group found", fusu_data, changes(split={"group": "town-(.*)"}), r"split\.group: 'town-\(\.\*\)' finds no group in 'im1/0_7\.png'"),
    ("more tiles than there are", folder_data, changes(select={"train": {"tiles": 99}}),
     r"select\.train\.tiles: 99 tiles of 18; select fewer"),
    ("list of tiles missing", folder_data, changes(select={"train": {"ids": "none.txt"}}), r"select\.train\.ids: there is no none\.txt"),
    ("unknown tiles listed", folder_data, lambda r, c: (r / "ids.txt").write_text("a_0_0\nz_0_0\n") and merged(c, select={"train": {"ids":
     str(r / "ids.txt")}}), r"ids\.txt: 1 of 2 ids name no labelled tile, such as z_0_0; ids are like a_0_0"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "spoil", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_refused_with_its_file_or_key_and_a_remedy(tmp_path, data, spoil, message):
    config = data(tmp_path / "data")
    run(dataset_of(config), tmp_path / "good")
    config = spoil(tmp_path / "data", config)
    with pytest.raises(DataError) as caught:
        run(dataset_of(config), tmp_path / "results")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert len(list((tmp_path / "results").glob("tiles/*.parquet"))) < 2 or "overlap" in message


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (folder_data, {"label_map": {"forest": 0}}, r"label_map: 'forest' is neither an id nor a colour '#RRGGBB'"),
        (folder_data, {"label_map": {"#102030": 0, 1: 1}}, r"label_map: contains ids and colours; use one of the two"),
        (folder_data, {"label_map": {70000: 0}}, r"label_map: 70000 -> 0; raw ids are 0\.\.\.65535"),
        (folder_data, {"palette": ["#3C1098", "yellow", "#E2A929"]}, r"'yellow' is no colour; allowed: \[red, green, blue\] or '#RRGGBB'"),
        (folder_data, {"classes": ["wood", "wood", "water"]}, r"classes: 'wood' occurs twice"),
        (folder_data, {"split": BLOCKS}, r"split: a source of kind folder has splits of its own here"),
        (folder_data, {"select": {"val": {"tiles": 1}}}, r"select: 'val' is no split of the source; it has: train, test"),
        (folder_data, {"select": {"train": {"tiles": 1, "n_shot": 1}}}, r"tiles: give one of tiles, fraction, n_shot and ids"),
        (folder_data, {"held_out": "val"}, r"held_out: 'val' is no split of the source; it has: train, test"),
        (folder_data, {"held_out": "test"}, r"held_out: 'test' is trained on or scored"),
        (folder_data, {"select": {"train": {"tiles": 1}, "test": {"tiles": 1, "rest_of": "train"}}}, r"rest_of: 'test' is a split already"),
        (folder_data, {"select": {"rest": {"tiles": 1, "rest_of": "train"}}}, r"rest_of: needs a split of which `select` keeps some tiles"),
        (folder_data, {"select": {"rest": {"ids": "a.txt", "rest_of": "train"}}}, r"rest_of: a list of ids says itself"),
        (folder_data, {"tile": {"size": 8, "stride": 9}}, r"stride: 9 with tiles of 8 pixels leaves gaps; allowed: 1\.\.\.8"),
        (folder_data, {"tile": {"size": 8, "bands": [1, 2]}}, r"bands: give three bands or one \(found 2\)"),
        (folder_data, {"tile": {"size": 8, "scale": {"low": 50, "high": 50}}}, r"low: 50 must be below high: 50"),
        (vector_data, {"label_map": None}, r"label_map: give the training id of each value of the attribute class"),
        (fusu_data, {"split": None}, r"split: the source has no splits; add the section split"),
        (fusu_data, {"split": {"by": "group", "group": "(", "shares": {"train": 1, "test": 1}}}, r"group: '\(' is no regular expression"),
        (fusu_data, {"split": BLOCKS | {"block": 8, "buffer": 2}}, r"split\.block: 8 is less than a tile of 8 and a buffer of 2"),
    ],
)  # fmt: skip
def test_a_dataset_that_contradicts_itself_is_refused(tmp_path, data, changes, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        run(dataset_of(data(tmp_path / "data") | changes), tmp_path / "results")


def test_repeated_tile_ids_are_refused(tmp_path):
    run(dataset_of(folder_data(tmp_path / "data")), tmp_path / "results")
    import pandas as pd

    table = pd.read_parquet(tmp_path / "results" / "tiles" / "test.parquet")
    with pytest.raises(DataError, match="tile_id repeated: c_0_0"):
        write_manifest(tmp_path / "twice.parquet", pd.concat([table, table.iloc[:1]]))


# ------------------------------------------------------------------------------------------- what looks odd and is good


def test_names_with_spaces_accents_and_other_scripts_are_taken(tmp_path):
    config = folder_data(tmp_path / "data dir ü")
    for old, new in (("train/a", "train/Süd 1"), ("train/b", "train/图像1"), ("train/b", "train/图片1")):
        copy_scene(tmp_path / "data dir ü", old, new)
    run(dataset_of(config), tmp_path / "results")
    names = {path.name.rsplit("_", 2)[0] for path in (tmp_path / "results" / "tiles" / "train" / "images").iterdir()}
    assert {"a", "b", "Sud_1"} < names and len(names) == 5
    assert all(name.isascii() and not re.search(r"[^A-Za-z0-9._-]", name) for name in names)


@pytest.mark.parametrize("mode", ["palette", "RGBA", "16 bit", "float with nodata"])
def test_labels_in_odd_formats_give_the_same_tiles(tmp_path, mode):
    make = {"palette": colour_data, "RGBA": colour_data}.get(mode, tif_data)
    config = make(tmp_path / "data")
    run(dataset_of(config), tmp_path / "plain")
    for path in (tmp_path / "data").glob("*/labels/*"):
        if mode == "palette":
            save(path, pattern("abc".index(path.stem))[1])
            as_palette(path, COLOURS)
        elif mode == "RGBA":
            edit(path, lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
        else:
            with rasterio.open(path) as source:
                ids, place = source.read(1), source.transform
            write_tif(path, ids.astype(np.uint16 if mode == "16 bit" else np.float32), transform=place, nodata=None if "16" in mode else -1)
    run(dataset_of(config), tmp_path / "odd")
    for path in (tmp_path / "plain" / "tiles").glob("*/labels/*"):
        assert path.read_bytes() == (tmp_path / "odd" / path.relative_to(tmp_path / "plain")).read_bytes()


# ---------------------------------------------------------------------------------------------------- disks and folders

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from raw_datasets import dataset_of, run, tif_data
from crfm_core import CrfmError
try:
    run(dataset_of(tif_data(Path({data!r}))), Path("/mnt/results"))
except CrfmError as error:
    print(type(error).__name__, error)
print(sorted(str(path) for path in Path("/mnt/results").rglob("*") if path.is_file()))
"""


def in_a_small_disk(tmp_path: Path, options: str, before: str = "true") -> str:
    """What :data:`PROGRAM` says with a small file system of its own as /mnt."""
    mount = f"mount -t tmpfs -o {options} none /mnt && {before}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(SUPPORT), data=str(tmp_path / "data")))
    command = ["unshare", "-m", "sh", "-c", f"{mount} && exec {sys.executable} {program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_named_and_leaves_no_manifest(tmp_path):
    said = in_a_small_disk(tmp_path, "size=28k")
    assert re.search(
        r"ResourceError /mnt/results/tiles/train/\w+/\w+\.tif: could not be written whole \(No space left on device\); free", said
    )
    assert "train.parquet" not in said.splitlines()[-1] and ".tif.' " not in said


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_mosaic_that_the_disk_does_not_take_is_named(tmp_path, suffix):
    run(dataset_of(tif_data(tmp_path / "data")), tmp_path / "results")
    program = f"""
import resource, signal
from crfm_core.data.tiling import mosaic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))  # as a full disk: what is beyond is not written
mosaic("results/tiles/train.parquet", "results", "a", "image", "a{suffix}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and f"ResourceError: a{suffix}: could not be written whole" in done.stderr
    assert not list(tmp_path.glob("*a.*"))


def test_a_read_only_folder_is_named(tmp_path):
    said = in_a_small_disk(tmp_path, "size=1m", "mkdir /mnt/results && mount -o remount,ro /mnt")
    assert re.search(r"ResourceError /mnt/results\S*: may not be written \(Read-only file system\); set `results` to a folder", said)


def test_all_errors_of_this_file_are_the_packages_own():
    assert issubclass(DataError, CrfmError) and len(CASES) >= 40
