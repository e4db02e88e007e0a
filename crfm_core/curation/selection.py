"""What the steps of curation share: writing the rows they keep, and counting how much of each class is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.manifest import read_manifest, relocate_all, write_manifest


def relocate_rows(table: pd.DataFrame, old: Path | str, new: Path | str) -> pd.DataFrame:
    """The table of the manifest ``old`` with its paths relative to the manifest ``new``; no file is moved."""
    return table.assign(**{column: relocate_all(table[column], old, new) for column in ("image", "label")})


def keep_rows(
    manifest: Path | str, table: pd.DataFrame, chosen: np.ndarray, out: Path | str, classes: Sequence[str], remedy: str
) -> pd.DataFrame:
    """Write the ``chosen`` rows (bool [N]) of ``table``, read from ``manifest``, as the manifest ``out``; print what is left per class.

    Raises DataError with the ``remedy`` when none is chosen.
    """
    kept = table.loc[np.asarray(chosen, dtype=bool)]
    if kept.empty:
        raise DataError(f"{out}: none of the {len(table)} tiles of {manifest} is kept; {remedy}")
    print_counts(table, kept, classes)
    return write_manifest(out, relocate_rows(kept, manifest, out))


def keep_best(
    manifest: Path | str, column: str, scores: Sequence[float | None], keep: float, out: Path | str, classes: Sequence[str]
) -> pd.DataFrame:
    """Write the best share of a manifest's images by their ``scores`` (None: cannot be scored), over all masks and copies, as the
    manifest ``out`` with the scores in the new ``column``; files stay where they are."""
    table, known = read_manifest(manifest), np.array([math.nan if score is None else score for score in scores])
    chosen = best(known, table.tile_id, keep)
    print(f"{column}: {np.nanmean(known):.4g} on average, {np.nanmean(known[chosen]):.4g} of those kept", flush=True)
    return keep_rows(manifest, table.assign(**{column: known}), chosen, out, classes, "raise keep")


def best(scores: np.ndarray, tile_ids: Sequence[str], keep: float) -> np.ndarray:
    """Which rows, bool [N], are among the ceil(keep · N) with the highest scores; NaN is lowest, and ties go to the first id."""
    number = math.ceil(Fraction(str(keep)) * len(scores))  # exact: as floats, 0.07 · 100 is more than 7
    ranked = sorted(zip(np.nan_to_num(scores, nan=-np.inf), tile_ids, range(len(scores)), strict=True), key=lambda one: (-one[0], one[1]))
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[[row for _, _, row in ranked[:number]]] = True
    return chosen


def class_counts(before: pd.DataFrame, after: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """How much of each class is left after a step: one row per class, in the order of the ids.

    Columns: ``name``; ``pixels_before``, ``pixels_after`` and ``dropped``, the share that is gone (NaN where there were none);
    ``tiles_before`` and ``tiles_after`` that show the class. Raises DataError when the manifests are of other classes.
    """
    pixels = [_pixels(table, len(classes)) for table in (before, after)]
    sums, tiles = [each.sum(axis=0) for each in pixels], [(each > 0).sum(axis=0) for each in pixels]
    with np.errstate(invalid="ignore"):
        dropped = 1 - sums[1] / sums[0]
    counts = {"pixels_before": sums[0], "pixels_after": sums[1], "dropped": dropped, "tiles_before": tiles[0], "tiles_after": tiles[1]}
    return pd.DataFrame({"name": list(classes), **counts})


def print_counts(before: pd.DataFrame, after: pd.DataFrame, classes: Sequence[str]) -> None:
    """Print how many tiles are left, and for each class the pixels and tiles before and after."""
    print(f"{len(after)} of {len(before)} tiles kept")
    counts = class_counts(before, after, classes).set_axis(["class", "pixels", "kept", "dropped", "tiles", "kept"], axis="columns")
    print(counts.to_string(index=False, na_rep="–", formatters={"dropped": lambda share: f"{100 * share:.1f} %"}), flush=True)


def _pixels(table: pd.DataFrame, num_classes: int) -> np.ndarray:
    """The column ``pixels`` as int64 [N, K]."""
    wrong = table.tile_id[table.pixels.map(len) != num_classes]
    if len(wrong):
        raise DataError(f"row {wrong.iloc[0]}: pixels of another number of classes than {num_classes}; build its manifest again")
    return np.array(list(table.pixels), dtype=np.int64).reshape(-1, num_classes)
