"""Scores of the compared recipes as a table: mean and spread over seeds, and the paired difference to a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from crfm_core import DataError
from crfm_core.files import atomic_path, read_json, write_text
from crfm_core.settings import Table

#: The scores that are compared; the verdict goes by the first.
SCORES = ("mIoU", "OA", "mAcc")
VERSIONS = ("torch", "diffusers", "mmsegmentation")
WIDTH = 100  #: widest line of the plain-text table


@dataclass(frozen=True)
class Difference:
    """Mean of n differences in points, its 95 % Student-t interval (None for n = 1), and what can be said about it."""

    mean: float
    low: float | None
    high: float | None
    verdict: str


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator; NaN for one value)."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _verdict(low: float, high: float) -> str:
    return "higher" if low > 0 else "lower" if high < 0 else "within noise"


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two recipes run with the same seeds: position i of both sequences belongs to one seed."""
    mean, sd = mean_sd(np.asarray(values, float) - np.asarray(baseline, float))
    n = len(values)
    if math.isnan(mean):
        return Difference(mean, None, None, "undefined score")
    if n == 1:
        return Difference(mean, None, None, "one seed: no interval")
    half = float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, _verdict(mean - half, mean + half))


def unpaired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two groups whose members do not belong together: Welch's interval."""
    (mean_a, sd_a), (mean_b, sd_b) = mean_sd(values), mean_sd(baseline)
    part_a, part_b = sd_a**2 / len(values), sd_b**2 / len(baseline)
    mean = mean_a - mean_b
    if math.isnan(part_a + part_b):
        return Difference(mean, None, None, "one copy: no interval")
    if part_a + part_b == 0:
        return Difference(mean, mean, mean, _verdict(mean, mean))
    freedom = (part_a + part_b) ** 2 / (part_a**2 / (len(values) - 1) + part_b**2 / (len(baseline) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(part_a + part_b)
    return Difference(mean, mean - half, mean + half, _verdict(mean - half, mean + half))


def installed_versions() -> dict[str, str]:
    """Versions of the libraries the scores depend on, read without importing them."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed here"
    return found


def make_table(
    scores: list[Path],
    table: Table,
    datasets: list[str],
    seeds: list[int],
    scale: str,
    configuration: str,
    results_root: Path,
    csv: Path,
    text: Path,
) -> pd.DataFrame:
    """Write one row per dataset and recipe as CSV, and the same as plain text for a terminal.

    Args:
        scores: the files {results_root}/{dataset}/segmentors/{recipe}/{segmentor}/seed{seed}/scores.json, holding
            :meth:`ConfusionMatrix.scores` (percent) with ``classes`` and ``tiles``.
        table: which recipes are compared, with which segmentor, against which baseline.

    Columns: dataset, recipe, verdict; n and seeds; for mIoU, OA and mAcc the mean, sd, every seed's value, and the mean of the paired
    differences to the baseline with its 95 % interval; ``IoU:CLASS`` and ``IoU_sd:CLASS``; scale, segmentor, configuration, versions.
    Raises DataError naming the file when a score is missing or incomplete.
    """
    given = {Path(path).resolve() for path in scores}
    rows = []
    for dataset in datasets:
        runs = {}
        for recipe in table.recipes:
            folder = Path(results_root) / dataset / "segmentors" / recipe / table.segmentor
            runs[recipe] = [_read_scores(folder / f"seed{seed}" / "scores.json", given) for seed in seeds]
        for recipe in table.recipes:
            rows.append(
                {"dataset": dataset, "recipe": recipe, **_row(runs[recipe], runs.get(table.baseline), seeds, recipe == table.baseline)}
            )
    provenance = {"scale": scale, "segmentor": table.segmentor, "baseline": table.baseline or "", "configuration": configuration[:12]}
    frame = pd.DataFrame(rows).assign(**provenance, **installed_versions())
    with atomic_path(csv) as aside:
        frame.to_csv(aside, index=False)
    write_text(text, plain_text(frame, table.title))
    return frame


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a table that :func:`make_table` wrote; names stay text whatever they look like."""
    words = ("dataset", "recipe", "verdict", "seeds", "scale", "segmentor", "baseline", "configuration", *VERSIONS)
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(words, str), keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise DataError(f"{path}: no such table; build it by naming it as a target of the workflow") from None
    missing = [name for name in words if name not in frame]
    if missing or frame.empty:
        raise DataError(
            f"{path}: " + (f"columns missing: {', '.join(missing)}" if missing else "no rows") + "; delete it and build it again"
        )
    return frame.fillna(dict.fromkeys(words, ""))


def _read_scores(path: Path, given: set[Path]) -> dict:
    if path.resolve() not in given:
        raise DataError(f"{path}: not among the scores given; the table needs it")
    found = read_json(path)
    missing = [key for key in (*SCORES, "IoU", "classes") if key not in found]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing; delete it and evaluate the segmentor again")
    return found


def _row(runs: list[dict], baseline: list[dict] | None, seeds: list[int], is_baseline: bool) -> dict:
    row: dict = {"verdict": "", "n": len(runs), "seeds": " ".join(map(str, seeds))}
    for score in SCORES:
        values = _column(runs, score)
        row[score], row[f"{score}_sd"] = mean_sd(values)
        row |= {f"{score}_seed{seed}": value for seed, value in zip(seeds, values, strict=True)}
        if baseline and not is_baseline:
            gap = paired_difference(values, _column(baseline, score))
            row |= {f"{score}_difference": gap.mean, f"{score}_low": gap.low, f"{score}_high": gap.high}
            row["verdict"] = row["verdict"] or gap.verdict
    if is_baseline:
        row["verdict"] = "baseline"
    for index, name in enumerate(runs[0]["classes"]):
        known = [run["IoU"][index] for run in runs if run["IoU"][index] is not None]
        row[f"IoU:{name}"], row[f"IoU_sd:{name}"] = mean_sd(known) if known else (math.nan, math.nan)
    return row


def _column(runs: list[dict], score: str) -> list[float]:
    return [math.nan if run[score] is None else run[score] for run in runs]


# ------------------------------------------------------------------------------------------------------------------ text


def spread(mean: float, sd: float) -> str:
    """``69.0 ± 1.1``; only the mean when there is no sd, ``-`` when there is no mean."""
    if mean is None or math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if sd is None or math.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"


def interval(mean: float, low: float | None, high: float | None) -> str:
    """``+1.2 [-0.3, +2.7]``; without an interval only the mean."""
    if mean is None or math.isnan(mean):
        return "-"
    return f"{mean:+.1f}" if low is None or math.isnan(low) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def plain_text(frame: pd.DataFrame, title: str) -> str:
    """The table for a terminal, no line wider than :data:`WIDTH` columns."""
    first = frame.iloc[0]
    lines = [
        _cut(title),
        _cut(f"scale {first.scale}, segmentor {first.segmentor}, {first.n} seeds ({first.seeds}); percent, mean ± sd over seeds"),
    ]
    names = max(len("recipe"), *frame.recipe.str.len())
    widths = [min(names, 20), 12, 12, 12]
    against = f"mIoU against {first.baseline} [95 %]" if first.baseline else ""
    for dataset, rows in frame.groupby("dataset", sort=False):
        lines += ["", _cut(f"dataset {dataset}"), _line(["recipe", *SCORES, against], widths)]
        for _, row in rows.iterrows():
            cells = [row.recipe, *(spread(row[score], row[f"{score}_sd"]) for score in SCORES)]
            gap = row.get("mIoU_difference", math.nan)
            cells.append(row.verdict if pd.isna(gap) else f"{interval(gap, row.mIoU_low, row.mIoU_high)}  {row.verdict}")
            lines.append(_line(cells, widths))
    lines += ["", f"configuration {first.configuration}; " + ", ".join(f"{name} {first[name]}" for name in VERSIONS)]
    return "\n".join(_cut(line) for line in lines) + "\n"


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [_cut(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, *cells[len(widths) :]]).rstrip()


def _cut(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
