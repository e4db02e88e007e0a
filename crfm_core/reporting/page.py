"""The report: one HTML page that needs nothing beside it, the answer first."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pandas as pd
from jinja2 import Environment

from crfm_core import DataError
from crfm_core.experiment import Experiment
from crfm_core.files import atomic_path, write_text
from crfm_core.planning.durations import duration, hours
from crfm_core.reporting import sections
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.costs import StageCost, read_costs
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.rendering import Pictures, environment
from crfm_core.reporting.score_tables import Published, ScoreTable, parts_beside, read_published, show_table
from crfm_core.reporting.tables import read_score_table
from crfm_core.settings import SCHEMES, Settings


@dataclass
class Report:
    """A report while it is written; arguments as of :func:`make_report`."""

    experiment: Experiment
    paper: Path
    configuration: str
    command: str
    gpu_stages: Collection[str]
    page: Path
    pictures: Pictures

    @property
    def settings(self) -> Settings:
        return self.experiment.settings

    @cached_property
    def colours(self) -> Colours:
        return Colours(self.settings)

    @cached_property
    def published(self) -> Published:
        return read_published(self.paper)

    @cached_property
    def costs(self) -> list[StageCost]:
        return read_costs(Path(self.experiment.results.benchmarks()), self.gpu_stages, self.settings)

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The rows of the tables by name, in the order in which the configuration selects them."""
        return {name: read_score_table(self.experiment.results.table(name)) for name in self.experiment.tables}

    @cached_property
    def tables(self) -> list[ScoreTable]:
        """The tables with their findings and figures."""
        paper = {name: parts_beside(name, table, self.published, self.paper) for name, table in self.experiment.tables.items()}
        return [
            show_table(name, frame, self.experiment, paper[name], self.colours, self.pictures, self.command)
            for name, frame in self.frames.items()
        ]

    @cached_property
    def datasets(self) -> list[DatasetResults]:
        """The datasets of the tables. Those that only a table names, not the run, are folded."""
        found, names = [], self.experiment.used_datasets
        shown = [name for name in names if name in self.experiment.own] or names[:1]
        for name in names:
            tables = self.experiment.tables.items()
            leading = next((table.recipes for key, table in tables if (self.frames[key].dataset == name).any()), None)
            if leading is None:
                folder = self.experiment.results.folder(name)
                raise DataError(f"{folder}: no table has rows of dataset {name}; build the tables again")
            found.append(DatasetResults(self.experiment, name, leading, folded=name not in shown))
        return found

    @property
    def main(self) -> list[DatasetResults]:
        return [one for one in self.datasets if not one.folded]

    @cached_property
    def templates(self) -> Environment:
        found = environment()
        found.filters |= {"duration": duration, "hours": hours}
        found.globals |= {"report": self, "settings": self.settings, "SCHEMES": SCHEMES}
        return found

    def render(self, name: str, results: DatasetResults | None = None) -> str:
        """The HTML of a section, or of one dataset in it; "" where there is nothing to show."""
        module = section(name)
        content = module.show(self) if results is None else module.show_dataset(self, results)
        if content is None:
            return ""
        text = getattr(module, "TEMPLATE", None)
        template = self.templates.from_string(text) if text else self.templates.get_template(f"sections/{name}.html")
        return template.render(**content, results=results)

    def parts(self, name: str) -> list[tuple[str, str]]:
        """The parts of a section: heading ("" for none) and HTML of each dataset, or of the whole."""
        if hasattr(section(name), "show"):
            found = [("", self.render(name))]
        else:
            found = [(one.dataset.name if len(self.main) > 1 else "", self.render(name, one)) for one in self.main]
        return [(heading, html) for heading, html in found if html.strip()]


def section(name: str) -> ModuleType:
    """The module of a section."""
    return importlib.import_module(f"{sections.__name__}.{name}")


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
        parts = {name: report.parts(name) for name in sections.SECTIONS}
        shown = [{"name": name, "title": section(name).TITLE, "parts": found} for name, found in parts.items() if found]
        written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        html = report.templates.get_template("page.html").render(sections=shown, written=written)

    write_text(page, html)
