"""The answers at the top of the page: did it help, on which classes, does the correction add to it; and what the other tables say."""

from __future__ import annotations

import dataclasses

from crfm_core.reporting.costs import cost_finding
from crfm_core.reporting.findings import Finding, caveats, of_rectification, rectified_pairs
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.page import Report
from crfm_core.reporting.score_tables import ScoreTable, TableGroup, count_intervals
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
            return [*found, of_rectification(groups[0].rows, *pairs[0], report.settings, results.agreement)]
    return found


def leading_group(dataset: str, tables: list[ScoreTable], settings: Settings) -> tuple[ScoreTable, TableGroup] | None:
    """The first comparison of synthetic with real tiles on a dataset, or the first comparison at all."""
    compared = [(table, group) for table in tables for group in table.of(dataset) if group.compared]
    return next((pair for pair in compared if _is_real(pair[0], settings)), compared[0] if compared else None)


def _is_real(shown: ScoreTable, settings: Settings) -> bool:
    """Whether a table compares recipes with synthetic tiles with one without."""
    baseline = shown.table.baseline
    return baseline is not None and not settings.recipes[baseline].samples and any(settings.recipes[r].samples for r in shown.table.recipes)
