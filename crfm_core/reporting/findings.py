"""What the numbers say, as sentences: made from the numbers alone, and what is within noise is called so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from crfm_core.reporting.measurements import SamplesAgreement
from crfm_core.reporting.tables import Difference, paired_difference, unpaired_difference, verdict_of
from crfm_core.settings import Recipe, Settings

NAMED = 3  #: more things of one kind are counted, not named


@dataclass(frozen=True)
class Finding:
    """A question with its answer; ``tone`` is good, bad or open. ``statement`` is the answer as a sentence of its own, without a yes."""

    question: str
    headline: str
    tone: str
    sentences: list[str] = field(default_factory=list)
    statement: str = ""


def number(value: float | None, sign: bool = False, digits: int = 1) -> str:
    """A number of decimals, with a minus sign as printers set it."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def points(value: float) -> str:
    """``1.0 point``, ``1.2 points``."""
    text = number(abs(value))
    return f"{text} point" if text == "1.0" else f"{text} points"


def span(gap: Difference) -> str:
    """``95 % interval +0.5 to +2.1``."""
    return f"95 % interval {number(gap.low, True)} to {number(gap.high, True)}"


def said(gap: Difference, score: str = "mIoU") -> str:
    """The predicate of a sentence about a difference."""
    if math.isnan(gap.mean):
        return f"has no defined {score}"
    if gap.low is None:
        return f"differs by {number(gap.mean, True)} points of {score}, a single run from which no interval follows"
    if gap.verdict == "within noise":
        return f"differs by {number(gap.mean, True)} points of {score}, which is within noise ({span(gap)})"
    return f"{'gains' if gap.mean > 0 else 'loses'} {points(gap.mean)} of {score} ({span(gap)})"


def listed(things: Sequence[str], most: int | None = None) -> str:
    """``a``, ``a and b``, ``a, b and c``; those after ``most`` as ``N more``."""
    if most is not None and len(things) > most:
        things = [*things[:most], f"{len(things) - most} more"]
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)


def gap_of(row: pd.Series, score: str = "mIoU", of: str = "") -> Difference:
    """The difference to the baseline that a row of a table holds; ``of`` names a class, with the score IoU."""
    suffix = f":{of}" if of else ""
    low, high = (row.get(f"{score}_{edge}{suffix}", math.nan) for edge in ("low", "high"))
    mean = float(row.get(f"{score}_difference{suffix}", math.nan))
    if math.isnan(mean):
        return Difference(mean, None, None, "undefined score")
    if pd.isna(low) or pd.isna(high):
        return Difference(mean, None, None, "one seed: no interval")
    return Difference(mean, float(low), float(high), verdict_of(low, high))


def seeds_of(row: pd.Series, score: str = "mIoU") -> list[float]:
    """Every seed's value of a score in a row of a table."""
    return [float(row[f"{score}_seed{seed}"]) for seed in row.seeds.split()]


# ------------------------------------------------------------------------------------------------------ against a baseline


def against_baseline(rows: pd.DataFrame, question: str, recipes: dict[str, Recipe]) -> Finding | None:
    """Do the recipes beat the baseline? ``rows`` are a table's rows of one dataset and segmentor.

    Where the baseline has real tiles only, recipes with synthetic ones decide, and the headline says yes or no; where it has synthetic
    tiles itself, all others are compared with it. None without a baseline or without another recipe.
    """
    baseline = rows.baseline.iloc[0]
    if not baseline or len(rows) < 2:
        return None
    synthetic = {name for name in rows.recipe if recipes[name].control}
    others = [row for _, row in rows.iterrows() if row.recipe != baseline]
    deciding = others if baseline in synthetic else [row for row in others if row.recipe in synthetic]
    gaps = {row.recipe: gap_of(row) for row in deciding}
    answer, statement, tone = _answer(gaps, baseline)
    headline = f"{answer}: {statement}"
    if baseline in synthetic:
        headline, tone = statement, "open"
    base = rows[rows.recipe == baseline].iloc[0]
    sentences = [f"The baseline {baseline} reaches {_level(base)}."]
    sentences += [f"{row.recipe} reaches {_level(row)}: against {baseline} it {said(gaps[row.recipe])}." for row in deciding]
    aside = [row for row in others if row.recipe not in gaps]
    sentences += [
        f"For comparison, {row.recipe}, which has real tiles only as well, {said(gap_of(row))} against {baseline}." for row in aside
    ]
    return Finding(question, headline, tone, sentences, statement)


def _level(row: pd.Series) -> str:
    return f"{number(row.mIoU)} mIoU" + ("" if pd.isna(row.mIoU_sd) else f" (± {number(row.mIoU_sd)} over {row.n} seeds)")


def _answer(gaps: dict[str, Difference], baseline: str) -> tuple[str, str, str]:
    """The answer in a word, as a statement that begins with a recipe's name, and its tone."""
    if not gaps:
        return "Open", f"{baseline} has no recipe with synthetic tiles beside it", "open"
    defined = {name: gap for name, gap in gaps.items() if not math.isnan(gap.mean)}
    if not defined:
        return "Open", f"{baseline} has no defined difference to any recipe", "open"
    best = max(defined, key=lambda name: defined[name].mean)
    gap = defined[best]
    by = f"{best} differs from {baseline} by {number(gap.mean, True)} points of mIoU"
    if gap.low is None:
        return "Open", f"{by}, and a single seed gives no interval", "open"
    higher, lower = ([name for name, gap in defined.items() if gap.verdict == verdict] for verdict in ("higher", "lower"))
    best, worst = (choose(names or defined, key=lambda name: defined[name].mean) for choose, names in ((max, higher), (min, lower)))
    gain = f"{best} gains {points(defined[best].mean)} of mIoU over {baseline} ({span(defined[best])})"
    loss = f"{worst} loses {points(defined[worst].mean)} of mIoU against {baseline} ({span(defined[worst])})"
    if higher and lower:
        return "It depends", f"{gain}, {loss}", "open"
    if higher:
        return "Yes", gain, "good"
    if lower:
        return "No", loss + (", and none gains beyond noise" if len(defined) > 1 else ""), "bad"
    others = ", as is every other difference" if len(defined) > 1 else ""
    return "Not shown", f"{by}, which is within noise ({span(gap)}){others}", "open"


def without_baseline(rows: pd.DataFrame) -> str:
    """A statement on rows of one dataset and segmentor that are compared with nothing."""
    if len(rows) == 1:
        return f"{rows.recipe.iloc[0]} reaches {_level(rows.iloc[0])}; no other recipe is in this table"
    defined = rows[rows.mIoU.notna()]
    if defined.empty:
        return f"{listed(list(rows.recipe))} have no defined mIoU"
    best = defined.loc[defined.mIoU.idxmax()]
    return f"{best.recipe} has the highest mean, {_level(best)}; without a baseline nothing says how sure that is"


# --------------------------------------------------------------------------------------------------------------- per class


def of_classes(rows: pd.DataFrame, classes: Sequence[str], recipes: dict[str, Recipe]) -> Finding | None:
    """On which classes does the best recipe with synthetic tiles differ from the baseline? None where there is no such pair.

    ``rows`` are a table's rows of one dataset and segmentor; the best has the highest mean mIoU.
    """
    baseline = rows.baseline.iloc[0]
    candidates = rows[rows.recipe.map(lambda name: bool(recipes[name].control) and name != baseline) & rows.mIoU.notna()]
    if not baseline or candidates.empty:
        return None
    best = candidates.loc[candidates.mIoU.idxmax()]
    gaps = {name: gap_of(best, "IoU", name) for name in classes}
    measured = {name: gap for name, gap in gaps.items() if gap.low is not None}
    question = "On which classes?"
    absent = [name for name, gap in gaps.items() if math.isnan(gap.mean)]
    without = [f"No difference is defined for {listed(absent)}: not in every run is there a pixel of it."] if absent else []
    if not measured:
        if len(absent) == len(gaps):
            return Finding(question, "Open: no class has a defined IoU", "open")
        means = [f"{name} {number(gap.mean, True)}" for name, gap in gaps.items() if not math.isnan(gap.mean)]
        sentence = f"{best.recipe} minus {baseline}, from that seed: {', '.join(means)}."
        return Finding(question, "Open: a single seed gives no interval for any class", "open", [sentence, *without])
    gains, losses = ([name for name, gap in measured.items() if gap.verdict == verdict] for verdict in ("higher", "lower"))
    gains.sort(key=lambda name: -measured[name].mean)
    losses.sort(key=lambda name: measured[name].mean)
    parts = [
        f"{verb} on {_some([f'{name} ({number(measured[name].mean, True)})' for name in names])}"
        for verb, names in (("gains", gains), ("loses", losses))
        if names
    ]
    within = [name for name in measured if measured[name].verdict == "within noise"]
    if not parts:
        headline, tone = f"On none by more than noise: {best.recipe} against {baseline}", "open"
    else:
        headline = f"{best.recipe} {' and '.join(parts)} against {baseline}, in points of IoU"
        tone = "good" if not losses else "bad" if not gains else "open"
        if within:
            headline += f"; {listed(within) if len(within) <= NAMED else f'the other {len(within)}'} within noise"
    sentences = [f"{name}: {number(measured[name].mean, True)} points ({span(measured[name])})." for name in (*gains, *losses)]
    looked = f"{len(measured)} intervals were looked at, one per class" if len(measured) > 1 else "One interval was looked at"
    sentences.append(f"{looked}; if nothing differed, about {number(0.05 * len(measured))} of them would still leave out zero.")
    return Finding(question, headline, tone, sentences + without)


def _some(things: Sequence[str]) -> str:
    """All of few things, the first of many."""
    if len(things) <= NAMED + 1:
        return listed(things)
    return f"{', '.join(things[:NAMED])} and {len(things) - NAMED} more"


# ----------------------------------------------------------------------------------------------------------- the correction


#: Fields of a sampler that say how it corrects, or change nothing but an image's rounding.
OF_CORRECTION = {"preset", "rectify", "critic_decoder", "batch_size", "compile", "pad"}


def rectified_pairs(settings: Settings, names: list[str]) -> list[tuple[str, str]]:
    """Pairs of recipes (plain, rectified) that differ in nothing but the correction while sampling."""
    pairs = []
    for plain in names:
        for other in names:
            a, b = settings.recipes[plain], settings.recipes[other]
            if not (a.control and b.control) or a.model_dump(exclude={"sampler"}) != b.model_dump(exclude={"sampler"}):
                continue
            drawn, corrected = settings.samplers[a.sampler], settings.samplers[b.sampler]
            alike = drawn.model_dump(exclude=OF_CORRECTION) == corrected.model_dump(exclude=OF_CORRECTION)
            if drawn.preset is None and corrected.preset is not None and alike:
                pairs.append((plain, other))
    return pairs


def of_rectification(
    rows: pd.DataFrame, plain: str, rectified: str, settings: Settings, agreement: dict[tuple[str, str], SamplesAgreement]
) -> Finding:
    """Does the correction add to plain sampling? The segmentor's score decides; the judge's view of the samples is told beside.

    ``rows`` are a table's rows of one dataset and segmentor; ``agreement`` is by (control, sampler).
    """
    by_name = {row.recipe: row for _, row in rows.iterrows()}
    gap = paired_difference(seeds_of(by_name[rectified]), seeds_of(by_name[plain]))
    headline, tone = {
        "higher": (f"Yes: it adds {points(gap.mean)} of mIoU to plain sampling", "good"),
        "lower": (f"No: it costs {points(gap.mean)} of mIoU against plain sampling", "bad"),
        "within noise": (f"Not shown: {number(gap.mean, True)} points of mIoU over plain sampling are within noise", "open"),
        "undefined score": ("Open: the scores are not defined", "open"),
    }.get(gap.verdict, ("Open: a single seed gives no interval", "open"))
    sentences = [f"The segmentor: trained on {rectified} instead of {plain}, with the same seeds, it {said(gap)}."]
    keys = [(settings.recipes[name].control, settings.recipes[name].sampler) for name in (rectified, plain)]
    if all(key in agreement for key in keys):
        gaps = {who: unpaired_difference(*(agreement[key].copies_of(who) for key in keys)) for who in ("judge", "critic")}
        seen = [number(agreement[key].judge.mIoU) for key in keys]
        sentences.append(
            f"The samples: by the independent judge, {keys[0][1]} images agree with their masks at {seen[0]} mIoU and {keys[1][1]} images "
            f"at {seen[1]}; {keys[0][1]} {said(gaps['judge'])}."
        )
        sentences.append(
            f"The guiding critic sees {number(gaps['critic'].mean, True)} points, which is no evidence: the sampling was steered by it."
        )
    return Finding(f"Does the correction ({settings.recipes[rectified].sampler}) add to plain sampling?", headline, tone, sentences)


# --------------------------------------------------------------------------------------------------------------- how sure


def caveats(settings: Settings, invented: bool, comparisons: int) -> list[str]:
    """What the intervals leave out, as far as it applies to this run; ``invented``: scenes drawn by the package are among the data.

    ``comparisons`` counts the intervals of mIoU in all tables.
    """
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
    if comparisons > 1 and len(settings.seeds) > 1:
        notes.append(
            f"Each interval holds for its own comparison; of the {comparisons} of mIoU in the tables about one in twenty misses by "
            "chance, and the best of several recipes looks better than it is."
        )
    return notes
