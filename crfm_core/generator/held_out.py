"""Which held-out tiles a training looks at, and at how many noise levels; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from crfm_core.files import seed_of

#: Tiles that are looked at, at most, and noise levels at which each one's loss is taken.
MOST_HELD_OUT, LEVELS = 64, 8


def held_out_count(tiles: int, share: float) -> int:
    """How many of so many training tiles are left out: a share, at most :data:`MOST_HELD_OUT`, at least one and never all."""
    return min(max(1, round(share * tiles)), MOST_HELD_OUT, tiles - 1)


def choose_held_out(ids: Sequence[str], share: float) -> list[int]:
    """The rows of the tiles that are left out, by the hash of their ids; none of a single tile."""
    return first_by_hash(ids, held_out_count(len(ids), share))


def first_by_hash(ids: Sequence[str], count: int = MOST_HELD_OUT) -> list[int]:
    """The rows of so many tiles, or of all where there are fewer, chosen by the hash of their ids."""
    return sorted(sorted(range(len(ids)), key=lambda row: (seed_of("held out", ids[row]), ids[row]))[:count])
