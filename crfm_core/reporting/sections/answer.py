"""The answers at the top of the page: did it help, on which classes, does the correction add to it; and what the other tables say."""

from __future__ import annotations

from crfm_core.reporting.costs import cost_finding
from crfm_core.reporting.findings import Finding, caveats, of_rectification, rectified_pairs
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.report import Report
from crfm_core.reporting.score_tables import ScoreTable, TableGroup, count_intervals
from crfm_core.settings import Settings

TITLE = ""
QUESTION = "Did synthetic tiles help?"


def show(report: Report) -> dict:
    """The answers on each dataset, the figure of the first, what the other tables say, and how sure all of it is."""
    answers = [(one, *answer(one, report.tables, report.settings)) for one in report.main]
    leading = [group for *_, group in answers if group]
    drawn = any(one.dataset.source.kind == "embedded" for one in report.datasets)
    return {
        "answers": [(one.dataset.name, findings) for one, findings, _ in answers],
        "first": answers[0][2],
        "cost": cost_finding(report.costs),
        "others": other_statements(report.tables, leading),
        "caveats": caveats(report.settings, drawn, count_intervals(report.tables)),
    }


def answer(
    results: DatasetResults, tables: list[ScoreTable], settings: Settings
) -> tuple[list[Finding], tuple[ScoreTable, TableGroup] | None]:
    """The findings on a dataset, and the table and group that the first of them is on."""
    leading = leading_group(results.dataset.name, tables, settings)
    if leading is None:
        return [Finding(QUESTION, "Not asked: no table compares recipes with a baseline", "open")], None
    shown, group = leading
    finding = group.finding
    if _is_real(shown, settings):
        of = f" ({group.segmentor})" if shown.several["segmentor"] else ""
        finding = Finding(QUESTION + of, finding.headline, finding.tone, finding.sentences)
    found = [finding, *([group.classes] if group.classes else [])]
    for other, rows in ((one, part.rows) for one in tables for part in one.of(results.dataset.name)[:1]):
        if pairs := rectified_pairs(settings, other.table.recipes):
            found.append(of_rectification(rows, *pairs[0], settings, results.agreement))
            break
    return found, leading


def leading_group(dataset: str, tables: list[ScoreTable], settings: Settings) -> tuple[ScoreTable, TableGroup] | None:
    """The first comparison of synthetic with real tiles on a dataset, or the first comparison at all."""
    compared = [(table, group) for table in tables for group in table.of(dataset) if group.finding]
    return next((pair for pair in compared if _is_real(pair[0], settings)), compared[0] if compared else None)


def _is_real(shown: ScoreTable, settings: Settings) -> bool:
    """Whether a table compares recipes with synthetic tiles with one without."""
    baseline, recipes = shown.table.baseline, shown.table.recipes
    return bool(baseline) and not settings.recipes[baseline].control and any(settings.recipes[name].control for name in recipes)


def other_statements(tables: list[ScoreTable], told: list[tuple[ScoreTable, TableGroup]]) -> list[dict]:
    """What each table says beside the groups that are told already, in a sentence per dataset and segmentor."""
    known = {(shown.name, group.dataset.name, group.segmentor) for shown, group in told}
    found = []
    for shown in tables:
        rest = [group for group in shown.groups if (shown.name, group.dataset.name, group.segmentor) not in known]
        if rest:
            lines = [{"label": shown.label(group), "statement": group.statement} for group in rest]
            found.append({"title": shown.table.title, "name": shown.name, "lines": lines})
    return found
