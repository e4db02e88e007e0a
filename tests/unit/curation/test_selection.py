"""What the steps of curation share: the best share of rows, the rows that are kept, and counts per class."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError
from crfm_core.curation.selection import best, class_counts, keep_rows, print_counts
from crfm_core.manifest import read_manifest


@pytest.mark.parametrize(
    ("scores", "ids", "keep", "kept"),
    [
        ([3.0, 1.0, 2.0, 5.0], "abcd", 0.5, "ad"),
        ([3.0, 1.0, 2.0, 5.0], "abcd", 0.51, "acd"),  # the share is rounded up
        ([3.0, 1.0, 2.0, 5.0], "abcd", 0.001, "d"),
        ([3.0, 1.0, 2.0, 5.0], "abcd", 1, "abcd"),
        ([2.0, 2.0, 2.0, 2.0], "dbca", 0.5, "ba"),  # equal ones by id, not by place
        ([0.0, math.nan, -1.0, math.nan], "abcd", 0.75, "abc"),  # what has no score comes last
        ([math.nan, math.nan, math.nan, -9.0], "cabd", 0.5, "ad"),
    ],
)
def test_the_best_share_is_rounded_up_and_ties_go_by_id(scores, ids, keep, kept):
    assert [one for one, chosen in zip(ids, best(np.array(scores), list(ids), keep), strict=True) if chosen] == list(kept)


@pytest.mark.parametrize("number", [29, 50, 100, 700])
def test_seven_percent_of_a_number_is_rounded_up_from_the_exact_share(number):
    assert best(np.arange(float(number)), [str(i) for i in range(number)], 0.07).sum() == -(-7 * number // 100)


def test_counts_of_two_manifests_give_what_is_gone_of_each_class(capsys):
    before = pd.DataFrame({"tile_id": ["a", "b", "c"], "pixels": [[4, 0, 0], [2, 6, 0], [0, 4, 0]]})
    after = pd.DataFrame({"tile_id": ["b"], "pixels": [np.array([1, 6, 0])]})
    counts = class_counts(before, after, CLASSES)
    assert counts.name.tolist() == CLASSES
    assert counts.pixels_before.tolist() == [6, 10, 0] and counts.pixels_after.tolist() == [1, 6, 0]
    assert counts.dropped.tolist() == pytest.approx([5 / 6, 0.4, math.nan], nan_ok=True)
    assert counts.tiles_before.tolist() == [2, 2, 0] and counts.tiles_after.tolist() == [1, 1, 0]
    assert class_counts(before, after.iloc[:0], CLASSES).pixels_after.tolist() == [0, 0, 0]
    print_counts(before, after, CLASSES)
    assert capsys.readouterr().out.startswith("1 of 3 tiles kept\n")
    with pytest.raises(DataError, match="row a: pixels of another number of classes than 2"):
        class_counts(before, after, CLASSES[:2])


def test_a_step_that_keeps_nothing_is_an_error_with_its_remedy(tmp_path):
    manifest = write_tiles(tmp_path / "all.parquet", 2)
    with pytest.raises(DataError, match=r"x\.parquet: none of the 2 tiles of \S*all\.parquet is kept; lower it"):
        keep_rows(manifest, read_manifest(manifest), np.zeros(2), tmp_path / "x.parquet", CLASSES, "lower it")
