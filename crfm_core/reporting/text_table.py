"""A table as plain text, for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import pandas as pd

TABLE_WIDTH = 100  #: widest line
NAMES = 16  #: widest name of a recipe
SHOWN = ("mIoU", "OA", "mAcc")  #: scores; the file has all


def spread(mean: float, sd: float, digits: int = 1) -> str:
    """``69.0 ± 1.1``; only the mean when there is no sd, ``-`` when there is no mean."""
    if pd.isna(mean):
        return "-"
    return f"{mean:.{digits}f}" if pd.isna(sd) else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def interval(mean: float, low: float | None, high: float | None) -> str:
    """``+1.2 [-0.3, +2.7]``; without an interval only the mean."""
    if pd.isna(mean):
        return "-"
    return f"{mean:+.1f}" if pd.isna(low) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def plain_text(frame: pd.DataFrame, title: str, versions: Sequence[str]) -> str:
    """The rows of a table of :func:`crfm_core.reporting.tables.make_table`, no line wider than :data:`TABLE_WIDTH`; ``versions`` names the
    columns that hold those of libraries."""
    first = frame.iloc[0]
    runs = f"{first.n} seeds ({first.seeds})" if first.n > 1 else f"one seed ({first.seeds}), so no spread and no interval"
    lines = [title, f"scale {first.scale}; percent on the test split, mean ± sd over {runs}"]
    names = min(NAMES, max(len("recipe"), *frame.recipe.str.len()))
    against = f"mIoU against {first.baseline} [95 %]" if first.baseline else ""
    for (dataset, segmentor), rows in frame.groupby(["dataset", "segmentor"], sort=False):
        lines += ["", f"dataset {dataset}, segmentor {segmentor}, {_counts(rows.real_tiles)} real tiles"]
        lines.append(_line(["recipe", "synthetic", *SHOWN, against], [names, 9, 11, 11, 11]))
        for _, row in rows.iterrows():
            gap = row.get("mIoU_difference", math.nan)
            said = row.verdict if pd.isna(gap) else f"{interval(gap, row.mIoU_low, row.mIoU_high)}  {row.verdict}"
            scores = [spread(row[score], row[f"{score}_sd"]) for score in SHOWN]
            lines.append(_line([row.recipe, str(row.synthetic_tiles or "-"), *scores, said], [names, 9, 11, 11, 11]))
        if "features" in rows:
            lines += _samples(rows, names)
    lines += ["", f"configuration {first.configuration}; " + ", ".join(f"{name} {first[name]}" for name in versions)]
    return "\n".join(_cut(line) for line in lines) + "\n"


def _samples(rows: pd.DataFrame, names: int) -> list[str]:
    """How the samples of the recipes compare with real tiles and with their masks."""
    made = rows[rows.features != ""]
    if made.empty:
        return []
    first = made.iloc[0]
    distances = ("FID", "KID") if first.feature_kind == "inception" else ("Fréchet", "kernel")
    lines = [
        "",
        *textwrap.wrap(f"samples against {first.compared_tiles:.0f} tiles of {first.compared_with}, by {first.features}", TABLE_WIDTH),
    ]
    lines.append("mIoU of samples with their masks: by the judge it is evidence, by the critic it is not")
    widths = [names, 9, 9, 17, 11, 11]
    lines.append(_line(["recipe", "samples", *distances, "judge", "critic"], widths))
    for _, row in made.iterrows():
        cells = [row.recipe, f"{row.samples:.0f}", "-" if pd.isna(row.frechet_distance) else f"{row.frechet_distance:.2f}"]
        cells += [spread(row.kernel_distance, row.kernel_distance_sd, 4), spread(row.judge_mIoU, row.judge_mIoU_sd)]
        lines.append(_line([*cells, spread(row.critic_mIoU, row.critic_mIoU_sd)], widths))
    for reason in dict.fromkeys(reason for reason in made.generation_missing if reason):
        lines += textwrap.wrap(f"no distance: {reason}", TABLE_WIDTH)
    return lines


def _counts(numbers: pd.Series) -> str:
    least, most = int(numbers.min()), int(numbers.max())
    return str(least) if least == most else f"{least} to {most}"


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [_cut(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, *cells[len(widths) :]]).rstrip()


def _cut(text: str, width: int = TABLE_WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
