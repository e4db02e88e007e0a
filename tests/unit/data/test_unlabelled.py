"""Scenes without labels: listed, checked against the labelled ones, cut into tiles that have an image and no label."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rasterio.transform import Affine
from raw_datasets import (
    PLACE,
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
    write_tif,
)

from crfm_core import DataError
from crfm_core.data.rasters import read_rgb
from crfm_core.data.scenes import list_scenes, read_scenes
from crfm_core.data.sources import open_source
from crfm_core.data.splits import check_disjoint
from crfm_core.data.tiling import mosaic, read_mask, tile_scene, tile_split
from crfm_core.manifest import check_paths, read_manifest, read_table
from crfm_core.settings import UNLABELLED, Dataset

EMBEDDED = {"name": "world", "classes": list("abcdefg"), "palette": [[0, 0, 0]] * 7, "tile": {"size": 64}}


def with_unlabelled(config: dict, **changes) -> Dataset:
    return dataset_of(merged(merged(config, source={"unlabelled": "more/*"}), **changes))


def tile(dataset: Dataset, folder: Path, *splits: str) -> list[Path]:
    """Manifests of the splits."""
    list_scenes(dataset, folder, folder / "results" / "scenes.parquet")
    manifests = [folder / "results" / "tiles" / f"{split}.parquet" for split in splits]
    for manifest in manifests:
        tile_split(folder / "results" / "scenes.parquet", dataset, manifest.stem, manifest)
    return manifests


def beside(folder: Path, index: float = 7, side: float = 1.0, name: str = "d") -> Path:
    """One more georeferenced scene, ``index`` places east of the first one of :func:`tif_data`."""
    place = PLACE @ Affine.translation(100 * index, 0) @ Affine.scale(side)
    return write_tif(folder / "more" / f"{name}.tif", pattern(int(10 * index))[0], transform=place)


@pytest.mark.parametrize("data", [folder_data, tif_data, vector_data, raster_data, released_data, loveda_data, fusu_data])
def test_every_source_takes_images_without_labels(tmp_path, data):
    config = data(tmp_path)
    save(tmp_path / "more" / "d.png", pattern(7)[0])
    dataset = with_unlabelled(config)
    assert dataset.has_unlabelled and UNLABELLED not in dataset.splits
    run(dataset, tmp_path / "results")
    scenes = read_scenes(tmp_path / "results" / "scenes.parquet")
    (row,) = scenes[scenes.split == UNLABELLED].itertuples()
    assert (row.scene, row.label, Path(row.image).name) == ("unlabelled-d", "", "d.png")
    assert scenes.label[scenes.split != UNLABELLED].all()
    manifest = tmp_path / "results" / "tiles" / "unlabelled.parquet"
    table = tile_split(tmp_path / "results" / "scenes.parquet", dataset, UNLABELLED, manifest)
    assert len(table) == 9 and set(table.label) == {""} and set(table.split) == {UNLABELLED}
    assert not any(map(len, table.classes)) and all(list(pixels) == [0, 0, 0] for pixels in table.pixels)
    assert table.digest.is_unique and not (manifest.with_suffix("") / "labels").exists()


def test_labelled_scenes_and_tiles_are_what_they_are_without_unlabelled_ones(tmp_path):
    config = tif_data(tmp_path)
    beside(tmp_path)
    run(dataset_of(config), tmp_path / "one")
    run(with_unlabelled(config), tmp_path / "other")
    ours, theirs = (read_scenes(tmp_path / name / "scenes.parquet") for name in ("one", "other"))
    assert theirs[theirs.split != UNLABELLED].scene.tolist() == ours.scene.tolist()
    for split in ("train", "test"):
        first, second = (read_manifest(tmp_path / name / "tiles" / f"{split}.parquet") for name in ("one", "other"))
        assert first.digest.tolist() == second.digest.tolist() and first.tile_id.tolist() == second.tile_id.tolist()


def test_the_embedded_source_draws_as_many_scenes_without_label_files(tmp_path):
    source = {"kind": "embedded", "scenes": {"train": 1, "test": 1}, "size": 64}
    dataset = Dataset(**EMBEDDED, source=source | {"unlabelled": 2})
    manifests = tile(dataset, tmp_path, "train", "test", UNLABELLED)
    table = read_manifest(manifests[-1], labelled=False)
    assert table.scene.tolist() == ["unlabelled-000", "unlabelled-001"]
    assert table.image_digest.nunique() == 2 and table.crs.all()
    drawn = tmp_path / "results" / "scenes" / UNLABELLED
    assert sorted(path.name for path in drawn.iterdir()) == ["unlabelled-000.tif", "unlabelled-001.tif"]
    assert open_source(dataset).expected_unlabelled().count == 2
    check_disjoint(manifests, "train")
    (tmp_path / "plain").mkdir()
    (plain,) = tile(Dataset(**EMBEDDED, source=source), tmp_path / "plain", "train")
    assert read_manifest(plain).digest.tolist() == read_manifest(manifests[0]).digest.tolist()


def test_a_tile_without_label_keeps_its_place_and_its_scene_can_be_put_together(tmp_path):
    dataset = with_unlabelled(tif_data(tmp_path))
    beside(tmp_path)
    (manifest,) = tile(dataset, tmp_path, UNLABELLED)
    table = read_manifest(manifest, labelled=False)
    assert set(table.crs) and table["transform"][0][2] == 400_000 + 0.5 * 700
    mosaic(manifest, tmp_path / "results", "unlabelled-d", "image", tmp_path / "whole.tif")
    assert (read_rgb(tmp_path / "whole.tif") == pattern(70)[0]).all()
    with pytest.raises(DataError, match="its tiles have no labels; join their images"):
        mosaic(manifest, tmp_path / "results", "unlabelled-d", "label", tmp_path / "none.tif")


def test_only_tiles_that_are_wholly_nodata_are_left_out(tmp_path):
    image = pattern(3)[0] // 2 + 1
    image[:8, :8], image[8:16, 8:15] = 0, 0
    write_tif(tmp_path / "a.tif", image, nodata=0)
    rows = tile_scene(tmp_path / "a.tif", None, tmp_path / "tiles", 8, min_labelled=0.9)
    assert [row["tile_id"] for row in rows] == [f"a_{row}_{col}" for row in (0, 8, 16) for col in (0, 8, 16) if row + col]
    assert {row["tile_id"]: row["nodata"] for row in rows if row["nodata"]} == {"a_8_8": 8 * 7}
    write_tif(tmp_path / "more" / "empty.tif", np.zeros((24, 24, 3), np.uint8), nodata=0)
    with pytest.raises(DataError, match="the scenes without labels have no tile: all are nodata"):
        tile(with_unlabelled(tif_data(tmp_path)), tmp_path, UNLABELLED)


@pytest.mark.parametrize(("selection", "count"), [({"tiles": 4}, 4), ({"fraction": 0.5}, 9)])
def test_a_selection_draws_tiles_by_its_seed(tmp_path, selection, count):
    config = folder_data(tmp_path)
    for index in (7, 8):
        save(tmp_path / "more" / f"{index}.png", pattern(index)[0])
    kept = []
    for seed in (0, 1):
        (manifest,) = tile(with_unlabelled(config, select={UNLABELLED: selection | {"seed": seed}}), tmp_path, UNLABELLED)
        kept.append(read_manifest(manifest, labelled=False).tile_id.tolist())
        assert len(kept[-1]) == count and manifest.with_suffix(".ids.txt").read_text().split() == kept[-1]
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    "split",
    [
        {"by": "group", "group": "scene", "shares": {"train": 0.5, "test": 0.5}},
        {"by": "blocks", "block": 12, "shares": {"train": 0.5, "test": 0.5}},
    ],
)
def test_splits_are_made_of_labelled_scenes_alone(tmp_path, split):
    tif_data(tmp_path)
    beside(tmp_path)
    source = {"kind": "folder", "root": str(tmp_path), "images": "t*/images/*.tif", "labels": "t*/labels/*.tif"}
    config = {"source": source, "split": split, "tile": {"size": 8}}
    run(dataset_of(config), tmp_path / "plain")
    dataset = with_unlabelled(config)
    manifests = tile(dataset, tmp_path, "train", "test", UNLABELLED)
    check_disjoint(manifests, "train")
    for manifest in manifests[:2]:
        plain = read_manifest(tmp_path / "plain" / "tiles" / manifest.name)
        assert read_manifest(manifest).digest.tolist() == plain.digest.tolist()
    assert set(read_manifest(manifests[2], labelled=False).scene) == {"unlabelled-d"}


def test_an_image_that_two_globs_match_is_one_scene_and_labels_are_none(tmp_path):
    config = merged(tif_data(tmp_path), source={"unlabelled": ["train/*/*.tif", "train/images/*.tif"]})
    list_scenes(dataset_of(config), tmp_path, tmp_path / "scenes.parquet")
    scenes = read_scenes(tmp_path / "scenes.parquet", UNLABELLED)
    assert scenes.scene.tolist() == ["unlabelled-images-a", "unlabelled-images-b"]


def test_a_scene_of_the_training_split_may_be_listed_without_label_too(tmp_path):
    dataset = with_unlabelled(tif_data(tmp_path), source={"unlabelled": "train/images/*.tif"})
    manifests = tile(dataset, tmp_path, "train", "test", UNLABELLED)
    check_disjoint(manifests, "train")
    ids = [tile_id for path in manifests for tile_id in read_manifest(path, labelled=False).tile_id]
    assert len(ids) == len(set(ids))
    with pytest.raises(DataError, match="identical images"):
        check_disjoint(manifests, "test")


def test_ground_of_a_split_that_is_scored_is_refused(tmp_path):
    dataset = with_unlabelled(tif_data(tmp_path))
    beside(tmp_path, index=2.1)
    manifests = tile(dataset, tmp_path, "train", "test", UNLABELLED)
    with pytest.raises(DataError, match=r"test\.parquet: tile c_0_8 and .*unlabelled-d_0_0 are overlapping on the ground"):
        check_disjoint(manifests, "train")


def _same_file(root: Path) -> None:
    (root / "more").mkdir()
    (root / "more" / "d.tif").symlink_to(root / "test/images/c.tif")


def _same_content(root: Path) -> None:
    (root / "more").mkdir()
    shutil.copy(root / "test/images/c.tif", root / "more" / "d.tif")


def _two_of_a_name(root: Path) -> None:
    beside(root, 7)
    save(root / "more" / "d.png", pattern(8)[0])


def _label_of_the_name(root: Path) -> None:
    for kind in ("images", "labels"):
        (root / "test" / kind / "c.tif").rename(root / "test" / kind / "unlabelled-d.tif")
    beside(root)


def _grey(root: Path) -> None:
    write_tif(root / "more" / "d.tif", np.ones((24, 24), np.uint8), transform=PLACE @ Affine.translation(700, 0))


def _cut_short(root: Path) -> None:
    path = beside(root)
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: None, r"no file matches unlabelled: more/\* below"),
        (_same_file, r"more/d\.tif \(split unlabelled\) is the same file as .*c\.tif \(split test\)"),
        (_same_content, r"more/d\.tif \(split unlabelled\) has the same content as .*c\.tif \(split test\)"),
        (lambda root: beside(root, name="c"), r"more/c\.tif .* has the same scene name 'c' as .*test/images/c\.tif"),
        (_two_of_a_name, r"d\.(png|tif) both belong to scene d"),
        (_label_of_the_name, "its scene name 'unlabelled-d' is that of a labelled scene; rename that one"),
        (_cut_short, r"more/d\.tif: not a readable raster"),
        (lambda root: beside(root, side=1.2), r"more/d\.tif: has pixels of 0\.6 m, .* labelled scenes have 0\.5 m; set tile\.ground_dist"),
        (lambda root: beside(root, side=0.8), r"pixels of 0\.4 m"),
        (_grey, r"more/d\.tif: shows 1 band, the labelled scenes 3; give a copy of it with as many, or"),
    ],
)
def test_a_scene_without_label_that_cannot_be_used_is_refused(tmp_path, damage, message):
    config = tif_data(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        list_scenes(with_unlabelled(config), tmp_path, tmp_path / "scenes.parquet")


def test_pixels_of_another_size_are_taken_to_a_ground_distance(tmp_path):
    config = tif_data(tmp_path)
    beside(tmp_path, side=2)
    (manifest,) = tile(with_unlabelled(config, tile={"size": 8, "ground_distance": 0.5}), tmp_path, UNLABELLED)
    assert len(read_manifest(manifest, labelled=False)) == 36
    beside(tmp_path, side=1.05)
    list_scenes(with_unlabelled(config), tmp_path, tmp_path / "scenes.parquet")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((24, 24, 3), np.uint16), r"more/d\.tif: pixels are uint16, not uint8; set tile\.scale"),
        (np.ones((24, 24), np.uint8), r"more/d\.tif: has 1 bands and no band 3; correct tile\.bands"),
    ],
)
def test_other_depths_and_bands_are_refused_as_those_of_labelled_scenes_are(tmp_path, image, message):
    config = merged(tif_data(tmp_path), tile={"bands": [1, 2, 3]})
    write_tif(tmp_path / "more" / "d.tif", image, transform=PLACE @ Affine.translation(700, 0))
    with pytest.raises(DataError, match=message):
        tile(with_unlabelled(config), tmp_path, UNLABELLED)


def test_values_are_scaled_by_the_training_scenes_alone(tmp_path):
    config = merged(tif_data(tmp_path), tile={"scale": {"over": "dataset"}})
    write_tif(tmp_path / "more" / "d.tif", np.full((24, 24, 3), 9000, np.uint16), transform=PLACE @ Affine.translation(700, 0))
    list_scenes(dataset_of(config), tmp_path, tmp_path / "plain.parquet")
    list_scenes(with_unlabelled(config), tmp_path, tmp_path / "scenes.parquet")
    plain, scenes = (read_scenes(tmp_path / f"{name}.parquet") for name in ("plain", "scenes"))
    assert {tuple(high) for high in scenes.high} == {tuple(high) for high in plain.high}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {UNLABELLED: {"n_shot": 2}}}, r"select\.unlabelled\.n_shot: tiles without labels show no known class"),
        (
            {"select": {UNLABELLED: {"tiles": 2, "rest_of": "test"}, "test": {"tiles": 1}}},
            r"unlabelled\.rest_of: the rest of test has labels",
        ),
        ({"source": {"unlabelled": None}, "select": {UNLABELLED: {"tiles": 2}}}, r"source\.unlabelled names no scenes; set it"),
        ({"source": {"unlabelled": []}}, "at least 1 item"),
        ({"train": UNLABELLED}, "train: 'unlabelled' is no split of the source"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        with_unlabelled(folder_data(tmp_path), **changes)


def test_the_name_of_the_split_is_reserved(tmp_path):
    config = folder_data(tmp_path)
    config["source"]["splits"][UNLABELLED] = config["source"]["splits"]["test"]
    with pytest.raises(
        ValidationError, match=r"the name 'unlabelled' is that of the scenes in source\.unlabelled; give the labelled split"
    ):
        dataset_of(config)


def test_a_manifest_without_labels_is_read_only_where_none_are_needed(tmp_path):
    dataset = with_unlabelled(folder_data(tmp_path))
    save(tmp_path / "more" / "d.png", pattern(7)[0])
    (manifest,) = tile(dataset, tmp_path, UNLABELLED)
    table = read_manifest(manifest, labelled=False)
    check_paths(manifest, table, tmp_path / "results", columns=("image",))
    with pytest.raises(DataError, match="row unlabelled-d_0_0: its label is '', which is no path"):
        read_manifest(manifest)
    table.assign(image="").to_parquet(tmp_path / "spoilt.parquet")
    with pytest.raises(DataError, match="its image is '', which is no path"):
        read_table(tmp_path / "spoilt.parquet", ["image"], "tile_id", labelled=False)


def test_a_labelled_scene_without_label_is_a_broken_row(tmp_path):
    dataset = with_unlabelled(folder_data(tmp_path))
    save(tmp_path / "more" / "d.png", pattern(7)[0])
    path = tmp_path / "scenes.parquet"
    list_scenes(dataset, tmp_path, path)
    table = read_scenes(path)
    assert table.label.iloc[-1] == ""
    table.assign(split="train").to_parquet(path)
    with pytest.raises(DataError, match="row unlabelled-d: its label is '', which is no path"):
        read_scenes(path)


def test_no_mask_is_read_of_a_scene_without_label(tmp_path):
    dataset = with_unlabelled(tif_data(tmp_path))
    with pytest.raises(DataError, match=r"d\.tif: the scene has no label, and an image is drawn for one; name a labelled scene"):
        read_mask(beside(tmp_path), "", dataset)
