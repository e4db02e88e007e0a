"""The answers at the top of the page: what is best with these labels and this imagery, did synthesis help, on which classes, does the
correction add to it, what would help next; and what the other tables say."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pandas as pd

from crfm_core.reporting.advice import masks_read, next_steps
from crfm_core.reporting.costs import cost_finding, recipe_seconds
from crfm_core.reporting.findings import (
    Finding,
    best_without_synthesis,
    caveats,
    gap_between,
    listed,
    of_rectification,
    rectified_pairs,
)
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.page import Report
from crfm_core.reporting.score_tables import ScoreTable, TableGroup, count_intervals
from crfm_core.reporting.tables import Difference
from crfm_core.settings import Settings

TITLE = ""
QUESTION = "Did synthetic tiles help?"


def show(report: Report) -> dict:
    """The answers on each dataset, the figure of the first, what the other tables say, and how sure all of it is."""
    leading = {one.dataset.name: leading_group(one.dataset.name, report.tables, report.settings) for one in report.main}
    told = [pair[1] for pair in leading.values() if pair]
    others = []
    for table in report.tables:
        if rest := [group for group in table.groups if not any(group is one for one in told)]:
            lines = [{"label": table.label(group), "statement": group.finding.statement} for group in rest]
            others.append({"title": table.table.title, "name": table.name, "lines": lines})
    drawn = any(one.dataset.source.kind == "embedded" for one in report.datasets)
    return {
        "answers": [(one.dataset.name, _answers(report, one, leading[one.dataset.name])) for one in report.main],
        "rankings": [ranking(report, *pair) for pair in leading.values() if pair],
        "first": leading[report.main[0].dataset.name],
        "cost": cost_finding(report.costs),
        "others": others,
        "caveats": caveats(report.settings, drawn, count_intervals(report.tables)),
    }


def _answers(report: Report, results: DatasetResults, leading: tuple[ScoreTable, TableGroup] | None) -> list[Finding]:
    if leading is None:
        return [Finding(QUESTION, "Not asked: no table compares recipes with a baseline", "open")]
    table, group = leading
    question = group.finding.question
    if _is_real(table, report.settings):
        question = f"{QUESTION[:-1]} ({group.segmentor})?" if table.several["segmentor"] else QUESTION
    found = [dataclasses.replace(group.finding, question=question), *([group.classes] if group.classes else [])]
    for other in report.tables:
        groups, pairs = other.of(results.dataset.name), rectified_pairs(report.settings, other.table.recipes)
        if groups and pairs:
            found.append(of_rectification(groups[0].rows, *pairs[0], report.settings, results.agreement))
            break
    found += [of_generator(results)] if results.validation else []
    return [*found, next_steps(group.rows, results.dataset.classes, report.settings.recipes, results)]


@dataclass(frozen=True)
class Ranked:
    """A line of the ranking: a recipe, what it takes and gives. ``place`` is None for labels that are not to be had."""

    place: int | None
    row: pd.Series
    gap: Difference | None  #: to the best recipe without synthetic tiles, which has none
    seconds: float


@dataclass(frozen=True)
class Ranking:
    """What was tried on a dataset, the best first."""

    dataset: str
    segmentor: str
    rival: str
    lines: list[Ranked]

    @property
    def with_pseudo(self) -> bool:
        """Whether the table counts tiles with labels of the critic."""
        return "pseudo_tiles" in self.lines[0].row


def ranking(report: Report, table: ScoreTable, group: TableGroup) -> Ranking:
    """The recipes of a table by their mean mIoU, with the difference to the best without synthetic tiles and the time they take."""
    recipes, name = report.settings.recipes, group.dataset.name
    rival = best_without_synthesis(group.rows, recipes)
    against = group.rows[group.rows.recipe == rival].iloc[0]
    places = itertools.count(1)
    lines = [
        Ranked(
            place=None if recipes[row.recipe].is_ceiling else next(places),
            row=row,
            gap=None if row.recipe == rival else gap_between(row, against),
            seconds=recipe_seconds(report.experiment, name, row.recipe, group.segmentor),
        )
        for _, row in group.rows.sort_values("mIoU", ascending=False, kind="stable").iterrows()
    ]
    return Ranking(name, group.segmentor, rival, lines)


def of_generator(results: DatasetResults) -> Finding:
    """Whether generators draw by their masks, and whether their samples repeat training tiles."""
    question = "Has the generator learnt what a mask means?"
    losses = [f"{name}: {seen.loss:.2f} with the mask, {seen.loss_mask_ignored:.2f} without" for name, seen in results.validation.items()]
    read = [masks_read(seen.loss, seen.loss_mask_ignored) for seen in results.validation.values()]
    copied = sum(len(one.memorised) for one in results.generation.values())
    drawn = sum(one.samples for one in results.generation.values())
    headline = "Yes: masks it never saw lower its loss" if all(read) else "Hardly: masks it never saw tell it little"
    repeats = f"{copied} of {drawn} samples repeat a training tile" if copied else f"none of {drawn} samples repeats a training tile"
    sentences = [f"Loss on held-out tiles, {listed(losses)}."]
    if results.generation:
        headline += f"; {repeats}"
    return Finding(question, headline, "good" if all(read) and not copied else "bad" if not all(read) else "open", sentences)


def leading_group(dataset: str, tables: list[ScoreTable], settings: Settings) -> tuple[ScoreTable, TableGroup] | None:
    """The first comparison of synthetic with real tiles on a dataset, or the first comparison at all."""
    compared = [(table, group) for table in tables for group in table.of(dataset) if group.compared]
    return next((pair for pair in compared if _is_real(pair[0], settings)), compared[0] if compared else None)


def _is_real(shown: ScoreTable, settings: Settings) -> bool:
    """Whether a table compares recipes with synthetic tiles with one without."""
    baseline = shown.table.baseline
    return baseline is not None and not settings.recipes[baseline].samples and any(settings.recipes[r].samples for r in shown.table.recipes)
