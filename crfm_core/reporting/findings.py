"""What the numbers say, as sentences: made from the numbers alone, and what is within noise is called so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from crfm_core.reporting.tables import Difference, paired_difference, unpaired_difference
from crfm_core.settings import Recipe, Settings


@dataclass(frozen=True)
class Finding:
    """A question with its answer; ``tone`` is good, bad or open."""

    question: str
    headline: str
    tone: str
    sentences: list[str] = field(default_factory=list)


def number(value: float | None, sign: bool = False, digits: int = 1) -> str:
    """A number of decimals, with a minus sign as printers set it."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def points(value: float) -> str:
    """``1.0 point``, ``1.2 points``."""
    text = number(abs(value))
    return f"{text} point" if text == "1.0" else f"{text} points"


def said(gap: Difference, score: str = "mIoU") -> str:
    """The predicate of a sentence about a difference."""
    if math.isnan(gap.mean):
        return f"has no defined {score}"
    if gap.low is None:
        return f"differs by {number(gap.mean, True)} points of {score}, a single run from which no interval follows"
    span = f"95 % interval {number(gap.low, True)} to {number(gap.high, True)}"
    if gap.verdict == "within noise":
        return f"differs by {number(gap.mean, True)} points of {score}, which is within noise ({span})"
    return f"{'gains' if gap.mean > 0 else 'loses'} {points(gap.mean)} of {score} ({span})"


def gap_of(row: pd.Series) -> Difference:
    """The difference to the baseline that a row of a table holds."""
    low, high = (None if pd.isna(row[key]) else float(row[key]) for key in ("mIoU_low", "mIoU_high"))
    return Difference(float(row.mIoU_difference), low, high, row.verdict)


def seeds_of(row: pd.Series, score: str = "mIoU") -> list[float]:
    """Every seed's value of a score in a row of a table."""
    return [float(row[f"{score}_seed{seed}"]) for seed in row.seeds.split()]


def against_baseline(rows: pd.DataFrame, question: str, recipes: dict[str, Recipe]) -> Finding | None:
    """Do the recipes beat the table's baseline? Recipes with synthetic tiles decide where the baseline has none."""
    baseline = rows.baseline.iloc[0]
    if not baseline or len(rows) < 2:
        return None
    synthetic = {name for name in rows.recipe if recipes[name].control}
    deciding = [row for _, row in rows.iterrows() if row.recipe != baseline and (row.recipe in synthetic or baseline in synthetic)]
    asides = [row for _, row in rows.iterrows() if row.recipe != baseline and row.recipe not in synthetic and baseline not in synthetic]
    gaps = {row.recipe: gap_of(row) for row in deciding}
    headline, tone = _headline(gaps, baseline)
    base = rows[rows.recipe == baseline].iloc[0]
    sentences = [f"The baseline {baseline} reaches {_level(base)}."]
    sentences += [f"{row.recipe} reaches {_level(row)}: against {baseline} it {said(gaps[row.recipe])}." for row in deciding]
    sentences += [
        f"For comparison, {row.recipe}, which has real tiles only as well, {said(gap_of(row))} against {baseline}." for row in asides
    ]
    return Finding(question, headline, tone, sentences)


def _level(row: pd.Series) -> str:
    return f"{number(row.mIoU)} mIoU" + ("" if pd.isna(row.mIoU_sd) else f" (± {number(row.mIoU_sd)} over {row.n} seeds)")


def _headline(gaps: dict[str, Difference], baseline: str) -> tuple[str, str]:
    if not gaps:
        return "No recipe with synthetic tiles is in this table", "open"
    higher = {name: gap for name, gap in gaps.items() if gap.verdict == "higher"}
    lower = {name: gap for name, gap in gaps.items() if gap.verdict == "lower"}
    if higher and lower:
        return f"It depends: {' and '.join(higher)} above {baseline}, {' and '.join(lower)} below", "open"
    if higher:
        best = max(higher, key=lambda name: higher[name].mean)
        return f"Yes: {best} gains {points(higher[best].mean)} of mIoU over {baseline}", "good"
    if lower:
        worst = min(lower, key=lambda name: lower[name].mean)
        return f"No: {worst} loses {points(lower[worst].mean)} of mIoU against {baseline}", "bad"
    if all(gap.low is None for gap in gaps.values()):
        return "Open: a single seed gives no interval", "open"
    return f"Not shown: every difference to {baseline} is within noise", "open"


def rectified_pairs(settings: Settings, names: list[str]) -> list[tuple[str, str]]:
    """Pairs of recipes (plain, rectified) that differ in nothing but the correction while sampling."""
    pairs = []
    for plain in names:
        for other in names:
            a, b = settings.recipes[plain], settings.recipes[other]
            if not (a.control and b.control) or a.model_dump(exclude={"sampler"}) != b.model_dump(exclude={"sampler"}):
                continue
            if settings.samplers[a.sampler].preset is None and settings.samplers[b.sampler].preset is not None:
                pairs.append((plain, other))
    return pairs


def of_rectification(rows: pd.DataFrame, plain: str, rectified: str, settings: Settings, agreement: dict) -> Finding:
    """Does the correction add to plain sampling? The segmentor's score decides; the judge's view of the samples is told beside.

    ``agreement`` maps (control, sampler) to what the workflow measured of its samples.
    """
    by_name = {row.recipe: row for _, row in rows.iterrows()}
    gap = paired_difference(seeds_of(by_name[rectified]), seeds_of(by_name[plain]))
    headline, tone = {
        "higher": (f"Yes: it adds {points(gap.mean)} of mIoU to plain sampling", "good"),
        "lower": (f"No: it costs {points(gap.mean)} of mIoU against plain sampling", "bad"),
        "within noise": (f"Not shown: {number(gap.mean, True)} points of mIoU over plain sampling are within noise", "open"),
    }.get(gap.verdict, ("Open: a single seed gives no interval", "open"))
    sentences = [f"The segmentor: trained on {rectified} instead of {plain}, with the same seeds, it {said(gap)}."]
    keys = [(settings.recipes[name].control, settings.recipes[name].sampler) for name in (rectified, plain)]
    if all(key in agreement for key in keys):
        gaps = {}
        for who in ("judge", "critic"):
            values = [[copy["mIoU"] for copy in agreement[key][who]["copies"]] for key in keys]
            gaps[who] = unpaired_difference(*values)
        seen = [number(agreement[key]["judge"]["mIoU"]) for key in keys]
        sentences.append(
            f"The samples: by the independent judge, {keys[0][1]} images agree with their masks at {seen[0]} mIoU and {keys[1][1]} images "
            f"at {seen[1]}; {keys[0][1]} {said(gaps['judge'])}."
        )
        sentences.append(
            f"The guiding critic sees {number(gaps['critic'].mean, True)} points, which is no evidence: the sampling was steered by it."
        )
    return Finding(f"Does the correction ({settings.recipes[rectified].sampler}) add to plain sampling?", headline, tone, sentences)


def caveats(settings: Settings, invented: bool, comparisons: int) -> list[str]:
    """What the intervals leave out, as far as it applies to this run; ``invented``: scenes drawn by the package are among the data."""
    notes, limits = [], []
    if invented:
        limits.append("the scenes are drawn by the package, so nothing here is a claim about satellite images")
    if settings.base_model.kind == "embedded":
        limits.append("the base model is tiny, so nothing here is a claim about Stable Diffusion 3.5")
    if limits:
        notes.append(f"The numbers show that the chain works and what it measures: {'; '.join(limits)}.")
    if len(settings.seeds) < 3:
        notes.append(f"Seeds: {len(settings.seeds)}. That is too few to judge a difference; three are the least.")
    notes.append(
        "Seeds repeat the training of the segmentor only. The generator was trained once and the samples were drawn once, "
        "so the intervals leave out the luck of those and of which scenes were labelled."
    )
    if comparisons > 1:
        notes.append(f"Each interval holds for its own comparison; with {comparisons} of them, about one in twenty misses by chance.")
    return notes
