"""The result files that a report is written from, and their contents, read when a section asks for them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pandas as pd

from crfm_core.experiment import Experiment
from crfm_core.manifest import read_manifest
from crfm_core.reporting.comparison import FormComparison, read_comparison
from crfm_core.reporting.data_sheet import DataSheet, read_data_sheet
from crfm_core.reporting.measurements import (
    GeneratorLoss,
    Mix,
    Reconstruction,
    SampleDistances,
    SamplesAgreement,
    read_mix,
    read_model,
)

Pair = tuple[str, str]  #: control, sampler


class DatasetResults:
    """The results of one dataset.

    Attributes:
        files: paths by kind, as of :meth:`Experiment.report_files`; the properties of the same names hold their contents.
        leading: recipes of the first table of this dataset.
        folded: whether it is shown in short, its details behind a click.

    A property raises DataError naming a file that is missing or incomplete.
    """

    def __init__(self, experiment: Experiment, name: str, leading: list[str], folded: bool) -> None:
        self.dataset, self.settings, self.leading, self.folded = experiment.datasets[name], experiment.settings, leading, folded
        self.root = experiment.results.folder(name)
        self.files = {kind: {key: Path(path) for key, path in paths.items()} for kind, paths in experiment.report_files(name).items()}

    def _read(self, kind: str, read) -> dict:
        return {key: read(path) for key, path in self.files[kind].items()}

    @cached_property
    def tiles(self) -> pd.DataFrame:
        return read_manifest(self.files["tiles"][self.dataset.train])

    @cached_property
    def data_sheet(self) -> DataSheet:
        return read_data_sheet(self.files["data_sheet"][self.dataset.name])

    @cached_property
    def synthetic(self) -> dict[Pair, pd.DataFrame]:
        return self._read("synthetic", read_manifest)

    @cached_property
    def filtered(self) -> dict[tuple[str, str, str], pd.DataFrame]:
        return self._read("filtered", read_manifest)

    @cached_property
    def resampled(self) -> dict[tuple[str, str, str, str], pd.DataFrame]:
        return self._read("resampled", read_manifest)

    @cached_property
    def pseudo_labels(self) -> dict[str, pd.DataFrame]:
        return self._read("pseudo_labels", read_manifest)

    @cached_property
    def mixes(self) -> dict[str, Mix]:
        return self._read("mixes", read_mix)

    @cached_property
    def agreement(self) -> dict[Pair, SamplesAgreement]:
        return self._read("agreement", lambda path: read_model(path, SamplesAgreement))

    @cached_property
    def generation(self) -> dict[Pair, SampleDistances]:
        return self._read("generation", lambda path: read_model(path, SampleDistances))

    @cached_property
    def reconstruction(self) -> Reconstruction:
        return read_model(self.files["reconstruction"][self.dataset.name], Reconstruction)

    @cached_property
    def validation(self) -> dict[str, GeneratorLoss]:
        return self._read("validation", lambda path: read_model(path, GeneratorLoss))

    @cached_property
    def comparison(self) -> FormComparison | None:
        return read_comparison(list(self.files["comparison"].values())) if self.files["comparison"] else None

    def made_from(self, *kinds: str) -> str:
        """The files of these kinds, for the line below a figure or table."""
        return ", ".join(str(path) for kind in kinds for path in self.files[kind].values())

    def name_of(self, pair: Pair) -> str:
        """The sampler, with the control only where several are compared."""
        return pair[1] if len({control for control, _ in self.synthetic}) == 1 else f"{pair[0]}/{pair[1]}"

    @property
    def leading_pairs(self) -> list[Pair]:
        """(control, sampler) of the leading recipes; all where they have none."""
        found = dict.fromkeys(self.settings.recipes[name].samples for name in self.leading)
        return [pair for pair in found if pair] or list(self.files["synthetic"])

    @property
    def other_pairs(self) -> list[Pair]:
        """The rest."""
        return [pair for pair in self.files["synthetic"] if pair not in self.leading_pairs]
