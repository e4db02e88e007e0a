"""Scores of the compared recipes as a table: mean and spread over seeds, and the paired difference to a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from crfm_core import DataError
from crfm_core.files import atomic_path, write_text
from crfm_core.layout import Layout
from crfm_core.reporting.measurements import SampleDistances, SamplesAgreement, SegmentorScores, read_mix, read_model
from crfm_core.reporting.text_table import plain_text
from crfm_core.settings import Recipe, Table

#: The scores that are compared; the verdict goes by the first.
SCORES = ("mIoU", "OA", "mAcc", "mF1")
VERSIONS = ("torch", "diffusers", "mmsegmentation")


@dataclass(frozen=True)
class Difference:
    """Mean of n differences in points and its 95 % Student-t interval, which is NaN for n = 1."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What can be said about it."""
        if math.isnan(self.mean):
            return "undefined score"
        if math.isnan(self.low):
            return "one seed: no interval"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "within noise"


def mean_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator; NaN for one value)."""
    array = np.asarray(values, float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two recipes run with the same seeds: position i of both sequences belongs to one seed."""
    mean, sd = mean_sd(np.asarray(values, float) - np.asarray(baseline, float))
    half = float(stdtrit(len(values) - 1, 0.975)) * sd / math.sqrt(len(values))
    return Difference(mean, mean - half, mean + half)


def unpaired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two groups whose members do not belong together: Welch's interval."""
    (mean_a, sd_a), (mean_b, sd_b) = mean_sd(values), mean_sd(baseline)
    part_a, part_b = sd_a**2 / len(values), sd_b**2 / len(baseline)
    variance = part_a + part_b  # NaN where a group has a single value
    half = variance
    if variance > 0:
        freedom = variance**2 / (part_a**2 / (len(values) - 1) + part_b**2 / (len(baseline) - 1))
        half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return Difference(mean_a - mean_b, mean_a - mean_b - half, mean_a - mean_b + half)


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
    mixes: list[Path],
    generation: list[Path],
    table: Table,
    recipes: dict[str, Recipe],
    datasets: list[str],
    seeds: list[int],
    scale: str,
    configuration: str,
    results_root: Path,
    csv: Path,
    text: Path,
) -> pd.DataFrame:
    """Write one row per dataset, segmentor and recipe as CSV, and the same as plain text for a terminal.

    Args:
        scores: the files {results_root}/{dataset}/segmentors/{recipe}/{segmentor}/seed{seed}/scores.json, holding
            :meth:`ConfusionMatrix.scores` (percent) with ``classes`` and ``tiles``.
        mixes: {results_root}/{dataset}/mixes/{recipe}.parquet, what each recipe trained on.
        generation: for a table with ``generation``, {results_root}/{dataset}/generation/{control}/{sampler}.json, and the same in the
            folder agreement, of every recipe with synthetic tiles.
        table: which recipes are compared, with which segmentors, against which baseline.
        recipes: at least those of the table.

    Columns: dataset, segmentor, recipe, verdict; n and seeds; real_tiles, synthetic_tiles and test_tiles; for mIoU, OA, mAcc and mF1
    the mean, sd, every seed's value, and the mean of the paired differences to the baseline of the same dataset and segmentor with its
    95 % interval; ``IoU:CLASS``, ``IoU_sd:CLASS`` and likewise IoU_difference, IoU_low, IoU_high; of tables with ``generation`` the
    columns :data:`WORDS_OF_SAMPLES` and :data:`NUMBERS_OF_SAMPLES`; scale, baseline, configuration, versions.

    Raises DataError naming the file when an input is missing or incomplete.
    """
    known = {Path(path).resolve() for path in (*scores, *mixes, *generation)}
    results, rows = Layout(results_root), []
    for dataset in datasets:
        tiles = {name: read_mix(_given(results.mix(dataset, name), known)) for name in table.recipes}
        seen = {name: _of_samples(results, dataset, recipes[name], known) if table.generation else {} for name in table.recipes}
        for segmentor in table.segmentors:
            files = {name: [_given(results.scores(dataset, name, segmentor, seed), known) for seed in seeds] for name in table.recipes}
            runs = _read_runs(files)
            for recipe, mix in tiles.items():
                baseline = runs[table.baseline] if table.baseline and table.baseline != recipe else None
                row: dict[str, Any] = {"dataset": dataset, "segmentor": segmentor, "recipe": recipe}
                row |= {"verdict": "baseline" if recipe == table.baseline else "", "n": len(seeds), "seeds": " ".join(map(str, seeds))}
                row |= {"real_tiles": mix.real, "synthetic_tiles": len(mix.synthetic)}
                row |= {"pseudo_tiles": mix.pseudo} if any(recipes[name].pseudo for name in table.recipes) else {}
                rows.append(row | _of_runs(runs[recipe], baseline, seeds) | seen[recipe])
    provenance = {"scale": scale, "baseline": table.baseline or "", "configuration": configuration[:12]}
    frame = pd.DataFrame(rows).assign(**provenance, **installed_versions())
    with atomic_path(csv) as aside:
        frame.to_csv(aside, index=False)
    write_text(text, plain_text(frame, table.title, VERSIONS))
    return frame


#: Columns of a table that hold text, whatever it looks like; the second ones are not in every table.
WORDS = ("dataset", "segmentor", "recipe", "verdict", "seeds", "scale", "baseline", "configuration", *VERSIONS)
WORDS_OF_SAMPLES = ("features", "feature_kind", "compared_with", "generation_missing")
NUMBERS_OF_SAMPLES = (
    *("compared_tiles", "samples", "frechet_distance", "kernel_distance", "kernel_distance_sd"),
    *("judge_mIoU", "judge_mIoU_sd", "critic_mIoU", "critic_mIoU_sd"),
)


def read_score_table(path: Path | str) -> pd.DataFrame:
    """Read a table that :func:`make_table` wrote; names stay text whatever they look like."""
    words = (*WORDS, *WORDS_OF_SAMPLES)
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(words, str), keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise DataError(f"{path}: no such table; build it by naming it as a target of the workflow") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{path}: not a table ({error}); delete it and build it again") from None
    numbers = ("n", "real_tiles", "synthetic_tiles", *SCORES)
    missing = [name for name in (*WORDS, *numbers) if name not in frame]
    if missing or frame.empty:
        raise DataError(
            f"{path}: " + (f"columns missing: {', '.join(missing)}" if missing else "no rows") + "; delete it and build it again"
        )
    return frame.fillna({name: "" for name in words if name in frame})


def _given(path: str, known: set[Path]) -> Path:
    if Path(path).resolve() not in known:
        raise DataError(f"{path}: not among the files given; the table needs it, so run the workflow again")
    return Path(path)


def _read_runs(files: dict[str, list[Path]]) -> dict[str, list[SegmentorScores]]:
    """The scores of every recipe and seed; DataError unless all are of the same classes."""
    runs = {path: read_model(path, SegmentorScores) for paths in files.values() for path in paths}
    first = next(iter(runs))
    for path, run in runs.items():
        if run.classes != runs[first].classes:
            raise DataError(f"{path}: is of other classes than {first}; delete both and evaluate the segmentors again")
    return {name: [runs[path] for path in paths] for name, paths in files.items()}


def _of_runs(runs: list[SegmentorScores], baseline: list[SegmentorScores] | None, seeds: list[int]) -> dict[str, Any]:
    """Scores and, where there is a baseline to compare with, differences and verdict."""
    row: dict[str, Any] = {"test_tiles": runs[0].tiles}
    for score in SCORES:
        values = [getattr(run, score) for run in runs]
        row[score], row[f"{score}_sd"] = mean_sd(values)
        row |= {f"{score}_seed{seed}": value for seed, value in zip(seeds, values, strict=True)}
        if baseline:
            gap = paired_difference(values, [getattr(run, score) for run in baseline])
            row |= {f"{score}_difference": gap.mean, f"{score}_low": gap.low, f"{score}_high": gap.high}
            row.setdefault("verdict", gap.verdict)
    for index, name in enumerate(runs[0].classes):
        values = [run.IoU[index] for run in runs]
        defined = [value for value in values if not math.isnan(value)]
        row[f"IoU:{name}"], row[f"IoU_sd:{name}"] = mean_sd(defined) if defined else (math.nan, math.nan)
        if baseline:
            gap = paired_difference(values, [run.IoU[index] for run in baseline])
            row |= {f"IoU_difference:{name}": gap.mean, f"IoU_low:{name}": gap.low, f"IoU_high:{name}": gap.high}
    return row


def _of_samples(results: Layout, dataset: str, recipe: Recipe, known: set[Path]) -> dict[str, Any]:
    """How a recipe's samples compare with real tiles and agree with their masks (sd over copies); empty for real tiles only."""
    if not recipe.samples:
        return dict.fromkeys(WORDS_OF_SAMPLES, "") | dict.fromkeys(NUMBERS_OF_SAMPLES, math.nan)
    found = read_model(_given(results.generation(dataset, *recipe.samples), known), SampleDistances)
    seen = read_model(_given(results.agreement(dataset, *recipe.samples), known), SamplesAgreement)
    words = (found.features, found.kind, found.real.split, found.missing)
    numbers = (found.real.tiles, found.samples, found.fid, found.kid, found.kid_sd)
    agreement = (seen.judge.mIoU, seen.judge.mIoU_sd, seen.critic.mIoU, seen.critic.mIoU_sd)
    return dict(zip((*WORDS_OF_SAMPLES, *NUMBERS_OF_SAMPLES), (*words, *numbers, *agreement), strict=True))
