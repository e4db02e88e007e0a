"""How tiles get into splits: groups stay together, blocks keep their distance, subsets look like the whole and depend on the seed alone."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine

from crfm_core import DataError
from crfm_core.data.grid import Grid
from crfm_core.data.selection import select_tiles, stratified_order
from crfm_core.data.splits import assign, block_regions
from crfm_core.settings import BlockSplit, Selection

UTM = "EPSG:32631"


# ------------------------------------------------------------------------------------------------------- dealing out


def test_groups_are_dealt_out_whole_by_the_seed_and_in_about_their_shares():
    sizes = {f"g{index}": 1 + index % 5 for index in range(60)}
    assigned = assign(sizes, {"train": 0.6, "val": 0.1, "test": 0.3}, seed=0)
    assert set(assigned) == set(sizes) and assigned == assign(
        dict(reversed(sizes.items())), {"train": 0.6, "val": 0.1, "test": 0.3}, seed=0
    )
    share = {
        split: sum(sizes[key] for key in assigned if assigned[key] == split) / sum(sizes.values()) for split in ("train", "val", "test")
    }
    assert share == pytest.approx({"train": 0.6, "val": 0.1, "test": 0.3}, abs=0.03)
    assert assigned != assign(sizes, {"train": 0.6, "val": 0.1, "test": 0.3}, seed=1)


def test_no_split_stays_empty():
    for seed in range(20):
        assert set(assign({"a": 9, "b": 1, "c": 1}, {"train": 0.98, "val": 0.01, "test": 0.01}, seed).values()) == {"train", "val", "test"}
    with pytest.raises(DataError, match="1 groups or blocks for 2 splits"):
        assign({"a": 1}, {"train": 0.5, "test": 0.5}, 0)


def painted(grids, split, names=("train", "test")):
    """Which split each pixel of each scene is in: 0 none, 1 the first ..."""
    canvas = {scene: np.zeros((grid.height, grid.width), int) for scene, grid in grids.items()}
    for number, name in enumerate(names, 1):
        for scene, regions in block_regions(grids, split, name).items():
            for top, left, height, width in regions:
                part = canvas[scene][top : top + height, left : left + width]
                assert (part == 0).all() and part.shape == (height, width), "regions stay inside and do not overlap"
                part[:] = number
    return canvas


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(10, 30), st.integers(0, 9), st.integers(0, 5))
def test_blocks_of_different_splits_keep_the_buffer_between_them(height, width, block, buffer, seed):
    grids = {"a": Grid(width, height, UTM, Affine(0.5, 0, 4e5, 0, -0.5, 5e6))}
    split = BlockSplit(by="blocks", block=block, buffer=buffer, shares={"train": 0.5, "test": 0.5}, seed=seed)
    if height < 2 * block and width < 2 * block:
        with pytest.raises(DataError, match="1 groups or blocks"):
            block_regions(grids, split, "train")
        return
    canvas = painted(grids, split)["a"]
    ones, twos = (np.argwhere(canvas == number) for number in (1, 2))
    assert len(ones) and len(twos)
    gap = np.abs(ones[:, None, :] - twos[None]).max(axis=-1).min() - 1
    assert gap >= buffer
    if buffer == 0:
        assert (canvas > 0).all(), "no ground is lost without a buffer"


def test_scenes_that_overlap_share_their_blocks():
    place = Affine(0.5, 0, 4e5, 0, -0.5, 5e6)
    grids = {"a": Grid(60, 50, UTM, place), "b": Grid(64, 50, UTM, place @ Affine.translation(31, 17))}
    canvas = painted(grids, BlockSplit(by="blocks", block=12, buffer=2, shares={"train": 0.5, "test": 0.5}))
    common_a, common_b = canvas["a"][17:, 31:], canvas["b"][: 50 - 17, : 60 - 31]
    assert np.array_equal(common_a, common_b) and {1, 2} <= set(common_a.ravel())


def test_blocks_of_scenes_far_apart_are_dealt_out_at_once():
    place = Affine(0.3, 0, 4e5, 0, -0.3, 5e6)
    grids = {f"s{i}": Grid(4096, 4096, UTM, place @ Affine.translation(i * 100_000, i * 100_000)) for i in range(10)}
    begun = time.process_time()
    regions = block_regions(grids, BlockSplit(by="blocks", block=512, buffer=64, shares={"train": 0.5, "test": 0.5}), "train")
    assert time.process_time() - begun < 3 and sum(len(found) for found in regions.values()) > 100


def test_scenes_without_a_place_have_blocks_of_their_own():
    grids = {name: Grid(24, 24, "", Affine.identity()) for name in "ab"}
    split = BlockSplit(by="blocks", block=24, shares={"train": 0.5, "test": 0.5})
    canvas = painted(grids, split)
    assert {int(canvas[name][0, 0]) for name in "ab"} == {1, 2} and all((c == c[0, 0]).all() for c in canvas.values())


# ---------------------------------------------------------------------------------------------------------- selections


def tiles(count: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    present = [sorted({0, *rng.choice(4, rng.integers(1, 3), p=[0.4, 0.4, 0.15, 0.05])}) for _ in range(count)]
    return pd.DataFrame({"tile_id": [f"t{index}" for index in range(count)], "classes": present})


CLASSES = ["a", "b", "c", "d"]


def pick(table: pd.DataFrame, **selection) -> set[str]:
    return select_tiles(table, Selection(**selection), "select.train", CLASSES)


def test_fewer_tiles_are_a_part_of_more_and_show_each_set_of_classes_in_its_share():
    table = tiles()
    shares = table.classes.map(tuple).value_counts(normalize=True)
    before: set[str] = set()
    for count in (20, 50, 100, 399, 400):
        chosen = pick(table, tiles=count)
        assert len(chosen) == count and before <= chosen
        found = table[table.tile_id.isin(chosen)].classes.map(tuple).value_counts().reindex(shares.index, fill_value=0)
        assert (np.abs(found - count * shares) <= 1).all(), "each set of classes is there as often as it should, but for rounding"
        before = chosen
    assert pick(table, fraction=0.25) == pick(table, tiles=100)


def test_a_selection_depends_on_the_seed_and_not_on_the_order_of_the_tiles():
    table = tiles()
    shuffled = table.sample(frac=1, random_state=3)
    for selection in ({"tiles": 60}, {"n_shot": 5}):
        assert pick(table, **selection) == pick(shuffled, **selection) != pick(table, **selection, seed=1)
    order = stratified_order(table, 0)
    assert sorted(order) == list(range(len(table)))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_n_shot_takes_that_many_tiles_of_each_class_or_all_there_are(count, capsys):
    table = tiles(120)
    chosen = table[table.tile_id.isin(pick(table, n_shot=count))]
    for index in range(4):
        there, taken = (int(t.classes.map(lambda found, i=index: i in found).sum()) for t in (table, chosen))
        assert taken >= min(count, there)
        assert (f"tiles show {CLASSES[index]}" in capsys.readouterr().out) == (there < count)
    assert len(chosen) <= 4 * count
    assert pick(table, n_shot=1) <= pick(table, n_shot=3)


def test_listed_tiles_are_taken(tmp_path):
    (tmp_path / "ids.txt").write_text("t3\n\n t7 \n")
    assert pick(tiles(), ids=str(tmp_path / "ids.txt")) == {"t3", "t7"}
