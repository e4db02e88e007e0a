"""What the sections of a report have in common: the experiment, its tables and datasets, and how a section is rendered."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from jinja2 import Environment

from crfm_core import DataError
from crfm_core.experiment import Experiment
from crfm_core.planning.durations import duration, hours
from crfm_core.reporting import sections
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.costs import StageCost, read_costs
from crfm_core.reporting.findings import number
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.published import Published, parts_beside, read_published
from crfm_core.reporting.rendering import Pictures, environment
from crfm_core.reporting.score_tables import ScoreTable, show_table
from crfm_core.reporting.tables import read_score_table
from crfm_core.settings import Settings


def section(name: str) -> ModuleType:
    """The module of a section."""
    return importlib.import_module(f"{sections.__name__}.{name}")


@dataclass
class Report:
    """A report while it is written; arguments as of :func:`crfm_core.reporting.page.make_report`."""

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
        return read_costs(self.benchmarks, self.gpu_stages, self.settings)

    @property
    def benchmarks(self) -> Path:
        return Path(self.experiment.results.benchmarks())

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The rows of the tables by name, in the order in which the configuration selects them."""
        return {name: read_score_table(self.experiment.results.table(name)) for name in self.experiment.tables}

    @cached_property
    def tables(self) -> list[ScoreTable]:
        """The tables with their findings and figures."""
        return [self._table(name, frame) for name, frame in self.frames.items()]

    def _table(self, name: str, frame: pd.DataFrame) -> ScoreTable:
        source = Path(self.experiment.results.table(name))
        beside = parts_beside(name, self.settings.experiments[name], self.published, self.paper)
        return show_table(name, frame, source, self.experiment, beside, self.colours, self.pictures, self.command)

    @cached_property
    def datasets(self) -> list[DatasetResults]:
        """The datasets of the tables. Those that only a table names, not the run, are folded."""
        found, names = [], self.experiment.used_datasets
        for name in names:
            tables = self.experiment.tables.items()
            leading = next((table.recipes for key, table in tables if (self.frames[key].dataset == name).any()), None)
            if leading is None:
                folder = self.experiment.results.folder(name)
                raise DataError(f"{folder}: no table has rows of dataset {name}; build the tables again")
            own = name in self.experiment.own or not set(names) & set(self.experiment.own) and name == names[0]
            found.append(DatasetResults(self.experiment, name, leading, folded=not own))
        return found

    @property
    def main(self) -> list[DatasetResults]:
        return [one for one in self.datasets if not one.folded]

    @property
    def folded(self) -> list[DatasetResults]:
        return [one for one in self.datasets if one.folded]

    @property
    def first_row(self) -> pd.Series:
        """A row of the first table, for what is the same in all."""
        return next(iter(self.frames.values())).iloc[0]

    @cached_property
    def templates(self) -> Environment:
        found = environment()
        found.filters |= {"duration": duration, "hours": hours}
        found.globals |= {"spread": _spread, "report": self, "settings": self.settings}
        return found

    def render(self, name: str, results: DatasetResults | None = None) -> str:
        """The HTML of a section, or of one dataset in it; "" where there is nothing to show."""
        module = section(name)
        content: dict[str, Any] | None = module.show(self) if results is None else module.show_dataset(self, results)
        if content is None:
            return ""
        text = getattr(module, "TEMPLATE", None)
        template = self.templates.from_string(text) if text else self.templates.get_template(f"sections/{name}.html")
        return template.render(**content, results=results)


def _spread(mean: float | None, sd: float | None = None, digits: int = 1) -> str:
    text = number(mean, digits=digits)
    return text if sd is None or pd.isna(sd) or text == "–" else f"{text} ± {number(sd, digits=digits)}"
