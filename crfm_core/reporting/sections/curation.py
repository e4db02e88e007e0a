"""What became of the samples on their way into a training set: what every step dropped of which class, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.experiment import filter_chain
from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.mixes import Mix
from crfm_core.reporting.report import Report
from crfm_core.settings import Dataset, Recipe, Settings

TITLE = "What was dropped, and why"


@dataclass(frozen=True)
class Step:
    """Synthetic tiles before (None for the first step) and after a step; pixels are labelled ones, int64 per class."""

    name: str
    why: str
    file: Path
    images: int
    pixels: np.ndarray
    images_before: int | None = None
    pixels_before: np.ndarray | None = None

    @property
    def images_kept(self) -> float:
        """Share of the images."""
        return self.images / self.images_before if self.images_before else math.nan

    @property
    def pixels_kept(self) -> float:
        """Share of the labelled pixels."""
        before = self.pixels_before.sum()
        return float(self.pixels.sum() / before) if before else math.nan

    @property
    def kept(self) -> list[float]:
        """Share of each class's pixels, NaN where there were none."""
        return _shares(self.pixels, self.pixels_before)

    def edges(self, classes: list[str]) -> list[tuple[str, float]]:
        """The classes of which least and most was kept, with their shares; none where nothing was dropped."""
        if self.pixels_before is None:
            return []
        known = [(name, share) for name, share in zip(classes, self.kept, strict=True) if not math.isnan(share)]
        if len(known) < 2 or min(share for _, share in known) >= 1:
            return []
        return [min(known, key=lambda pair: pair[1]), max(known, key=lambda pair: pair[1])]


@dataclass(frozen=True)
class Curated:
    """A recipe's synthetic tiles step by step, and its mix with real ones."""

    name: str
    recipe: Recipe
    steps: list[Step]
    mix: Mix
    leading: bool

    @property
    def left(self) -> list[float]:
        """Share of each class's sampled pixels that is trained on."""
        return _shares(self.steps[-1].pixels, self.steps[0].pixels)


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """The steps of every recipe with synthetic tiles, what all recipes were mixed of, and a figure of what is left per class."""
    settings: Settings = report.settings
    curated, warnings = [], []
    for name, mix in results.mixes.items():
        recipe = settings.recipes[name]
        if not recipe.control:
            continue
        if mix.synthetic.empty:
            warnings.append(f"The mix of {name} holds no synthetic tile: this recipe was trained on its {mix.real} real tiles alone.")
        curated.append(Curated(name, recipe, _steps(name, recipe, mix, results, settings), mix, name in results.leading))
    if curated and not any(one.leading for one in curated):
        curated = [Curated(one.name, one.recipe, one.steps, one.mix, True) for one in curated]
    shown = [one for one in curated if one.leading]
    figure = None
    if shown:
        classes, hues = results.dataset.classes, report.colours.of_recipes(one.name for one in shown)
        bars = {one.name: ([100 * share for share in one.left], None) for one in shown}
        drawn = draw.class_bars(bars, classes, hues, "left in percent", report.pictures.folder, f"{results.dataset.name}-curation")
        figure = report.pictures(drawn, "Share of each class's sampled pixels that reaches the training set, per recipe")
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in curated:
        for step in one.steps:
            reasons.setdefault((step.name, step.why), []).append(one.name)
    told = [{"step": step, "why": why, "recipes": names} for (step, why), names in reasons.items()]
    mixes = [{"name": name, "recipe": settings.recipes[name], "mix": mix} for name, mix in results.mixes.items()]
    return {"curated": curated, "reasons": told, "mixes": mixes, "warnings": warnings, "figure": figure}


def _steps(name: str, recipe: Recipe, mix: Mix, results: DatasetResults, settings: Settings) -> list[Step]:
    key, files, dataset = (recipe.control, recipe.sampler), results.files, results.dataset

    def of(kind: str, key: tuple) -> tuple[Path, pd.DataFrame]:
        return files[kind][key], getattr(results, kind)[key]

    file, table = of("synthetic", key)
    copies = table.groupby("mask_of").size()
    each = f"{copies.min()}" if copies.min() == copies.max() else f"{copies.min()} to {copies.max()}"
    steps = [Step("sampled", f"{each} for each of {len(copies)} masks", file, len(table), _pixels(table, file, dataset))]

    def then(title: str, why: str, file: Path, table: pd.DataFrame) -> None:
        before = steps[-1]
        steps.append(Step(title, why, file, len(table), _pixels(table, file, dataset), before.images, before.pixels))

    clip = Path(settings.clip.folder).name if settings.clip else ""
    chain = filter_chain(settings, recipe.filter)
    for one in chain:
        then(f"filter {one}", settings.filters[one].describe(dataset.train, clip), *of("filtered", (*key, one)))
    if recipe.resample:
        why = settings.resamplings[recipe.resample].describe()
        then(f"re-sampling {recipe.resample}", why, *of("resampled", (*key, recipe.filter or "none", recipe.resample)))
    drawn = recipe.resample or any(settings.filters[one].DROPS_IMAGES for one in chain)
    most = f"{'at most ' if drawn else ''}{recipe.synthetic_per_real} for each of {mix.real} real tiles"
    order = "drawn among those left, whatever their copy" if drawn else "first copies before second ones"
    then("mixed in", f"takes {most}, {order}", files["mixes"][name], mix.synthetic)
    return steps


def _pixels(table: pd.DataFrame, file: Path, dataset: Dataset) -> np.ndarray:
    """Labelled pixels per class of all tiles together."""
    classes = len(dataset.classes)
    for tile_id, counts in zip(table.tile_id, table.pixels, strict=True):
        if len(counts) != classes:
            raise DataError(f"{file}: row {tile_id}: counts {len(counts)} classes, the dataset has {classes}; delete it and run again")
    return np.array([list(counts) for counts in table.pixels], np.int64).reshape(-1, classes).sum(axis=0)


def _shares(after: np.ndarray, before: np.ndarray) -> list[float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return [float(share) for share in np.where(before > 0, after / before, np.nan)]
