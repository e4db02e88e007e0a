"""Windows along a side cover it, lie as their edge rule says, and leave no more overlap than they must."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crfm_core.data.windows import window_offsets


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from(["shift", "spread", "pad"]), st.data())
def test_windows_cover_every_pixel_of_a_side_and_but_for_pad_end_with_it(length, size, edge, data):
    size = min(size, length)
    offsets = window_offsets(length, size, data.draw(st.integers(1, size)), edge)
    reach = {pixel for offset in offsets for pixel in range(offset, offset + size)}
    assert offsets[0] == 0 and offsets == sorted(set(offsets)) and set(range(length)) <= reach
    assert offsets[-1] == length - size if edge != "pad" else offsets[-1] < length


@pytest.mark.parametrize(("length", "size", "overlap"), [(8, 8, 4), (9, 8, 4), (64, 16, 8), (37, 10, 0), (23, 7, 6), (100, 10, 3)])
def test_windows_that_are_spread_overlap_by_at_least_what_is_left_of_the_stride(length, size, overlap):
    starts = window_offsets(length, size, size - overlap, "spread")
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + size == length
    assert all(one + size - other >= overlap for one, other in pairwise(starts))
    assert len(starts) == -(-(length - size) // (size - overlap)) + 1  # no more than are needed


def test_the_edge_rules_differ_only_at_the_end_of_a_side():
    assert window_offsets(10, 4, 3, "shift") == [0, 3, 6]
    offsets = {edge: window_offsets(11, 4, 3, edge) for edge in ("shift", "spread", "pad", "drop")}
    assert offsets == {"shift": [0, 3, 6, 7], "spread": [0, 2, 5, 7], "pad": [0, 3, 6, 9], "drop": [0, 3, 6]}


def test_a_side_shorter_than_a_window_has_one_with_pad_only():
    assert [window_offsets(3, 4, 2, edge) for edge in ("shift", "spread", "pad", "drop")] == [[], [], [0], []]
