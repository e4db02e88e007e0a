"""The tables: scores of the segmentors with a finding each, their differences and classes drawn, published figures beside them."""

from __future__ import annotations

from crfm_core.reporting.page import Report
from crfm_core.reporting.sections.answer import leading_group
from crfm_core.reporting.tables import SCORES

TITLE = "Scores on the test split"


def show(report: Report) -> dict:
    """The tables, and which of them has its figure in the answer."""
    first = leading_group(report.main[0].dataset.name, report.tables, report.settings)
    return {"tables": report.tables, "scores": SCORES, "drawn_above": first[0].name if first else None}
