"""The tables: scores of the segmentors with a finding each, their differences and classes drawn, published figures beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.experiment import Experiment
from crfm_core.reporting import figures as draw
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.findings import Finding, against_baseline, of_classes, without_baseline
from crfm_core.reporting.published import PublishedPart
from crfm_core.reporting.rendering import Pictures
from crfm_core.settings import Dataset, Table


@dataclass(frozen=True)
class TableGroup:
    """The rows of one dataset and segmentor in a table, and what they say."""

    dataset: Dataset
    segmentor: str
    rows: pd.DataFrame
    finding: Finding | None
    classes: Finding | None
    statement: str  #: one sentence, without its full stop
    bars: dict  #: picture of the IoU per class

    @property
    def records(self) -> list[dict]:
        return self.rows.to_dict("records")


@dataclass(frozen=True)
class ScoreTable:
    """A table of the page. ``command`` makes it again; ``paper`` holds what is published."""

    name: str
    table: Table
    groups: list[TableGroup]
    differences: dict | None
    paper: list[PublishedPart]
    source: Path
    command: str

    @property
    def first(self) -> pd.Series:
        return self.groups[0].rows.iloc[0]

    @property
    def several(self) -> dict[str, bool]:
        """Whether rows differ in dataset, in segmentor."""
        return {
            "dataset": len({group.dataset.name for group in self.groups}) > 1,
            "segmentor": len({group.segmentor for group in self.groups}) > 1,
        }

    @property
    def distances(self) -> tuple[str, str] | None:
        """What the distances of samples are called; None in a table without any."""
        made = [row for group in self.groups for row in group.records if row.get("features")]
        if not made:
            return None
        return ("FID", "KID") if made[0]["feature_kind"] == "inception" else ("Fréchet distance", "kernel distance")

    @property
    def extractors(self) -> list[str]:
        """What each distance is measured in and with."""
        told = {}
        for row in (row for group in self.groups for row in group.records if row.get("features")):
            told[f"{row['features']}, against {row['compared_tiles']:.0f} real tiles of {row['compared_with']}"] = None
        return list(told)

    @property
    def missing(self) -> list[str]:
        """Why there are no distances, where there are none."""
        return list(dict.fromkeys(row["generation_missing"] for g in self.groups for row in g.records if row.get("generation_missing")))

    def label(self, group: TableGroup) -> str:
        """What tells a group of this table from the others; empty for a single one."""
        few = f"{group.dataset.name} ({group.rows.real_tiles.iloc[0]} real tiles)"
        return ", ".join(value for key, value in (("dataset", few), ("segmentor", group.segmentor)) if self.several[key])

    def of(self, dataset: str) -> list[TableGroup]:
        return [group for group in self.groups if group.dataset.name == dataset]


def show_table(
    name: str,
    frame: pd.DataFrame,
    source: Path,
    experiment: Experiment,
    paper: list[PublishedPart],
    colours: Colours,
    show: Pictures,
    command: str,
) -> ScoreTable:
    """A table of :func:`crfm_core.reporting.tables.make_table` with its findings and figures.

    Raises DataError when its rows are not those that the configuration asks for.
    """
    settings, datasets = experiment.settings, experiment.datasets
    table = settings.experiments[name]
    wanted = [(d, s, r) for d, r, s in experiment.runs([table])]
    if sorted(wanted) != sorted(zip(frame.dataset, frame.segmentor, frame.recipe, strict=True)):
        raise DataError(f"{source}: its rows are not those of experiments.{name}; delete it and build it again")
    hues, groups = colours.of_recipes(table.recipes), []
    for (dataset, segmentor), rows in frame.groupby(["dataset", "segmentor"], sort=False):
        classes = datasets[dataset].classes
        if lacking := [f"IoU:{one}" for one in classes if f"IoU:{one}" not in rows]:
            raise DataError(f"{source}: columns missing: {', '.join(lacking[:3])}; delete it and build it again")
        finding = against_baseline(rows, table.title, settings.recipes)
        bars = {
            row.recipe: ([row[f"IoU:{one}"] for one in classes], [row[f"IoU_sd:{one}"] for one in classes]) for _, row in rows.iterrows()
        }
        drawn = draw.class_bars(bars, classes, hues, "IoU in percent", show.folder, f"{name}-{dataset}-{segmentor}-classes")
        groups.append(
            TableGroup(
                datasets[dataset], segmentor, rows, finding, of_classes(rows, classes, settings.recipes),
                finding.statement if finding else without_baseline(rows),
                show(drawn, f"IoU per class and recipe on {dataset} with {segmentor}, in percent, with the standard deviation over seeds"),
            )
        )  # fmt: skip
    differences = None
    if any(group.finding for group in groups):
        drawn = draw.difference_plot(frame, table.baseline, hues, show.folder, f"{name}-differences")
        differences = show(drawn, f"mIoU of each recipe minus {table.baseline}: every seed, the mean and its 95 % interval")
    return ScoreTable(name, table, groups, differences, paper, source, command.replace("{target}", str(source)))


def count_intervals(tables: list[ScoreTable]) -> int:
    """Intervals of mIoU in all tables."""
    return sum(len(group.rows) - 1 for table in tables for group in table.groups if group.finding)
