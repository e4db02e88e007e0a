"""Keep more versions of masks whose classes the critic finds hard (FreeMask, Yang et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.files import hash_of
from crfm_core.manifest import read_manifest
from crfm_core.settings import HardnessResampling

REMEDY = "use another re-sampling"


def choose(
    settings: HardnessResampling, table: pd.DataFrame, manifest: Path, tiles: Path, class_losses: Sequence[float | None], classes: object
) -> np.ndarray:
    """Which rows are kept, bool [N]. The new column ``hardness`` is that of the tile's mask, before any filter (NaN where it has none).

    New layouts that were made from one tile (column ``layout_of``) count as versions of one mask, which is as hard as they are on average.
    """
    if "mask_of" not in table:
        raise DataError(f"{manifest}: no column mask_of, which names the tile whose mask was used; give synthetic tiles")
    masks = read_manifest(tiles)
    known = {tile_id: hardness_of(pixels, class_losses) for tile_id, pixels in zip(masks.tile_id, masks.pixels, strict=True)}
    if foreign := sorted(set(table.mask_of) - known.keys()):
        raise DataError(f"{manifest}: mask_of names {foreign[0]}, which is no tile of {tiles}; give the tiles whose masks were used")
    table["hardness"] = hardness = table.mask_of.map(known)
    if unknown := sorted(set(table.mask_of[hardness.isna()])):
        print(f"{len(unknown)} masks have no class with a mean loss and rank as the easiest, first {unknown[0]}", flush=True)
    if hardness.isna().all():
        raise DataError(f"{tiles}: no mask has a class with a mean loss on real tiles; measure the losses on a split that has the classes")
    versions = table
    if "layout_of" in table:
        versions = table.assign(mask_of=table.layout_of, hardness=hardness.groupby(table.layout_of).transform("mean"))
    chosen = by_hardness(versions, settings.seed)
    counts = Counter(versions.mask_of[chosen].value_counts())
    for versions, count in sorted(counts.items()):
        print(f"{count} masks keep {versions} of their versions", flush=True)
    return chosen


def hardness_of(pixels: Sequence[int], class_losses: Sequence[float | None]) -> float:
    """Mean of the class losses over a mask's pixels; classes without a loss do not count. NaN when there are only such classes."""
    known = [(count, loss) for count, loss in zip(pixels, class_losses, strict=True) if loss is not None]
    total = sum(count for count, _ in known)
    return sum(count * loss for count, loss in known) / total if total else math.nan


def versions_kept(rank: int, masks: int, most: int) -> int:
    """How many of at most ``most`` versions the mask of this rank keeps; the easiest of all ``masks`` has rank 0 (FreeMask)."""
    return min(1 + round(Fraction((rank + 1) * most, masks)), most)


def by_hardness(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Which rows are kept, bool [N]: the harder a mask, the more of its versions, drawn by ``seed`` and id whatever their order.

    Columns ``mask_of`` and ``hardness``; masks without hardness rank as the easiest, equally hard ones in an order drawn by ``seed``.
    """
    versions: dict[str, list[int]] = {}
    drawn, masks = [hash_of("version", seed, tile_id) for tile_id in table.tile_id], list(table.mask_of)
    for row in sorted(range(len(table)), key=drawn.__getitem__):
        versions.setdefault(masks[row], []).append(row)
    hardness = dict(zip(table.mask_of, table.hardness.fillna(-math.inf), strict=True))
    ranked = sorted(versions, key=lambda mask: (hardness[mask], hash_of("mask", seed, mask)))
    most = max(map(len, versions.values()))
    chosen = np.zeros(len(table), dtype=bool)
    for rank, mask in enumerate(ranked):
        chosen[versions[mask][: versions_kept(rank, len(ranked), most)]] = True
    return chosen
