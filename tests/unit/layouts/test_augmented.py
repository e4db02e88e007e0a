"""Augmented layouts: what turning, zooming and pasting may change, and how class shares approach their target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hand_made_tiles import write_by_hand
from segmentor_tiles import CLASSES

from crfm_core.data.rasters import read_label
from crfm_core.layouts import draw_layouts
from crfm_core.layouts.augmented import deficits, paste, pieces_of, target_shares, turned, zoomed
from crfm_core.manifest import paths_of
from crfm_core.settings import AugmentedLayouts

SIDE, COPIES = 24, 4


def write_masks(root: Path, labels: list[np.ndarray]) -> Path:
    return write_by_hand(root / "tiles" / "train.parquet", [np.zeros((*label.shape, 3)) for label in labels], labels)


def rare_world(root: Path, count: int = 12) -> list[np.ndarray]:
    """Masks of soil with a pond and, in every third, a grove: 80 % soil, 18 % water, 2 % wood; a corner of each is ignored."""
    rng, labels = np.random.default_rng(0), []
    for index in range(count):
        label = np.zeros((SIDE, SIDE), np.uint8)
        top, left = rng.integers(2, 12, 2)
        label[top : top + 10, left : left + 10] = 1
        if index % 3 == 0:
            label[-6:, -6:] = 2
        label[:2, :2] = 255
        labels.append(label)
    write_masks(root, labels)
    return labels


def draw(root: Path, copies: int = COPIES, **settings) -> tuple[pd.DataFrame, list[np.ndarray]]:
    out = root / "layouts" / "new.parquet"
    table = draw_layouts(
        AugmentedLayouts(kind="augmented", **{"min_piece": 4} | settings), root / "tiles" / "train.parquet", copies, CLASSES, out
    )
    return table, [read_label(path) for path in paths_of(out, table, "label", root)]


def shares_of(table: pd.DataFrame) -> np.ndarray:
    counts = np.sum(list(table.pixels), axis=0)
    return counts / counts.sum()


def test_without_changes_every_training_mask_is_drawn_once_per_copy(tmp_path):
    labels = rare_world(tmp_path / "d")
    table, masks = draw(tmp_path / "d", turn=False, scale=(1, 1), paste=0)
    for copy in range(COPIES):
        assert sorted(table.mask_of[table["copy"] == copy]) == sorted(f"t{index}" for index in range(len(labels)))
    assert all((mask == labels[int(base[1:])]).all() for base, mask in zip(table.mask_of, masks, strict=True))


def test_turning_gives_the_eight_positions_of_a_mask_and_of_an_oblong_one_those_of_its_shape():
    rng, mask = np.random.default_rng(0), np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert len({turned(mask, rng).tobytes() for _ in range(200)}) == 8
    found = [turned(mask[:3], rng) for _ in range(100)]
    assert {one.shape for one in found} == {(3, 4)} and len({one.tobytes() for one in found}) == 4


@pytest.mark.parametrize("zoom", [0.3, 0.7, 1, 1.5, 3])
def test_a_zoomed_mask_has_the_size_and_the_class_ids_of_the_mask(zoom):
    rng = np.random.default_rng(0)
    mask = np.kron(rng.choice(np.array([0, 2, 255], np.uint8), size=(6, 8)), np.ones((4, 4), np.uint8))
    changed = zoomed(mask, np.log(zoom), rng)
    assert changed.shape == mask.shape and changed.dtype == mask.dtype and set(np.unique(changed)) <= {0, 2, 255}


def test_a_larger_mask_is_a_cropped_one_and_a_smaller_one_goes_on_mirrored():
    rng, mask = np.random.default_rng(1), np.arange(64, dtype=np.uint8).reshape(8, 8)
    larger = zoomed(mask, np.log(2), rng)
    top, left = divmod(int(larger[0, 0]), 8)
    whole = np.kron(mask, np.ones((2, 2), np.uint8))
    assert any((whole[2 * top + a : 2 * top + a + 8, 2 * left + b : 2 * left + b + 8] == larger).all() for a in (0, 1) for b in (0, 1))
    smaller = zoomed(mask, np.log(0.5), rng)
    half = mask[1::2, 1::2]
    around = np.pad(half, 4, mode="symmetric")
    assert any((around[a : a + 8, b : b + 8] == smaller).all() for a in range(5) for b in range(5))


def test_pieces_are_the_connected_ones_that_are_large_enough():
    mask = np.zeros((6, 8), np.uint8)
    mask[0, :3] = mask[4:6, 4:8] = 1
    mask[3, 0] = 1
    found = pieces_of(mask, 1, 2)
    assert [piece.shape for piece in found] == [(1, 3), (2, 4)] and all(piece.all() for piece in found)
    assert pieces_of(mask, 2, 1) == []


def test_a_piece_is_written_whole_at_a_place_within_the_mask_and_never_over_ignored_pixels():
    rng, piece = np.random.default_rng(0), np.array([[True, False], [True, True]])
    for _ in range(50):
        mask = np.zeros((5, 5), np.uint8)
        mask[2:4, 1] = 255
        before = mask.copy()
        assert paste(mask, piece, 2, rng) == (mask == 2).any()
        assert (mask[before == 255] == 255).all() and (mask == 2).sum() <= 3
    full = np.full((3, 3), 255, np.uint8)
    assert not paste(full, piece, 2, rng) and (full == 255).all()
    small = np.zeros((2, 2), np.uint8)
    assert paste(small, np.ones((4, 4), bool), 1, rng) and (small == 1).all()


def test_where_classes_are_missing_a_piece_hides_the_others():
    def left(missing: np.ndarray | None) -> tuple[int, int]:
        mask, rng = np.zeros((20, 20), np.uint8), np.random.default_rng(0)
        mask[:10] = 1
        for _ in range(6):
            paste(mask, np.ones((4, 4), bool), 2, rng, missing)
        return int((mask == 1).sum()), int((mask == 2).sum())

    water, wood = left(np.array([0.0, 50, 50]))
    assert water >= 190 > left(None)[0] and wood > 80


def test_what_is_pasted_are_connected_pieces_of_other_masks(tmp_path):
    """Masks have one row of pixels each, of a length of its own, which tells whose it is."""
    labels = []
    for index in range(4):
        label = np.zeros((SIDE, SIDE), np.uint8)
        label[8, 2 : 7 + index] = 1 + index % 2
        labels.append(label)
    write_masks(tmp_path / "d", labels)
    table, masks = draw(tmp_path / "d", turn=False, scale=(1, 1), paste=1, copies=20, shares={"water": 0.5, "wood": 0.5})
    found = set()
    for base, pieces, mask in zip(table.mask_of, table.pieces, masks, strict=True):
        own = labels[int(base[1:])]
        rows, columns = np.nonzero(mask != own)
        assert pieces == 1
        if len(rows) and 8 not in rows:  # beside its own
            other = len(rows) - 5
            assert other != int(base[1:]) and set(mask[rows, columns]) == {1 + other % 2}
            assert len(set(rows)) == 1 and np.ptp(columns) == len(rows) - 1
            found.add(other)
    assert found == {0, 1, 2, 3}


def test_small_pieces_are_left_where_they_are(tmp_path):
    rare_world(tmp_path / "d")
    table, _ = draw(tmp_path / "d", min_piece=SIDE * SIDE)
    assert set(table.pieces) == {0}


def test_uniform_shares_bring_every_class_near_a_third_and_the_rare_ones_up(tmp_path):
    rare_world(tmp_path / "d")
    plain, _ = draw(tmp_path / "d")
    even, masks = draw(tmp_path / "d", shares="uniform", paste=12)
    few, _ = draw(tmp_path / "d", shares="uniform", paste=3)
    assert shares_of(plain)[2] < 0.05
    assert (np.abs(shares_of(even) - 1 / 3) < 0.04).all()
    assert (shares_of(few)[1:] > shares_of(plain)[1:]).all()
    assert {int(value) for mask in masks for value in np.unique(mask)} == {0, 1, 2, 255}


def test_a_named_share_is_approached_and_the_others_keep_their_proportion(tmp_path):
    labels = rare_world(tmp_path / "d")
    pixels = np.sum([np.bincount(label[label != 255], minlength=3) for label in labels], axis=0)
    table, _ = draw(tmp_path / "d", shares={"wood": 0.2}, paste=8)
    wanted = target_shares({"wood": 0.2}, CLASSES, pixels)
    assert wanted[2] == pytest.approx(0.2) and wanted[0] / wanted[1] == pytest.approx(pixels[0] / pixels[1])
    assert (np.abs(shares_of(table) - wanted) < 0.04).all()


def test_targets_and_what_is_missing_of_them():
    assert target_shares("uniform", CLASSES, np.array([8, 0, 2])).tolist() == [0.5, 0, 0.5]
    assert target_shares({"wood": 0.25}, CLASSES, np.array([6, 2, 2])).tolist() == [0.5625, 0.1875, 0.25]
    assert target_shares({"soil": 0.5, "water": 0.25, "wood": 0.25}, CLASSES, np.array([6, 0, 2])).tolist() == pytest.approx(
        [2 / 3, 0, 1 / 3]
    )
    assert deficits(np.array([0.5, 0.5]), np.array([8, 2])).tolist() == [0, 3]
