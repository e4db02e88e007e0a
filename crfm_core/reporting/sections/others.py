"""Datasets that only a table names: the same sections in short, behind a click."""

from __future__ import annotations

from crfm_core.reporting.page import Report, section
from crfm_core.reporting.sections import SECTIONS

TITLE = "Other datasets"
TEMPLATE = """
<p>Only some tables compare on {{ "these" if datasets|length > 1 else "this one" }}: the scores stand above with those tables.</p>
{% for name, about, sections in datasets %}
<details class="fold"><summary>{{ name }}: samples, what was dropped, data</summary>
<p>{{ about }}</p>
{% for title, html in sections %}
<h4>{{ title }}</h4>
{{ html|safe }}
{% endfor %}
</details>
{% endfor %}
"""


def show(report: Report) -> dict | None:
    """The sections of each of these datasets; None where there is none."""
    names = [name for name in SECTIONS if hasattr(section(name), "show_dataset")]
    found = []
    for one in (one for one in report.datasets if one.folded):
        parts = [(section(name).TITLE, report.render(name, one)) for name in names]
        found.append((one.dataset.name, one.dataset.about, [(title, html) for title, html in parts if html.strip()]))
    return {"datasets": found} if found else None
