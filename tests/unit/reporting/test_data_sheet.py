"""The data sheet counts right, says what stands out and nothing else, shows the pixels it has, and names what is missing."""

from __future__ import annotations

import csv
import json
import re
import time
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import rasterio
from data_sheets import CLASSES, EVIL, PALETTE, build, dataset_of, label_of, row_of, write_scene_manifest
from PIL import Image

from crfm_core import DataError
from crfm_core.data.rasters import IGNORE, IGNORED, write_raster
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.reporting import composition
from crfm_core.reporting.data_figures import ContactTile, Ground, SceneView, contact_sheet, ground_map, overlay, scene_map, views_of
from crfm_core.reporting.data_sheet import choose_scenes, draw_data_sheet, read_data_sheet, thumbnail
from crfm_core.reporting.figures import choose_tiles

UTM = "EPSG:32631"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    arguments = build(tmp_path_factory.mktemp("sheet"), crs=UTM)
    return arguments, draw_data_sheet(**arguments)


def test_the_numbers_of_csv_and_json_equal_a_hand_count(drawn):
    with (drawn[0]["out"] / "class_shares.csv").open() as file:
        rows = [{**row, "share_of_labelled": float(row["share_of_labelled"])} for row in csv.DictReader(file)]
    # train: t0 has 32 soil and 32 water, t1 56 soil and 8 ignored; test: 32 wood, 16 water, 16 ignored
    counts = [("train", "soil", 88, 88 / 120, 2), ("train", "water", 32, 32 / 120, 1), ("train", EVIL, 0, 0, 0)]
    counts += [("test", "soil", 0, 0, 0), ("test", "water", 16, 16 / 48, 1), ("test", EVIL, 32, 32 / 48, 1)]
    names = ("split", "class", "pixels", "share_of_labelled", "tiles")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (split, name, str(pixels), pytest.approx(share), str(tiles)) for split, name, pixels, share, tiles in counts
    ]
    found = json.loads((drawn[0]["out"] / "data_sheet.json").read_text())["splits"]
    assert [found[split]["pixels"] for split in ("train", "test")] == [[88, 32, 0], [0, 16, 32]]
    train, test = found["train"], found["test"]
    assert (train["tiles"], train["scenes"], train["labelled"], test["labelled"]) == (2, 1, 120 / 128, 48 / 64)
    # Scene a reaches 12 pixels: two tiles of 8 columns share 4 of them.
    assert (train["covered"], train["repeated"]) == (1, 0.25) and (test["covered"], test["repeated"]) == (1, 0)
    assert train["ground_distance"] == pytest.approx([0.5, 0.5])


def test_what_was_written_is_what_is_read(drawn):
    assert read_data_sheet(drawn[0]["out"]) == drawn[1]


def test_scenes_without_labels_are_counted_and_placed_and_no_part_of_the_classes(tmp_path):
    plain, arguments = build(tmp_path / "plain", crs=UTM), build(tmp_path, crs=UTM)
    rows = [row_of("unlabelled", "w0", "unlabelled-c", 0, 0, label_of("0000 0000 0000 0000"), UTM, [0.5, 0, 6e5, 0, -0.5, 5e6])]
    rows[0] |= {"label": "", "classes": [], "pixels": [0, 0, 0]}
    scenes = [{"scene": name, "split": split, "image": f"scenes/{name}.png"} for name, split in (("a", "train"), ("b", "test"))]
    scenes.append({"scene": "unlabelled-c", "split": "unlabelled", "image": "scenes/b.png", "label": ""})
    write_scene_manifest(arguments["scenes"], scenes)
    sheet = draw_data_sheet(**arguments)
    assert (sheet.unlabelled.scenes, sheet.unlabelled.tiles) == (1, None)
    assert "Without labels: 1 scene, which nothing here uses." in (arguments["out"] / "index.html").read_text()
    manifest = arguments["root"] / "tiles" / "unlabelled.parquet"
    write_manifest(manifest, rows)
    sheet = draw_data_sheet(**arguments | {"tiles": arguments["tiles"] | {"unlabelled": manifest}})
    assert (sheet.unlabelled.scenes, sheet.unlabelled.tiles) == (1, 1) and list(sheet.splits) == ["train", "test"]
    assert "Without labels: 1 scene, cut into 1 tile." in (arguments["out"] / "index.html").read_text()
    assert "4 tiles" in sheet.of_kind("ground").alt and "unlabelled-c" in sheet.of_kind("scenes").alt
    before = draw_data_sheet(**plain)
    assert before.unlabelled is None and before.splits == sheet.splits and before.distances == sheet.distances
    assert "unlabelled" not in json.loads((plain["out"] / "data_sheet.json").read_text())


def table_of(boxes, scene="a", **columns):
    """A manifest of tiles that show one class, without files, from (row, col, height, width)."""
    rows = [row_of("train", f"t{index}", scene, 0, 0, np.zeros((8, 8), np.uint8)) for index in range(len(boxes))]
    table = pd.DataFrame(rows).assign(**columns)
    table[["row", "col", "height", "width"]] = boxes
    table["pixels"] = [[int(height * width), 0, 0] for _, _, height, width in boxes]
    return table


def test_covered_ground_and_overlaps_equal_those_of_a_painted_scene():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.integers(0, 40, (12, 2)), rng.integers(1, 30, (12, 2))], axis=1)
    times = np.zeros((50, 60), int)
    for row, col, height, width in boxes:
        times[row : row + height, col : col + width] += 1  # what lies beyond the scene is padding
    table = table_of(boxes, scene_height=50, scene_width=60)
    numbers = composition.count_split(table, composition.scene_sizes([table]))
    assert numbers.covered == pytest.approx((times > 0).mean())
    assert numbers.repeated == pytest.approx(1 - (times > 0).sum() / times.sum())


@pytest.mark.parametrize(
    ("crs", "transform", "metres"),
    [
        (UTM, [0.3, 0, 5e5, 0, -0.3, 5e6], 0.3),
        (UTM, [0.3, 0.4, 5e5, 0.4, -0.3, 5e6], 0.5),  # turned
        ("EPSG:2263", [1, 0, 1e6, 0, -1, 2e5], 0.3048),  # feet
        ("EPSG:4326", [2e-5, 0, 8, 0, -1e-5, 60], 1.11),  # degrees: twice as many across at 60 degrees north
    ],
)
def test_ground_distances_are_metres_whatever_the_units(crs, transform, metres):
    table = table_of([(0, 0, 8, 8)], crs=crs)
    table["transform"] = [transform]
    assert composition.ground_distances(table) == pytest.approx([metres], rel=0.01)


def test_tiles_without_a_georeference_have_no_ground_distance(tmp_path):
    sheet = draw_data_sheet(**build(tmp_path))
    assert sheet.splits["train"].ground_distance is None and sheet.of_kind("ground") is None
    page = (tmp_path / "results" / "d" / "data_sheet" / "index.html").read_text()
    assert "metres per pixel" not in page and not list((tmp_path / "results" / "d" / "data_sheet").glob("ground*"))


def notes_of(train, test, val=None, area=2000, classes=("soil", "water", "wood")):
    """Notes on splits given as counts per tile."""
    splits = {}
    for name, counts in (("train", train), ("test", test), ("val", val)):
        if counts:
            table = table_of([(0, 0, 1, area)] * len(counts))
            table["pixels"] = counts
            splits[name] = composition.count_split(table, composition.scene_sizes([table]))
    return composition.notes_on(splits, composition.compare(splits, classes), classes, "train", "test")


EVEN = [[500, 500, 1000]]


@pytest.mark.parametrize(
    ("splits", "kinds", "words"),
    [
        ({"train": EVEN, "test": EVEN}, [], ""),
        (
            {"train": [[900, 0, 1100]], "test": [[900, 100, 1000]]},
            ["missing"],
            "Classes without a pixel in train: water; nothing can learn",
        ),
        ({"train": [[1000, 500, 500]], "test": [[1000, 1000, 0]]}, ["missing", "unlike"], "Classes without a pixel in test: wood; scores"),
        (
            {"train": [[1900, 0, 0]], "test": [[1990, 0, 0]]},
            ["missing", "missing"],
            "Classes without a pixel in test: water and wood; scores",
        ),
        ({"train": EVEN, "test": EVEN, "val": [[600, 0, 1000]]}, ["unlike"], "test and val are of"),
        ({"train": [[999, 1, 1000]], "test": [[997, 3, 1000]]}, ["rare"], "water is rare: 0.05 % of train (1 tile) of what is labelled"),
        ({"train": [[998, 2, 1000]], "test": [[998, 2, 1000]]}, [], ""),  # a thousandth
        ({"train": [[800, 200, 1000]], "test": [[400, 600, 1000]]}, [], ""),  # 0.2 apart
        (
            {"train": [[800, 200, 1000]], "test": [[390, 610, 1000]]},
            ["unlike"],
            "20.5 % of the labelled pixels would have to be of another",
        ),
        ({"train": [[800, 200, 1000]], "test": [[390, 610, 1000]]}, ["unlike"], "Most of it is soil: 40.0 % of train, 19.5 % of test."),
        ({"train": [*EVEN, [50, 50, 100]], "test": EVEN}, [], ""),  # a tenth labelled
        ({"train": [*EVEN, [50, 49, 100]], "test": EVEN}, ["sparse"], "1 of 2 tiles of train: less than 10 % of the pixels are labelled."),
    ],
)
def test_what_stands_out_is_said_and_nothing_else(splits, kinds, words):
    notes = notes_of(**splits)
    if splits.get("val"):
        notes = [note for note in notes if "train and val" not in note.text]
    assert sorted(note.kind for note in notes) == sorted(kinds)
    assert words in " ".join(note.text for note in notes)


def test_scenes_without_tiles_and_pictures_shown_twice_are_told(tmp_path):
    arguments = build(tmp_path)
    listed = pd.read_parquet(arguments["scenes"])
    more = [{"scene": name, "split": split, "image": "scenes/none.png"} for name, split in (("lost", "test"), ("of-no-matter", "val"))]
    write_scene_manifest(arguments["scenes"], [*listed.to_dict("records"), *more])
    train = read_manifest(arguments["tiles"]["train"]).assign(image_digest=["same", "same"])
    write_manifest(arguments["tiles"]["train"], train)
    notes = {note.kind: note.text for note in draw_data_sheet(**arguments).notes}
    assert notes["no tile"] == "Scenes without a tile, because labels are missing or the selection left them out: lost."
    assert notes["same picture"] == "Tiles of train with the same pixels as another tile of it: t1."


def test_a_sheet_without_notes_says_what_was_looked_for(tmp_path):
    even = "0011 0011 2211 2222"
    arguments = build(tmp_path, {"train": [("t", "a", 0, 0, even)], "test": [("u", "b", 0, 0, even)]})
    assert draw_data_sheet(**arguments).notes == []
    assert "Nothing stands out" in (arguments["out"] / "index.html").read_text()


def test_the_page_escapes_names_needs_nothing_beside_it_and_has_words_for_its_pictures(drawn):
    page = (drawn[0]["out"] / "index.html").read_text()
    assert EVIL not in page and "&lt;b&gt;wood&lt;/b&gt;" in page and "<i>counted" not in page
    targets = re.findall(r"(?:src|srcset|href|action|data)\s*=\s*[\"']?([^\"'>\s]*)", page)
    assert targets and all(target.startswith(("data:image/", "#")) for target in targets)
    assert "<script" not in page.lower() and "<link" not in page.lower() and page.startswith("<!DOCTYPE html>")
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(alts) == page.count("<img ") == 5 and all(len(alt) > 20 for alt in alts)
    assert "not stated in the dataset" in page and '<td class="n first"><span class="none">none</span>' in page


def test_the_licence_is_told(tmp_path):
    arguments = build(tmp_path)
    draw_data_sheet(**arguments | {"dataset": dataset_of(licence="CC BY 4.0 <mine>")})
    assert "CC BY 4.0 &lt;mine&gt;" in (arguments["out"] / "index.html").read_text()


def test_every_picture_of_the_sheet_lies_in_its_folder(drawn):
    arguments, sheet = drawn
    files = {name for picture in sheet.pictures for name in picture.files}
    assert files | {"index.html", "data_sheet.json", "class_shares.csv"} == {path.name for path in arguments["out"].iterdir()}
    assert {picture.kind for picture in sheet.pictures} == {"contact", "shares", "scenes", "ground"}
    assert sheet.of_kind("contact", "test").files == ["contact-test.png", "contact-test.svg"]


def test_an_overlay_mixes_within_a_class_and_rims_it():
    label = np.zeros((12, 20), np.uint8)
    label[:, 6:12], label[:, 12:] = 1, IGNORE
    mixed = overlay(np.full((12, 20, 3), 100, np.uint8), label, PALETTE)
    assert mixed[5, 2].tolist() == [round(55 + 0.45 * value) for value in PALETTE[0]]
    assert mixed[5, 8].tolist() == [round(55 + 0.45 * value) for value in PALETTE[1]]
    assert mixed[5, 5].tolist() == list(PALETTE[0]) and mixed[5, 6].tolist() == mixed[5, 11].tolist() == list(PALETTE[1])
    assert mixed[5, 12].tolist() == list(IGNORED) and mixed[5, 15].tolist() == [round(55 + 0.45 * value) for value in IGNORED]


def test_a_small_tile_is_shown_with_hard_pixels():
    rng = np.random.default_rng(0)
    tile = ContactTile("t", rng.integers(0, 256, (8, 8, 3), np.uint8), rng.integers(0, 3, (8, 8), np.uint8))
    image, mask, laid_over = views_of(tile, PALETTE)
    assert (image == tile.image.repeat(32, axis=0).repeat(32, axis=1)).all()
    assert (mask == np.array(PALETTE, np.uint8)[tile.label].repeat(32, axis=0).repeat(32, axis=1)).all()
    middle = [round(0.55 * int(a) + 0.45 * b) for a, b in zip(tile.image[3, 4], PALETTE[tile.label[3, 4]], strict=True)]
    assert laid_over[3 * 32 + 16, 4 * 32 + 16] == pytest.approx(middle, abs=1)


def test_a_large_tile_is_averaged_down_and_its_mask_is_not():
    board = ((np.indices((1024, 1024)).sum(axis=0) % 2) * 200).astype(np.uint8)
    label = np.full((1024, 1024), 1, np.uint8)
    label[:512] = IGNORE
    image, mask, _ = views_of(ContactTile("large", np.repeat(board[..., None], 3, axis=2), label), PALETTE)
    assert image.shape == (256, 256, 3) and (image == 100).all()
    assert (mask[:128] == IGNORED).all() and (mask[128:] == PALETTE[1]).all()


def test_a_contact_sheet_names_each_tile_and_what_covers_it(tmp_path):
    tiles = [ContactTile(f"t{index}", np.zeros((8, 8, 3), np.uint8), np.full((8, 8), index, np.uint8)) for index in range(3)]
    tiles[0].label[:2] = IGNORE
    contact_sheet(tiles, CLASSES, PALETTE, tmp_path, "sheet")
    drawn = (tmp_path / "sheet.svg").read_text()
    named = ["t0", "t1", "t2", "ignored 25.0 %, soil 75.0 %", "water 100.0 %", "overlay"]
    assert all(f"<!-- {text} -->" in drawn.replace("\u00a0", " ") for text in named)


def test_tiles_of_the_sheet_do_not_overlap_while_others_are_left_and_come_from_all_scenes():
    table = pd.concat([table_of([(0, 4 * index, 8, 8) for index in range(4)], scene=scene) for scene in "ab"], ignore_index=True)
    table["tile_id"] = [f"t{index}" for index in range(8)]
    chosen = table.iloc[choose_tiles(table, 4)]
    assert sorted(zip(chosen.scene, chosen.col, strict=True)) == [("a", 0), ("a", 8), ("b", 0), ("b", 8)]
    assert list(chosen.scene[:2]) == ["a", "b"]
    assert sorted(choose_tiles(table, 20)) == list(range(8))


@pytest.mark.parametrize(
    ("splits", "most", "expected"),
    [
        ([["a", "b"], ["c"]], 12, ["a", "b", "c"]),
        ([[f"s{i}" for i in range(12)], ["t0", "t1"]], 4, ["s0", "s11", "t0", "t1"]),
        ([[f"s{i}" for i in range(12)], ["t0"]], 4, ["s0", "s6", "s11", "t0"]),
        ([["a", "b", "c"], ["a", "b", "c"]], 2, ["a", "c"]),  # splits of blocks share their scenes
        ([["s10", "s9"], []], 12, ["s9", "s10"]),
    ],
)
def test_scenes_are_chosen_evenly(splits, most, expected):
    assert choose_scenes(splits, most) == expected


def test_ground_in_no_tile_is_grey_and_ground_in_tiles_has_its_colour(tmp_path):
    picture = np.full((40, 80, 3), (200, 20, 20), np.uint8)
    scene_map([SceneView("s", picture, 80, 40, {"train": np.array([[0, 0, 40, 40]])})], ["train"], tmp_path, "map")
    drawn = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    body = drawn[drawn.shape[0] // 2 :]
    left, right = body[:, : body.shape[1] // 2], body[:, body.shape[1] // 2 :]
    assert ((left[..., 0] - left[..., 1]) > 120).mean() > 0.85
    assert ((np.ptp(right, axis=2) < 3) & (right[..., 0] > 180)).mean() > 0.95


def write_bands(path, bands, **more):
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype, "crs": UTM}
    with rasterio.open(path, "w", transform=rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6), **profile | more) as target:
        target.write(bands)


RAMP = np.linspace(0, 1, 64 * 48).reshape(64, 48)


@pytest.mark.parametrize(
    ("bands", "more"),
    [
        (np.stack([RAMP] * 4) * 9000 + 200, {"dtype": "uint16"}),
        (RAMP[None] * 3e-3, {"dtype": "float32"}),
        (RAMP[None] * 60_000 - 30_000, {"dtype": "int16"}),
        (np.stack([RAMP, RAMP]) * 255, {"dtype": "uint8"}),
    ],
)
def test_scenes_of_any_depth_and_number_of_bands_are_shown(tmp_path, bands, more):
    write_bands(tmp_path / "scene.tif", bands.astype(more["dtype"]), **more)
    picture = thumbnail(tmp_path / "scene.tif", 32)
    assert picture.shape == (32, 24, 3) and picture.dtype == np.uint8
    assert picture[0].max() < 20 and picture[-1].min() > 235


def test_pixels_without_a_value_are_white_and_do_not_stretch_the_rest(tmp_path):
    bands = (RAMP[None] * 100).astype(np.float32)
    bands[0, :32], bands[0, 32] = np.nan, -9999
    write_bands(tmp_path / "scene.tif", bands, nodata=-9999)
    picture = thumbnail(tmp_path / "scene.tif", 64)
    assert (picture[:33] == 255).all() and picture[33].max() < 20 and picture[-2].min() > 235


def test_a_scene_is_shown_with_the_bands_and_limits_its_tiles_have(tmp_path):
    bands = np.stack([np.full((8, 8), value, np.uint16) for value in (100, 200, 300, 400)])
    write_bands(tmp_path / "scene.tif", bands)
    picture = thumbnail(tmp_path / "scene.tif", 8, [4, 1, 2], ([0, 0, 0], [1000, 1000, 400]))
    assert picture[0, 0].tolist() == [102, 26, 128]
    with pytest.raises(DataError, match=r"scene\.tif: has 4 bands and no band 5; correct tile\.bands"):
        thumbnail(tmp_path / "scene.tif", 8, [5, 1, 2])


def test_the_limits_come_from_the_scene_manifest(tmp_path, monkeypatch):
    from crfm_core.reporting import data_sheet

    seen = []
    monkeypatch.setattr(data_sheet, "thumbnail", lambda *given: seen.append(given) or thumbnail(*given))
    draw_data_sheet(**build(tmp_path, low=[0.0] * 3, high=[100.0] * 3))
    assert len(seen) == 2 and all([list(limit) for limit in given[3]] == [[0] * 3, [100] * 3] for given in seen)


def test_a_large_scene_is_never_read_whole(tmp_path):
    profile = {"driver": "GTiff", "count": 3, "height": 20_000, "width": 20_000, "dtype": "uint8", "crs": UTM, "tiled": True}
    transform = rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)
    with rasterio.open(tmp_path / "large.tif", "w", sparse_ok=True, transform=transform, **profile) as target:
        target.write(np.full((3, 256, 256), 77, np.uint8), window=rasterio.windows.Window(0, 0, 256, 256))
    tracemalloc.start()
    picture = thumbnail(tmp_path / "large.tif", 400)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert picture.shape == (400, 400, 3) and picture[0, 0].tolist() == [77] * 3 and peak < 60e6


def test_a_hundred_thousand_footprints_are_drawn_in_seconds_and_as_a_picture(tmp_path):
    places = np.stack(np.meshgrid(np.arange(400), np.arange(250)), -1).reshape(-1, 1, 2) * 32.0
    quads = places + np.array([[0, 0], [32, 0], [32, 32], [0, 32]]) + [5e5, 5e6]
    ground = Ground("UTM", ("easting", "northing"), (1.0, 1.0), {"train": quads[::2], "test": quads[1::2]})
    begin = time.process_time()
    ground_map([ground], ["train", "test"], tmp_path, "map")
    assert time.process_time() - begin < 20
    assert (tmp_path / "map.svg").stat().st_size < 2e6


@pytest.mark.parametrize(
    ("metres", "side", "bar"),
    [((1.0, 1.0), 100, "50 m"), ((1.0, 1.0), 20_000, "10 km"), ((0.3048, 0.3048), 1000, "100 m"), (None, 100, None)],
)
def test_a_map_of_the_ground_has_a_scale_bar_where_units_are_known(tmp_path, metres, side, bar):
    square = side * np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) + np.array([5e5, 5e6])
    ground_map([Ground("UTM", ("x", "y"), metres, {"train": square[None]})], ["train"], tmp_path, "map")
    bars = re.findall(r"<!-- (\d+ k?m) -->", (tmp_path / "map.svg").read_text())
    assert bars == ([bar] if bar else [])


def change(column, values):
    """Overwrite a column of the training manifest."""

    def damage(arguments):
        path = arguments["tiles"]["train"]
        table = read_manifest(path)
        table[column] = values
        table.to_parquet(path)

    return damage


def without_scene(arguments):
    write_scene_manifest(arguments["scenes"], [{"scene": "b", "image": "scenes/b.png"}])


def twice(arguments):
    write_scene_manifest(arguments["scenes"], [{"scene": name, "image": "scenes/b.png"} for name in "abb"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda given: given["tiles"]["train"].unlink(), r"train\.parquet: no such manifest"),
        (lambda given: given["tiles"]["test"].write_bytes(b"PAR1"), r"test\.parquet: not a readable parquet file"),
        (lambda given: given["scenes"].unlink(), r"scenes\.parquet: no such manifest"),
        (lambda given: (given["root"] / "scenes" / "b.png").unlink(), r"scenes/b\.png: no such file"),
        (lambda given: (given["root"] / "scenes" / "b.png").write_bytes(b"no picture"), r"scenes/b\.png: not a readable raster"),
        (lambda given: (given["root"] / "tiles/test/images/u0.png").unlink(), r"row u0: its image \S+images/u0\.png is not there"),
        (lambda given: write_raster(given["root"] / "tiles/test/labels/u0.png", np.zeros((4, 4), np.uint8)), r"u0\.png: 4x4 pixels"),
        (change("pixels", [[1, 2, 3], [1, 2]]), r"train\.parquet: row t1: counts 2 classes, the dataset has 3"),
        (change("pixels", [[60, 5, 0], [1, 2, 3]]), r"train\.parquet: row t0: counts 65 pixels of 64"),
        (change("image", ["../../../x.png", "x.png"]), r"train\.parquet: row t0: path .* leads outside"),
        (without_scene, r"train\.parquet: scene 'a' is not in .*scenes\.parquet"),
        (twice, r"scenes\.parquet: scene 'b' is listed twice"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_nothing_is_left_half_done(tmp_path, damage, words):
    arguments = build(tmp_path)
    damage(arguments)
    with pytest.raises(DataError, match=words):
        draw_data_sheet(**arguments)
    assert not arguments["out"].exists() and not list(arguments["root"].glob(".data_sheet*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda found: found.pop("notes"), "notes: Field required; delete the folder"),
        (lambda found: found["splits"]["train"].update(tiles="many"), r"splits\.train\.tiles: .*; delete the folder"),
    ],
)
def test_a_damaged_sheet_is_named(drawn, tmp_path, damage, words):
    found = json.loads((drawn[0]["out"] / "data_sheet.json").read_text())
    damage(found)
    (tmp_path / "data_sheet.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=rf"data_sheet\.json: {words}"):
        read_data_sheet(tmp_path)
    with pytest.raises(DataError, match=r"nowhere/data_sheet\.json: no such file"):
        read_data_sheet(tmp_path / "nowhere")
