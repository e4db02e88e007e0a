"""The report: one HTML page that needs nothing beside it, the answer first."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from crfm_core.experiment import Experiment
from crfm_core.files import atomic_path, write_text
from crfm_core.reporting.rendering import Pictures
from crfm_core.reporting.report import Report, section
from crfm_core.reporting.sections import SECTIONS


def make_report(
    experiment: Experiment,
    paper: Path,
    configuration: str,
    command: str,
    gpu_stages: Collection[str],
    page: Path,
    figures: Path,
) -> None:
    """Write the page and, beside it, the folder of its figures (PNG and SVG each).

    Args:
        experiment: its ``results`` hold :func:`crfm_core.reporting.sections.report_files`, and benchmark files with the time of each job.
        paper: YAML of published figures, shown in tables of their own.
        configuration: hash of the configuration.
        command: what makes a file of the workflow, with {target} for its name; shown below each table.
        gpu_stages: names of the stages whose jobs hold a GPU.

    Datasets of the tables that are not of the run are shown in short. Raises DataError naming the file when an input is missing or
    incomplete.
    """
    with atomic_path(figures) as folder:
        folder.mkdir()
        report = Report(experiment, paper, configuration, command, gpu_stages, page, Pictures(folder, figures))
        sections = [{"name": name, "title": section(name).TITLE, "parts": parts} for name in SECTIONS if (parts := _parts(report, name))]
        written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        html = report.templates.get_template("page.html").render(sections=sections, written=written)
    write_text(page, html)


def _parts(report: Report, name: str) -> list[tuple[str, str]]:
    """The parts of a section: heading ("" for none) and HTML of each dataset, or of the whole."""
    if hasattr(section(name), "show"):
        parts = [("", report.render(name))]
    else:
        parts = [(one.dataset.name if len(report.main) > 1 else "", report.render(name, one)) for one in report.main]
    return [(heading, html) for heading, html in parts if html.strip()]
