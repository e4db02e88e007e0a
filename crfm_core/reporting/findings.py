"""What the numbers say, as sentences: made from the numbers alone, and what is within noise is called so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from crfm_core.reporting.measurements import SamplesAgreement
from crfm_core.reporting.tables import Difference, paired_difference, unpaired_difference
from crfm_core.settings import Recipe, Settings

NAMED = 3  #: more classes than these are counted, not named


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


def said(gap: Difference) -> str:
    """The predicate of a sentence about a difference in mIoU."""
    if math.isnan(gap.mean):
        return "has no defined mIoU"
    if math.isnan(gap.low):
        return f"differs by {number(gap.mean, True)} points of mIoU in a single run, so there is no interval"
    if gap.verdict == "within noise":
        return f"differs by {number(gap.mean, True)} points of mIoU, which is within noise ({span(gap)})"
    return f"{'gains' if gap.mean > 0 else 'loses'} {points(gap.mean)} of mIoU ({span(gap)})"


def listed(things: Sequence[str], most: int | None = None) -> str:
    """``a``, ``a and b``, ``a, b and c``; those after ``most`` as ``N more``."""
    if most is not None and len(things) > most:
        things = [*things[:most], f"{len(things) - most} more"]
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)


def gap_of(row: pd.Series, score: str = "mIoU", of: str = "") -> Difference:
    """The difference to the baseline that a row of a table holds; ``of`` is ``:CLASS``, with the score IoU."""
    return Difference(*(float(row.get(f"{score}_{part}{of}", math.nan)) for part in ("difference", "low", "high")))


def against_baseline(rows: pd.DataFrame, question: str, recipes: dict[str, Recipe]) -> Finding | None:
    """Do the recipes beat the baseline? ``rows`` are a table's rows of one dataset and segmentor.

    Where the baseline has real tiles only, recipes with synthetic ones decide, and the headline says yes or no: they have to beat the
    best of the recipes without synthetic tiles (:func:`best_without_synthesis`). Where the baseline has synthetic tiles itself, all others
    are compared with it. None without a baseline or without another recipe.
    """
    baseline = rows.baseline.iloc[0]
    if not baseline or len(rows) < 2:
        return None
    of_synthetic, drawn = bool(recipes[baseline].samples), [name for name in rows.recipe if recipes[name].samples]
    rival = best_without_synthesis(rows, recipes) if drawn and not of_synthetic else baseline
    against = rows[rows.recipe == rival].iloc[0]
    others = [row for _, row in rows.iterrows() if row.recipe != rival]
    gaps = {row.recipe: gap_between(row, against) for row in others if of_synthetic or recipes[row.recipe].samples}
    answer, statement, tone = _answer(gaps, rival)
    what = f"The baseline {rival}" if rival == baseline else f"The best recipe without synthetic tiles, {rival},"
    sentences = [f"{what} reaches {_level(against)}."]
    sentences += [
        f"{row.recipe} reaches {_level(row)}: against {rival} it {said(gaps[row.recipe])}." for row in others if row.recipe in gaps
    ]
    for row in others:
        if row.recipe not in gaps:
            known = "with labels that are not to be had" if recipes[row.recipe].is_ceiling else "also without synthetic tiles"
            sentences.append(f"For comparison, {row.recipe}, {known}, {said(gap_between(row, against))} against {rival}.")
    if of_synthetic:
        return Finding(question, statement, "open", sentences, statement)
    return Finding(question, f"{answer}: {statement}", tone, sentences, statement)


def best_without_synthesis(rows: pd.DataFrame, recipes: dict[str, Recipe]) -> str:
    """The recipe without synthetic tiles, of labels that the user has, with the highest mean mIoU: what synthesis has to beat.

    It is chosen by the scores that are compared, which favours it. The baseline where no mean is defined.
    """
    baseline = str(rows.baseline.iloc[0])
    real = rows[rows.recipe.map(lambda name: not recipes[name].samples and not recipes[name].is_ceiling) & rows.mIoU.notna()]
    return baseline if real.empty else str(real.loc[real.mIoU.idxmax()].recipe)


def gap_between(row: pd.Series, other: pd.Series) -> Difference:
    """The paired difference in mIoU of two rows of a table that were trained with the same seeds."""
    return paired_difference(*([float(one[f"mIoU_seed{seed}"]) for seed in one.seeds.split()] for one in (row, other)))


def _level(row: pd.Series) -> str:
    return f"{number(row.mIoU)} mIoU" + ("" if pd.isna(row.mIoU_sd) else f" (± {number(row.mIoU_sd)} over {row.n} seeds)")


def _answer(gaps: dict[str, Difference], baseline: str) -> tuple[str, str, str]:
    """The answer in a word, as a statement that begins with a recipe's name, and its tone."""
    if not gaps:
        return "Open", f"{baseline} has no recipe with synthetic tiles beside it", "open"
    ranked = sorted((name for name in gaps if not math.isnan(gaps[name].mean)), key=lambda name: -gaps[name].mean)
    if not ranked:
        return "Open", f"{baseline} has no defined difference to any recipe", "open"
    best = gaps[ranked[0]]
    by = f"{ranked[0]} differs from {baseline} by {number(best.mean, True)} points of mIoU"
    if math.isnan(best.low):
        return "Open", f"{by}, and a single seed gives no interval", "open"
    several = len(ranked) > 1
    gains, losses = ([name for name in ranked if gaps[name].verdict == verdict] for verdict in ("higher", "lower"))
    gain = [f"{name} gains {points(gaps[name].mean)} of mIoU over {baseline} ({span(gaps[name])})" for name in gains[:1]]
    loss = [f"{name} loses {points(gaps[name].mean)} of mIoU against {baseline} ({span(gaps[name])})" for name in losses[-1:]]
    if gain and loss:
        return "It depends", f"{gain[0]}, {loss[0]}", "open"
    if gain:
        return "Yes", gain[0], "good"
    if loss:
        return "No", loss[0] + (", and none gains beyond noise" if several else ""), "bad"
    return "Not shown", f"{by}, which is within noise ({span(best)}){', as is every other difference' if several else ''}", "open"


def without_baseline(rows: pd.DataFrame) -> str:
    """A statement on rows of one dataset and segmentor that are compared with nothing."""
    if len(rows) == 1:
        return f"{rows.recipe.iloc[0]} reaches {_level(rows.iloc[0])}; no other recipe is in this table"
    if rows.mIoU.isna().all():
        return f"{listed(list(rows.recipe))} have no defined mIoU"
    best = rows.loc[rows.mIoU.idxmax()]
    return f"{best.recipe} has the highest mean, {_level(best)}; without a baseline there is no interval to judge it by"


def of_classes(rows: pd.DataFrame, classes: Sequence[str], recipes: dict[str, Recipe]) -> Finding | None:
    """On which classes does the best recipe with synthetic tiles differ from the baseline? None where there is no such pair.

    ``rows`` are a table's rows of one dataset and segmentor; the best has the highest mean mIoU.
    """
    baseline = rows.baseline.iloc[0]
    candidates = rows[rows.recipe.map(lambda name: recipes[name].samples is not None and name != baseline) & rows.mIoU.notna()]
    if not baseline or candidates.empty:
        return None
    best = candidates.loc[candidates.mIoU.idxmax()]
    question, gaps = "On which classes?", {name: gap_of(best, "IoU", f":{name}") for name in classes}
    defined = [name for name in classes if not math.isnan(gaps[name].mean)]
    changes = {name: f"{name} ({number(gaps[name].mean, True)})" for name in defined}
    absent = [name for name in classes if name not in defined]
    notes = [f"No difference is defined for {listed(absent)}: some run has no pixel of it."] if absent else []
    if not defined:
        return Finding(question, "Open: no class has a defined IoU", "open")
    if math.isnan(gaps[defined[0]].low):
        sentence = f"{best.recipe} minus {baseline}, from that seed: {', '.join(changes.values())}."
        return Finding(question, "Open: a single seed gives no interval for any class", "open", [sentence, *notes])
    of = {
        verdict: sorted((name for name in defined if gaps[name].verdict == verdict), key=lambda name: -abs(gaps[name].mean))
        for verdict in ("higher", "lower", "within noise")
    }
    parts = [
        f"{verb} on {listed([changes[name] for name in names], None if len(names) <= NAMED + 1 else NAMED)}"
        for verb, names in (("gains", of["higher"]), ("loses", of["lower"]))
        if names
    ]
    within = [name for name in defined if name in of["within noise"]]
    headline, tone = f"On none by more than noise: {best.recipe} against {baseline}", "open"
    if parts:
        headline = f"{best.recipe} {' and '.join(parts)} against {baseline}, in points of IoU"
        headline += f"; {listed(within) if len(within) <= NAMED else f'the other {len(within)}'} within noise" if within else ""
        tone = "good" if not of["lower"] else "bad" if not of["higher"] else "open"
    sentences = [f"{name}: {number(gaps[name].mean, True)} points ({span(gaps[name])})." for name in (*of["higher"], *of["lower"])]
    looked = f"{len(defined)} intervals were looked at, one per class" if len(defined) > 1 else "One interval was looked at"
    sentences.append(f"{looked}; even if nothing differed, about {number(0.05 * len(defined))} of them would exclude zero.")
    return Finding(question, headline, tone, sentences + notes)


#: Fields of a sampler that say how it corrects, or change nothing but an image's rounding.
OF_CORRECTION = {"preset", "rectify", "critic_decoder", "batch_size", "compile", "pad"}


def rectified_pairs(settings: Settings, names: list[str]) -> list[tuple[str, str]]:
    """Pairs of recipes (plain, rectified) that differ in nothing but the correction while sampling."""
    pairs = []
    for names_of_pair in itertools.permutations(names, 2):
        plain, other = (settings.recipes[name] for name in names_of_pair)
        if plain.samples and other.samples and plain.model_dump(exclude={"sampler"}) == other.model_dump(exclude={"sampler"}):
            drawn, corrected = settings.samplers[plain.samples[1]], settings.samplers[other.samples[1]]
            alike = drawn.model_dump(exclude=OF_CORRECTION) == corrected.model_dump(exclude=OF_CORRECTION)
            if drawn.preset is None and corrected.preset is not None and alike:
                pairs.append(names_of_pair)
    return pairs


def of_rectification(
    rows: pd.DataFrame, plain: str, rectified: str, settings: Settings, agreement: dict[tuple[str, str], SamplesAgreement]
) -> Finding:
    """Does the correction add to plain sampling? The segmentor's score decides; the judge's view of the samples is told beside.

    ``rows`` are a table's rows of one dataset and segmentor; ``agreement`` is by (control, sampler).
    """
    ours, theirs = (rows[rows.recipe == name].iloc[0] for name in (rectified, plain))
    gap = gap_between(ours, theirs)
    headline, tone = {
        "higher": (f"Yes: it adds {points(gap.mean)} of mIoU to plain sampling", "good"),
        "lower": (f"No: it costs {points(gap.mean)} of mIoU against plain sampling", "bad"),
        "within noise": (f"Not shown: {number(gap.mean, True)} points of mIoU over plain sampling are within noise", "open"),
        "undefined score": ("Open: the scores are not defined", "open"),
    }.get(gap.verdict, ("Open: a single seed gives no interval", "open"))
    sentences = [f"The segmentor: trained on {rectified} instead of {plain}, with the same seeds, it {said(gap)}."]
    after, before = (settings.recipes[name].sampler for name in (rectified, plain))
    seen = [agreement[key] for name in (rectified, plain) if (key := settings.recipes[name].samples) and key in agreement]
    if len(seen) == 2:
        judge, critic = (unpaired_difference(*(found.copies_of(who) for found in seen)) for who in ("judge", "critic"))
        sentences.append(
            f"The samples: by the independent judge, {after} images agree with their masks at {number(seen[0].judge.mIoU)} mIoU and "
            f"{before} images at {number(seen[1].judge.mIoU)}; {after} {said(judge)}."
        )
        sentences.append(
            f"The guiding critic sees {number(critic.mean, True)} points, which is no evidence: the sampling was steered by it."
        )
    return Finding(f"Does the correction ({after}) add to plain sampling?", headline, tone, sentences)


def caveats(settings: Settings, invented: bool, comparisons: int) -> list[str]:
    """What the intervals leave out, as far as it applies to this run; ``invented``: scenes drawn by the package are among the data.

    ``comparisons`` counts the intervals of mIoU in all tables.
    """
    notes, limits = [], []
    if invented:
        limits.append("the scenes are drawn by the package, so they say nothing about satellite images")
    if settings.base_model.kind == "embedded":
        limits.append("the base model is tiny, so they say nothing about Stable Diffusion 3.5")
    if limits:
        notes.append(f"These numbers only show that the workflow runs from end to end: {'; '.join(limits)}.")
    if len(settings.seeds) < 3:
        notes.append(f"Seeds: {len(settings.seeds)}, too few to judge a difference; use at least three.")
    notes.append(
        "Seeds repeat the training of the segmentor only. The generator was trained once and the samples were drawn once, "
        "so the intervals do not cover chance in those, nor in which scenes were labelled."
    )
    if comparisons > 1 and len(settings.seeds) > 1:
        notes.append(
            f"Each interval holds for its own comparison. Of the {comparisons} intervals of mIoU in the tables about one in twenty misses "
            "the true difference by chance, and the best of several recipes looks better than it is."
        )
    return notes
