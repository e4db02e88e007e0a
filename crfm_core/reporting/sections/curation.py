"""What became of the samples on their way into a training set: what every step dropped of which class, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.experiment import NO_FILTER, filter_chain, keeps_every_image
from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults, Pair
from crfm_core.reporting.page import Report
from crfm_core.settings import Dataset, Settings

TITLE = "What was dropped, and why"


@dataclass(frozen=True)
class Step:
    """Synthetic tiles after a step, and before it (of the first step the same); pixels are labelled ones by class."""

    name: str
    why: str
    images: int
    pixels: pd.Series
    images_before: int
    pixels_before: pd.Series

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
    def kept(self) -> pd.Series:
        """Share of each class's pixels, NaN where there were none."""
        return self.pixels / self.pixels_before

    @property
    def edges(self) -> list[tuple[str, float]]:
        """The classes of which least and most was kept, with their shares; none where nothing was dropped."""
        kept = self.kept.dropna()
        if len(kept) < 2 or kept.min() >= 1:
            return []
        return [(name, kept[name]) for name in (kept.idxmin(), kept.idxmax())]


@dataclass(frozen=True)
class Curated:
    """A recipe's synthetic tiles step by step."""

    name: str
    steps: list[Step]
    leading: bool

    @property
    def left(self) -> pd.Series:
        """Share of each class's sampled pixels that is trained on."""
        return self.steps[-1].pixels / self.steps[0].pixels


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """The steps of every recipe with synthetic tiles, the critic's labels of unlabelled tiles, what all recipes were mixed of, and a
    figure of what is left per class."""
    settings, name = report.settings, results.dataset.name
    curated = [
        Curated(recipe, _steps(recipe, pair, results, settings), recipe in results.leading)
        for recipe in results.mixes
        if (pair := settings.recipes[recipe].samples)
    ]
    if not any(one.leading for one in curated):
        curated = [replace(one, leading=True) for one in curated]
    shown = {one.name: ((100 * one.left).tolist(), None) for one in curated if one.leading}
    figure = None
    if shown:
        hues = report.colours.of_recipes(shown)
        drawn = draw.class_bars(shown, results.dataset.classes, hues, "left in percent", report.pictures.folder, f"{name}-curation")
        figure = report.pictures(drawn, "Share of each class's sampled pixels that reaches the training set, per recipe")
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in curated:
        for step in one.steps:
            reasons.setdefault((step.name, step.why), []).append(one.name)
    return {
        "curated": curated,
        "reasons": [{"step": step, "why": why, "recipes": names} for (step, why), names in reasons.items()],
        "pseudo_labels": next((_labelled(table, results) for table in results.pseudo_labels.values()), None),
        "mixes": [{"name": recipe, "recipe": settings.recipes[recipe], "mix": mix} for recipe, mix in results.mixes.items()],
        "warnings": [
            f"The mix of {one.name} holds no synthetic tile: it was trained on its {results.mixes[one.name].real} real tiles alone."
            for one in curated
            if not one.steps[-1].images
        ],
        "figure": figure,
    }


def _labelled(table: pd.DataFrame, results: DatasetResults) -> dict:
    """The critic's labels of unlabelled tiles: how many tiles, and per class the pixels, their shares beside those of the real tiles, and
    the tiles that show it."""
    (file,), dataset = results.files["pseudo_labels"].values(), results.dataset
    pixels, real = _pixels(table, file, dataset), _pixels(results.tiles, results.files["tiles"][dataset.train], dataset)
    shown = (pd.DataFrame(table.pixels.tolist(), columns=dataset.classes) > 0).sum()
    shares = [counts / counts.sum() for counts in (pixels, real)]
    rows = [
        {"name": one, "pixels": pixels[one], "share": shares[0][one], "real": shares[1][one], "tiles": shown[one]} for one in pixels.index
    ]
    return {"tiles": len(table), "labelled": pixels.sum() / (table.width.astype(int) * table.height).sum(), "classes": rows}


def _steps(name: str, pair: Pair, results: DatasetResults, settings: Settings) -> list[Step]:
    recipe, mix, files, dataset = settings.recipes[name], results.mixes[name], results.files, results.dataset
    steps: list[Step] = []

    def then(title: str, why: str, kind: str, key: str | tuple[str, ...], table: pd.DataFrame) -> None:
        pixels = _pixels(table, files[kind][key], dataset)
        before = steps[-1] if steps else Step(title, why, len(table), pixels, len(table), pixels)
        steps.append(Step(title, why, len(table), pixels, before.images, before.pixels))

    table = results.synthetic[pair]
    copies = table.groupby("mask_of").size()
    each = f"{copies.min()}" if copies.min() == copies.max() else f"{copies.min()} to {copies.max()}"
    then("sampled", f"{each} for each of {len(copies)} masks", "synthetic", pair, table)
    clip = Path(settings.clip.folder).name if settings.clip else ""
    chain = filter_chain(settings, recipe.filter)
    for one in chain:
        why = settings.filters[one].describe(dataset.train, clip)
        then(f"filter {one}", why, "filtered", (*pair, one), results.filtered[(*pair, one)])
    if recipe.resample:
        of = (*pair, recipe.filter or NO_FILTER, recipe.resample)
        why = settings.resamplings[recipe.resample].describe()
        then(f"re-sampling {recipe.resample}", why, "resampled", of, results.resampled[of])
    drawn = not keeps_every_image(settings, name)
    most = f"{'at most ' if drawn else ''}{recipe.synthetic_per_real} for each of {mix.real} real tiles"
    order = "drawn among those left, whatever their copy" if drawn else "first copies before second ones"
    then("mixed in", f"takes {most}, {order}", "mixes", name, mix.synthetic)
    return steps


def _pixels(table: pd.DataFrame, file: Path, dataset: Dataset) -> pd.Series:
    """Labelled pixels per class of all tiles together."""
    classes = len(dataset.classes)
    for tile_id, counts in zip(table.tile_id, table.pixels, strict=True):
        if len(counts) != classes:
            raise DataError(f"{file}: row {tile_id}: counts {len(counts)} classes, the dataset has {classes}; delete it and run again")
    return pd.DataFrame(table.pixels.tolist(), columns=dataset.classes, dtype="int64").sum()
