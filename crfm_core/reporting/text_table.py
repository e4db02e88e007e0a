"""A table as plain text, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd

from crfm_core.reporting.measurements import distance_names

TABLE_WIDTH = 100  #: widest line
NAMES = 16  #: widest name of a recipe
SHOWN = ("mIoU", "OA", "mAcc")  #: scores; the file has all


def plain_text(frame: pd.DataFrame, title: str, versions: Sequence[str]) -> str:
    """The rows of a table of :func:`crfm_core.reporting.tables.make_table`, no line wider than :data:`TABLE_WIDTH`; ``versions`` names the
    columns that hold those of libraries."""
    first = frame.iloc[0]
    runs = f"{first.n} seeds ({first.seeds})" if first.n > 1 else f"one seed ({first.seeds}), so no spread and no interval"
    lines = [title, f"scale {first.scale}; percent on the test split, mean ± sd over {runs}"]
    for (dataset, segmentor), rows in frame.groupby(["dataset", "segmentor"], sort=False):
        counts = " to ".join(str(count) for count in sorted({rows.real_tiles.min(), rows.real_tiles.max()}))
        lines += ["", f"dataset {dataset}, segmentor {segmentor}, {counts} real tiles", *_scores(rows, first.baseline)]
        if "features" in rows and (rows.features != "").any():
            lines += ["", *_samples(rows[rows.features != ""])]
    lines += ["", f"configuration {first.configuration}; " + ", ".join(f"{name} {first[name]}" for name in versions)]
    return "\n".join(_cut(line) for line in lines) + "\n"


def _scores(rows: pd.DataFrame, baseline: str) -> list[str]:
    counts = {"synthetic": "synthetic_tiles", "pseudo": "pseudo_tiles"}
    counts = {name: column for name, column in counts.items() if column in rows}
    cells = [["recipe", *counts, *SHOWN, f"mIoU against {baseline} [95 %]" if baseline else ""]]
    for _, row in rows.iterrows():
        said = row.verdict
        if pd.notna(gap := row.get("mIoU_difference")):
            interval = "" if pd.isna(row.mIoU_low) else f" [{row.mIoU_low:+.1f}, {row.mIoU_high:+.1f}]"
            said = f"{gap:+.1f}{interval}  {row.verdict}"
        cells.append(
            [row.recipe, *(str(row[column] or "-") for column in counts.values()), *(_spread(row, score) for score in SHOWN), said]
        )
    return _aligned(cells)


def _samples(rows: pd.DataFrame) -> list[str]:
    """How the samples of the recipes compare with real tiles and with their masks."""
    first = rows.iloc[0]
    lines = textwrap.wrap(f"samples against {first.compared_tiles:.0f} tiles of {first.compared_with}, by {first.features}", TABLE_WIDTH)
    lines.append("mIoU of samples with their masks: by the judge it is evidence, by the critic it is not")
    cells = [["recipe", "samples", *distance_names(first.feature_kind), "judge", "critic"]]
    for _, row in rows.iterrows():
        measured = [_spread(row, "frechet_distance", 2), _spread(row, "kernel_distance", 4), _spread(row, "judge_mIoU")]
        cells.append([row.recipe, f"{row.samples:.0f}", *measured, _spread(row, "critic_mIoU")])
    lines += _aligned(cells)
    for reason in dict.fromkeys(reason for reason in rows.generation_missing if reason):
        lines += textwrap.wrap(f"no distance: {reason}", TABLE_WIDTH)
    return lines


def _spread(row: pd.Series, score: str, digits: int = 1) -> str:
    """``69.0 ± 1.1``; only the mean where there is no sd, ``-`` where there is no mean."""
    mean, sd = row[score], row.get(f"{score}_sd")
    if pd.isna(mean):
        return "-"
    return f"{mean:.{digits}f}" if pd.isna(sd) else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Cells in columns as wide as their widest cell."""
    rows = [[_cut(name, NAMES), *cells] for name, *cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cut(text: str, width: int = TABLE_WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
