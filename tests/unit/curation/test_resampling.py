"""Which versions of which masks a re-sampling keeps: counts by hand, and what they do not depend on."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from segmentor_tiles import CLASSES

from crfm_core import DataError
from crfm_core.curation.resampling import resample_tiles
from crfm_core.curation.resampling.hardness import by_hardness, hardness_of, versions_kept
from crfm_core.curation.resampling.rare import by_rare_class
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.settings import HardnessResampling, RareResampling

LOSSES = [0.1, 0.5, 2.0]


def manifest_of(path: Path, tiles: dict[str, list[int]], **columns) -> Path:
    """A manifest of tiles by id with their pixels; there are no images, and none are asked for."""
    rows = [
        {
            "tile_id": tile_id, "dataset": "d", "split": "train", "scene": "s", "row": 0, "col": i, "width": 10, "height": 10,
            "image": f"images/{tile_id}.png", "label": f"labels/{tile_id}.png", "crs": "", "transform": [],
            "classes": np.flatnonzero(pixels).tolist(), "pixels": pixels, "digest": tile_id,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (tile_id, pixels) in enumerate(tiles.items())
    ]  # fmt: skip
    write_manifest(path, rows)
    return path


def versions(path: Path, counts: dict[str, int], kept: float = 1.0) -> Path:
    """A synthetic manifest with so many versions of each mask, of which a filter has left nothing but soil."""
    tiles = {f"{mask}-{copy}": [10, 0, 0] for mask, count in counts.items() for copy in range(count)}
    masks = [mask for mask, count in counts.items() for _ in range(count)]
    return manifest_of(path, tiles, mask_of=masks, copy=[int(name.rsplit("-", 1)[1]) for name in tiles], kept=[kept] * len(tiles))


# ------------------------------------------------------------------------------------------------------------ hardness


@pytest.mark.parametrize(
    ("pixels", "losses", "hardness"),
    [
        ([100, 0, 0], LOSSES, 0.1),
        ([50, 30, 20], LOSSES, (50 * 0.1 + 30 * 0.5 + 20 * 2.0) / 100),
        ([50, 30, 20], [0.1, 0.5, None], (50 * 0.1 + 30 * 0.5) / 80),  # a class without a loss does not count
        ([0, 0, 20], [0.1, 0.5, None], math.nan),
        ([0, 0, 0], LOSSES, math.nan),
    ],
)
def test_a_masks_hardness_is_the_mean_loss_of_its_pixels_classes(pixels, losses, hardness):
    assert hardness_of(pixels, losses) == pytest.approx(hardness, nan_ok=True)


@pytest.mark.parametrize(
    ("masks", "most", "kept"),
    [
        (4, 4, [2, 3, 4, 4]),
        (5, 10, [3, 5, 7, 9, 10]),
        (10, 3, [1, 2, 2, 2, 3, 3, 3, 3, 3, 3]),  # 0.3 0.6 0.9 1.2 1.5 1.8 2.1 ..., halves to the even
        (3, 1, [1, 1, 1]),
        (1, 5, [5]),
        (8, 4, [1, 2, 3, 3, 3, 4, 4, 4]),  # 0.5 1.0 1.5 2.0 2.5 3.0 3.5 4.0
    ],
)
def test_the_harder_a_mask_the_more_versions_it_keeps(masks, most, kept):
    assert [versions_kept(rank, masks, most) for rank in range(masks)] == kept


MASKS = {"m0": [0, 50, 50], "m1": [100, 0, 0], "m2": [0, 0, 100], "m3": [50, 50, 0], "m4": [0, 100, 0]}
HARDNESS = {"m1": 0.1, "m3": 0.3, "m4": 0.5, "m0": 1.25, "m2": 2.0}  # ascending


def test_the_versions_kept_follow_the_masks_before_any_filter(tmp_path, capsys):
    tiles, out = manifest_of(tmp_path / "tiles.parquet", MASKS), tmp_path / "resampled" / "none" / "hardness.parquet"
    synthetic = versions(tmp_path / "all.parquet", dict.fromkeys(MASKS, 10))
    table = resample_tiles(HardnessResampling(kind="hardness"), synthetic, tiles, LOSSES, CLASSES, out)
    assert Counter(table.mask_of) == {"m1": 3, "m3": 5, "m4": 7, "m0": 9, "m2": 10}
    assert dict(zip(table.mask_of, table.hardness, strict=True)) == pytest.approx(HARDNESS)
    before = read_manifest(synthetic)
    assert table.tile_id.tolist() == [one for one in before.tile_id if one in set(table.tile_id)], "the order stays"
    assert table.image.iloc[0] == f"../../images/{table.tile_id.iloc[0]}.png"
    pd.testing.assert_frame_equal(read_manifest(out), table)
    said = capsys.readouterr().out
    assert "34 of 50 tiles kept" in said and "1 masks keep 3 of their versions" in said
    assert said.splitlines()[-3].split() == ["soil", "500", "340", "32.0", "%", "50", "34"]


def test_masks_of_which_a_filter_left_fewer_versions_keep_what_there_is(tmp_path):
    tiles = manifest_of(tmp_path / "tiles.parquet", MASKS)
    synthetic = versions(tmp_path / "f.parquet", {"m0": 2, "m1": 1, "m2": 4, "m3": 4})
    table = resample_tiles(HardnessResampling(kind="hardness"), synthetic, tiles, LOSSES, CLASSES, tmp_path / "out.parquet")
    assert Counter(table.mask_of) == {"m1": 1, "m3": 3, "m0": 2, "m2": 4}  # of at most 4: 2, 3, 4, 4


def test_layouts_made_from_one_tile_are_its_versions_as_hard_as_they_are_on_average(tmp_path):
    """Each is a mask of its own; those from a are easy but for one, all from b are hard."""
    easy, hard = [100, 0, 0], [0, 0, 100]
    layouts = {"a-0": easy, "a-1": easy, "a-2": hard, "a-3": easy, "b-0": hard, "b-1": hard, "b-2": hard, "b-3": hard}
    tiles = manifest_of(tmp_path / "layouts.parquet", layouts)
    synthetic = manifest_of(
        tmp_path / "all.parquet", {f"{name}-crfm-0": [10, 0, 0] for name in layouts}, mask_of=list(layouts), copy=[0] * 8,
        layout_of=[name[0] for name in layouts],
    )  # fmt: skip
    table = resample_tiles(HardnessResampling(kind="hardness"), synthetic, tiles, LOSSES, CLASSES, tmp_path / "out.parquet")
    assert Counter(table.layout_of) == {"a": 3, "b": 4}  # of two masks the easier one keeps 1 + round(4 / 2)
    assert table.hardness.tolist() == [hardness_of(layouts[name], LOSSES) for name in table.mask_of]


def test_which_versions_are_kept_depends_on_seed_and_id_alone(tmp_path):
    tiles = manifest_of(tmp_path / "tiles.parquet", MASKS)
    synthetic = versions(tmp_path / "all.parquet", dict.fromkeys(MASKS, 10))
    turned = tmp_path / "turned.parquet"
    write_manifest(turned, read_manifest(synthetic).sample(frac=1, random_state=1))

    def kept(manifest: Path, seed: int) -> set[str]:
        settings = HardnessResampling(kind="hardness", seed=seed)
        return set(resample_tiles(settings, manifest, tiles, LOSSES, CLASSES, tmp_path / "out.parquet").tile_id)

    first = kept(synthetic, 0)
    assert kept(synthetic, 0) == kept(turned, 0) == first
    assert len(kept(synthetic, 1)) == len(first) and kept(synthetic, 1) != first
    assert {one.split("-")[1] for one in first if one.startswith("m1")} != {"0", "1", "2"}, "not the first ones"


def test_when_all_masks_are_equally_hard_the_counts_stay_and_the_seed_says_which(tmp_path):
    table = read_manifest(versions(tmp_path / "all.parquet", {f"m{i}": 4 for i in range(8)})).assign(hardness=0.5)

    def kept(table: pd.DataFrame, seed: int) -> Counter:
        return Counter(table.mask_of[by_hardness(table, seed)])

    assert sorted(kept(table, 0).values()) == [1, 2, 3, 3, 3, 4, 4, 4]
    assert kept(table, 0) == kept(table.sample(frac=1, random_state=1), 0) != kept(table, 1)
    assert list(kept(table, 0).values()) != sorted(kept(table, 0).values()), "it is not the order of the names"


def test_a_mask_of_classes_without_a_loss_ranks_as_the_easiest(tmp_path, capsys):
    tiles = manifest_of(tmp_path / "tiles.parquet", {"a": [100, 0, 0], "b": [0, 0, 100]})
    synthetic = versions(tmp_path / "all.parquet", {"a": 4, "b": 4})
    table = resample_tiles(HardnessResampling(kind="hardness"), synthetic, tiles, [0.1, 0.5, None], CLASSES, tmp_path / "out.parquet")
    assert Counter(table.mask_of) == {"b": 3, "a": 4}
    assert "1 masks have no class with a mean loss and rank as the easiest, first b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("masks", "losses", "message"),
    [
        ({"a": [1, 1, 1]}, LOSSES, r"all\.parquet: mask_of names b, which is no tile of \S*tiles\.parquet; give the tiles whose masks"),
        ({"a": [1, 1, 1], "b": [1, 0, 0]}, [None] * 3, r"tiles\.parquet: no mask has a class with a mean loss on real tiles; measure"),
        ({"a": [1, 1, 1], "b": [1, 0, 0]}, [1.0], r"1 class losses for 3 classes; compute them with a critic of these classes"),
    ],
)
def test_what_hardness_cannot_be_told_from_is_named(tmp_path, masks, losses, message):
    tiles, synthetic = manifest_of(tmp_path / "tiles.parquet", masks), versions(tmp_path / "all.parquet", {"a": 2, "b": 2})
    with pytest.raises(DataError, match=message):
        resample_tiles(HardnessResampling(kind="hardness"), synthetic, tiles, losses, CLASSES, tmp_path / "out.parquet")


# ---------------------------------------------------------------------------------------------------------- rare classes

#: id: pixels after filtering, share that went through the filter, whether it is kept for wood with 100 pixels and 80 %
RARE = {
    "much-wood": ([0, 0, 500], 0.1, True),
    "just-enough-wood": ([0, 0, 100], 0.1, True),
    "too-little-wood": ([50, 0, 99], 0.1, False),
    "other-classes": ([500, 400, 0], 0.8, False),
    "came-through": ([500, 400, 0], 0.81, True),
    "nothing-left": ([0, 0, 0], 1.0, False),
}


def rare_tiles(path: Path) -> Path:
    return manifest_of(path, {name: pixels for name, (pixels, _, _) in RARE.items()}, kept=[kept for _, kept, _ in RARE.values()])


@pytest.mark.parametrize(
    "chosen", [{"worst": 1}, {"classes": ["wood"]}, {"classes": ["wood"], "worst": 3}], ids=["the-worst", "named", "named-before-worst"]
)
def test_tiles_that_show_a_rare_class_or_came_through_the_filter_stay(tmp_path, capsys, chosen):
    settings = RareResampling(kind="rare", min_pixels=100, survival=0.8, **chosen)
    table = resample_tiles(settings, rare_tiles(tmp_path / "f.parquet"), tmp_path / "not read", LOSSES, CLASSES, tmp_path / "out.parquet")
    assert table.tile_id.tolist() == [name for name, (_, _, kept) in RARE.items() if kept]
    said = capsys.readouterr().out
    assert "poorly segmented: wood\n" in said and "2 tiles show a poorly segmented class, 1 others came through the filter" in said
    assert "3 of 6 tiles kept" in said and said.splitlines()[-1].split() == ["wood", "699", "600", "14.2", "%", "3", "2"]


@pytest.mark.parametrize(
    ("losses", "worst", "named"),
    [
        ([0.1, 0.5, 2.0], 2, "wood, water"),
        ([None, 0.5, 0.4], 1, "water"),
        ([None, 0.5, 0.4], 3, "water, wood"),  # no more than are known
        ([0.7, 0.7, 0.1], 1, "soil"),
    ],
)
def test_the_worst_classes_are_those_with_the_highest_known_loss(tmp_path, capsys, losses, worst, named):
    settings = RareResampling(kind="rare", worst=worst, min_pixels=1)
    resample_tiles(settings, rare_tiles(tmp_path / "f.parquet"), tmp_path / "not read", losses, CLASSES, tmp_path / "out.parquet")
    assert f"poorly segmented: {named}\n" in capsys.readouterr().out


def test_the_pixels_of_several_rare_classes_do_not_add_up():
    table = pd.DataFrame({"pixels": [[0, 60, 60], [0, 40, 100]], "kept": [0.0, 0.0]})
    assert by_rare_class(table, [1, 2], 100, 0.8).tolist() == [False, True]


@pytest.mark.parametrize(
    ("losses", "settings", "columns", "message"),
    [
        (LOSSES, {}, [], r"f\.parquet: no pixel filter went before \(there is no column kept\).* give the recipe a filter"),
        ([None] * 3, {}, ["kept"], r"no class has a mean loss on real tiles, so none is the worst; name some: classes"),
        (LOSSES, {"min_pixels": 1000, "survival": 0.95}, ["kept"], r"out\.parquet: none of the 6 tiles of .* is kept; lower .* min_pixels"),
    ],
)  # fmt: skip
def test_what_rare_classes_cannot_be_told_from_is_named(tmp_path, losses, settings, columns, message):
    path = rare_tiles(tmp_path / "f.parquet")
    write_manifest(path, read_manifest(path).drop(columns=[name for name in ("kept",) if name not in columns]))
    with pytest.raises(DataError, match=message):
        resample_tiles(RareResampling(kind="rare", **settings), path, tmp_path / "not read", losses, CLASSES, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
