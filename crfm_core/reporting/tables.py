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
from crfm_core.files import atomic_path, write_text
from crfm_core.layout import Layout
from crfm_core.reporting.measurements import SampleDistances, SamplesAgreement, SegmentorScores, as_float, given
from crfm_core.reporting.mixes import read_mix
from crfm_core.reporting.reading import read_model
from crfm_core.reporting.text_table import plain_text
from crfm_core.settings import Recipe, Table

#: The scores that are compared; the verdict goes by the first.
SCORES = ("mIoU", "OA", "mAcc", "mF1")
VERSIONS = ("torch", "diffusers", "mmsegmentation")


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


def verdict_of(low: float, high: float) -> str:
    """What an interval of a difference allows to say."""
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
    return Difference(mean, mean - half, mean + half, verdict_of(mean - half, mean + half))


def unpaired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two groups whose members do not belong together: Welch's interval."""
    (mean_a, sd_a), (mean_b, sd_b) = mean_sd(values), mean_sd(baseline)
    part_a, part_b = sd_a**2 / len(values), sd_b**2 / len(baseline)
    mean = mean_a - mean_b
    if math.isnan(part_a + part_b):
        return Difference(mean, None, None, "one copy: no interval")
    if part_a + part_b == 0:
        return Difference(mean, mean, mean, verdict_of(mean, mean))
    freedom = (part_a + part_b) ** 2 / (part_a**2 / (len(values) - 1) + part_b**2 / (len(baseline) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(part_a + part_b)
    return Difference(mean, mean - half, mean + half, verdict_of(mean - half, mean + half))


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
    columns of :func:`_of_samples`; scale, baseline, configuration, versions.

    Raises DataError naming the file when an input is missing or incomplete.
    """
    known = {Path(path).resolve() for path in (*scores, *mixes, *generation)}
    results, rows = Layout(results_root), []
    for dataset in datasets:
        tiles = {name: read_mix(given(Path(results.mix(dataset, name)), known, "the table")) for name in table.recipes}
        counts = {name: {"real_tiles": mix.real, "synthetic_tiles": len(mix.synthetic)} for name, mix in tiles.items()}
        seen = {name: _of_samples(results, dataset, recipes[name], known) if table.generation else {} for name in table.recipes}
        for segmentor in table.segmentors:
            files = {name: [Path(results.scores(dataset, name, segmentor, seed)) for seed in seeds] for name in table.recipes}
            runs = _read_runs(files, known)
            for recipe in table.recipes:
                row = {"dataset": dataset, "segmentor": segmentor, "recipe": recipe, "verdict": ""}
                row |= {"n": len(seeds), "seeds": " ".join(map(str, seeds)), **counts[recipe]}
                rows.append(row | _row(runs[recipe], runs.get(table.baseline), seeds, recipe == table.baseline) | seen[recipe])
    provenance = {"scale": scale, "baseline": table.baseline or "", "configuration": configuration[:12]}
    frame = pd.DataFrame(rows).assign(**provenance, **installed_versions())
    with atomic_path(csv) as aside:
        frame.to_csv(aside, index=False)
    write_text(text, plain_text(frame, table.title, VERSIONS))
    return frame


#: Columns of a table that hold text, whatever it looks like; the second ones are not in every table.
WORDS = ("dataset", "segmentor", "recipe", "verdict", "seeds", "scale", "baseline", "configuration", *VERSIONS)
WORDS_OF_SAMPLES = ("features", "feature_kind", "compared_with", "generation_missing")


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


def _read_runs(files: dict[str, list[Path]], known: set[Path]) -> dict[str, list[SegmentorScores]]:
    """The scores of every recipe and seed; DataError unless all are of the same classes."""
    runs = {name: [read_model(given(path, known, "the table"), SegmentorScores) for path in paths] for name, paths in files.items()}
    (first, *_), *_ = files.values()
    (one, *_), *_ = runs.values()
    for name, paths in files.items():
        for path, run in zip(paths, runs[name], strict=True):
            if run.classes != one.classes:
                raise DataError(f"{path}: is of other classes than {first}; delete both and evaluate the segmentors again")
    return runs


def _row(runs: list[SegmentorScores], baseline: list[SegmentorScores] | None, seeds: list[int], is_baseline: bool) -> dict:
    row: dict = {"verdict": "baseline" if is_baseline else "", "test_tiles": runs[0].tiles}
    compared = baseline if not is_baseline else None
    for score in SCORES:
        values = [as_float(getattr(run, score)) for run in runs]
        row[score], row[f"{score}_sd"] = mean_sd(values)
        row |= {f"{score}_seed{seed}": value for seed, value in zip(seeds, values, strict=True)}
        if compared:
            gap = paired_difference(values, [as_float(getattr(run, score)) for run in compared])
            row |= {f"{score}_difference": gap.mean, f"{score}_low": gap.low, f"{score}_high": gap.high}
            row["verdict"] = row["verdict"] or gap.verdict
    for index, name in enumerate(runs[0].classes):
        values = [as_float(run.IoU[index]) for run in runs]
        defined = [value for value in values if not math.isnan(value)]
        row[f"IoU:{name}"], row[f"IoU_sd:{name}"] = mean_sd(defined) if defined else (math.nan, math.nan)
        if compared:
            gap = paired_difference(values, [as_float(run.IoU[index]) for run in compared])
            row |= {f"IoU_difference:{name}": gap.mean, f"IoU_low:{name}": gap.low, f"IoU_high:{name}": gap.high}
    return row


def _of_samples(results: Layout, dataset: str, recipe: Recipe, known: set[Path]) -> dict:
    """How a recipe's samples compare with real tiles and agree with their masks; empty for real tiles only.

    Columns: features, feature_kind, compared_with, compared_tiles, samples, frechet_distance, kernel_distance, kernel_distance_sd, and
    generation_missing, the reason where there are none; judge_mIoU, judge_mIoU_sd, critic_mIoU, critic_mIoU_sd (sd over copies).
    """
    columns = ("features", "feature_kind", "compared_with", "generation_missing")
    numbers = ("compared_tiles", "samples", "frechet_distance", "kernel_distance", "kernel_distance_sd")
    if not recipe.control:
        both = [f"{who}_mIoU{sd}" for who in ("judge", "critic") for sd in ("", "_sd")]
        return dict.fromkeys(columns, "") | dict.fromkeys((*numbers, *both), math.nan)
    paths = [name_path(dataset, recipe.control, recipe.sampler) for name_path in (results.generation, results.agreement)]
    files = [given(Path(path), known, "the table") for path in paths]
    measured, agreement = read_model(files[0], SampleDistances), read_model(files[1], SamplesAgreement)
    row = dict(zip(columns, (measured.features, measured.kind, measured.real.split, measured.missing), strict=True))
    row |= dict(zip(numbers, (measured.real.tiles, measured.samples, measured.fid, measured.kid, measured.kid_sd), strict=True))
    for who in ("judge", "critic"):
        row |= {f"{who}_mIoU": agreement.by(who).mIoU, f"{who}_mIoU_sd": agreement.by(who).mIoU_sd}
    return row
