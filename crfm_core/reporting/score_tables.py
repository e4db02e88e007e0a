"""The tables: scores of the segmentors with a finding each, their differences and classes drawn, published figures beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field

from crfm_core import DataError
from crfm_core.experiment import Experiment
from crfm_core.reporting import figures as draw
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.findings import Finding, against_baseline, of_classes, without_baseline
from crfm_core.reporting.measurements import distance_names, validated
from crfm_core.reporting.rendering import Pictures
from crfm_core.settings import Dataset, Table

PUBLISHED_SCORES = ("OA", "mIoU", "mAcc", "FID")


class PublishedRow(BaseModel):
    """One method of a publication; scores in percent, or points where its part holds differences."""

    model_config = ConfigDict(extra="forbid")

    label: str
    filter: str | None = None
    synthetic_per_real: float | None = None
    OA: float | None = None
    mIoU: float | None = None
    mAcc: float | None = None
    FID: float | None = None


class PublishedPart(BaseModel):
    """The published figures of one dataset. ``rows`` are by the name of this workflow's recipe where there is one."""

    model_config = ConfigDict(extra="forbid")

    dataset: str
    difference: bool = False
    rows: dict[str, PublishedRow] = Field(min_length=1)

    def has(self, key: str) -> bool:
        """Whether any row tells it."""
        return any(getattr(row, key) is not None for row in self.rows.values())

    @property
    def scores(self) -> list[str]:
        """Those that any row has."""
        return [score for score in PUBLISHED_SCORES if self.has(score)]


class Published(BaseModel):
    """configs/paper_results.yaml: what a publication reports, to be shown beside a run's own figures and never among them."""

    model_config = ConfigDict(extra="forbid")

    source: str
    training: str = ""
    tables: dict[str, list[PublishedPart]]


def read_published(path: Path) -> Published:
    """The published figures. Raises DataError when the file is missing or damaged."""
    remedy = "restore the file that ships with the workflow"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError) as error:
        fault = "no such file" if isinstance(error, FileNotFoundError) else f"not valid YAML: {error}"
        raise DataError(f"{path}: {fault}; {remedy}") from None
    return validated(content, Published, path, remedy)


def parts_beside(name: str, table: Table, published: Published, path: Path) -> list[PublishedPart]:
    """The published figures that belong beside a table; none when it names none. Raises DataError when it names an unknown one."""
    if table.paper is None:
        return []
    if table.paper not in published.tables:
        known = ", ".join(published.tables) or "(none)"
        raise DataError(f"{path}: has no table {table.paper!r}, which experiments.{name}.paper names; it has: {known}")
    return published.tables[table.paper]


@dataclass(frozen=True)
class TableGroup:
    """The rows of one dataset and segmentor in a table, and what they say."""

    dataset: Dataset
    segmentor: str
    rows: pd.DataFrame
    finding: Finding
    compared: bool  #: with a baseline
    classes: Finding | None
    bars: dict  #: picture of the IoU per class

    @property
    def records(self) -> list[dict]:
        return self.rows.to_dict("records")


@dataclass(frozen=True)
class ScoreTable:
    """A table of the page. ``command`` makes it again; ``paper`` holds what is published."""

    name: str
    table: Table
    frame: pd.DataFrame
    groups: list[TableGroup]
    differences: dict | None
    paper: list[PublishedPart]
    source: Path
    command: str

    @property
    def first(self) -> pd.Series:
        return self.frame.iloc[0]

    @property
    def several(self) -> dict[str, bool]:
        """Whether rows differ in dataset, in segmentor."""
        return {column: self.frame[column].nunique() > 1 for column in ("dataset", "segmentor")}

    @property
    def with_samples(self) -> pd.DataFrame:
        """The rows of which samples were measured; none in a table without ``generation``."""
        return self.frame[self.frame.features != ""] if "features" in self.frame else self.frame.iloc[:0]

    @property
    def distances(self) -> tuple[str, str] | None:
        """What the distances of samples are called; None in a table without any."""
        rows = self.with_samples
        return None if rows.empty else distance_names(rows.feature_kind.iloc[0])

    @property
    def extractors(self) -> list[str]:
        """What each distance is measured in and with."""
        rows = self.with_samples.drop_duplicates(["features", "compared_tiles", "compared_with"])
        return [f"{row.features}, against {row.compared_tiles:.0f} real tiles of {row.compared_with}" for _, row in rows.iterrows()]

    @property
    def missing(self) -> list[str]:
        """Why there are no distances, where there are none."""
        return [reason for reason in self.with_samples.generation_missing.unique() if reason]

    def label(self, group: TableGroup) -> str:
        """What tells a group of this table from the others; empty for a single one."""
        few = f"{group.dataset.name} ({group.rows.real_tiles.iloc[0]} real tiles)"
        return ", ".join(value for key, value in (("dataset", few), ("segmentor", group.segmentor)) if self.several[key])

    def of(self, dataset: str) -> list[TableGroup]:
        return [group for group in self.groups if group.dataset.name == dataset]


def show_table(
    name: str, frame: pd.DataFrame, experiment: Experiment, paper: list[PublishedPart], colours: Colours, show: Pictures, command: str
) -> ScoreTable:
    """A table of :func:`crfm_core.reporting.tables.make_table` with its findings and figures.

    Raises DataError when its rows are not those that the configuration asks for.
    """
    settings, table, source = experiment.settings, experiment.settings.experiments[name], Path(experiment.results.table(name))
    wanted = [(d, s, r) for d, r, s in experiment.runs([table])]
    if sorted(wanted) != sorted(zip(frame.dataset, frame.segmentor, frame.recipe, strict=True)):
        raise DataError(f"{source}: its rows are not those of experiments.{name}; delete it and build it again")
    hues = colours.of_recipes(table.recipes)

    def group_of(dataset: Dataset, segmentor: str, rows: pd.DataFrame) -> TableGroup:
        of = dataset.name
        columns = {kind: [f"{kind}:{one}" for one in dataset.classes] for kind in ("IoU", "IoU_sd")}
        if lacking := [column for column in columns["IoU"] if column not in rows]:
            raise DataError(f"{source}: columns missing: {', '.join(lacking[:3])}; delete it and build it again")
        bars = {row.recipe: (row[columns["IoU"]].tolist(), row[columns["IoU_sd"]].tolist()) for _, row in rows.iterrows()}
        drawn = draw.class_bars(bars, dataset.classes, hues, "IoU in percent", show.folder, f"{name}-{of}-{segmentor}-classes")
        alt = f"IoU per class and recipe on {of} with {segmentor}, in percent, with the standard deviation over seeds"
        finding = against_baseline(rows, table.title, settings.recipes)
        told = finding or Finding(table.title, "", "open", statement=without_baseline(rows))
        classes = of_classes(rows, dataset.classes, settings.recipes)
        return TableGroup(dataset, segmentor, rows, told, finding is not None, classes, show(drawn, alt))

    grouped = frame.groupby(["dataset", "segmentor"], sort=False)
    groups = [group_of(experiment.datasets[dataset], segmentor, rows) for (dataset, segmentor), rows in grouped]
    differences = None
    if table.baseline and any(group.compared for group in groups):
        drawn = draw.difference_plot(frame, table.baseline, hues, show.folder, f"{name}-differences")
        differences = show(drawn, f"mIoU of each recipe minus {table.baseline}: every seed, the mean and its 95 % interval")
    return ScoreTable(name, table, frame, groups, differences, paper, source, command.replace("{target}", str(source)))


def count_intervals(tables: list[ScoreTable]) -> int:
    """Intervals of mIoU in all tables."""
    return sum(len(group.rows) - 1 for table in tables for group in table.groups if group.compared)
