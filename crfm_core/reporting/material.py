"""What was made of one dataset: the files a report is written from, and their contents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
from pydantic import BaseModel

from crfm_core import DataError
from crfm_core.layout import Layout
from crfm_core.manifest import read_manifest
from crfm_core.reporting.comparison import Comparison, read_comparison
from crfm_core.reporting.data_sheet import DataSheet, read_data_sheet
from crfm_core.reporting.measurements import Generation, Reconstruction, SamplesAgreement, Validation
from crfm_core.reporting.mixes import Mix, read_mix
from crfm_core.reporting.reading import read_model
from crfm_core.settings import Dataset, Settings

Key = tuple[str, str]  #: control, sampler
Model = TypeVar("Model", bound=BaseModel)

#: What :func:`crfm_core.reporting.page.make_report` is given, by kind; of the first ones there is one per dataset.
ONE_EACH = ("tiles", "data_sheets", "reconstruction")
#: Of the others there are several, each with its kind of result and what tells it from its like.
SEVERAL = {
    "synthetic": (Layout.synthetic, "control", "sampler"),
    "filtered": (Layout.filtered, "control", "sampler", "filter"),
    "resampled": (Layout.resampled, "control", "sampler", "filter", "resampling"),
    "mixes": (Layout.mix, "recipe"),
    "agreement": (Layout.agreement, "control", "sampler"),
    "generation": (Layout.generation, "control", "sampler"),
    "validation": (Layout.validation, "control"),
    "comparison": (Layout.comparison, "preset"),
}


@dataclass
class Material:
    """The files of one dataset by kind, and what they hold.

    ``synthetic``, ``agreement`` and ``generation`` are by (control, sampler), ``filtered`` by (control, sampler, filter), ``resampled``
    by (control, sampler, filter or "none", re-sampling), ``mixes`` by recipe, ``validation`` by control.
    """

    dataset: Dataset
    root: Path
    files: dict[str, Path | dict | list]
    tiles: pd.DataFrame
    data_sheet: DataSheet
    synthetic: dict[Key, pd.DataFrame]
    filtered: dict[tuple, pd.DataFrame]
    resampled: dict[tuple, pd.DataFrame]
    mixes: dict[str, Mix]
    agreement: dict[Key, SamplesAgreement]
    generation: dict[Key, Generation]
    reconstruction: Reconstruction
    validation: dict[str, Validation]
    comparison: Comparison | None
    leading: list[str] = field(default_factory=list)  #: recipes of the first table of this dataset
    folded: bool = False  #: shown in short, its details behind a click

    def name_of(self, key: Key) -> str:
        """The sampler, with the control only where several are compared."""
        return key[1] if len({control for control, _ in self.synthetic}) == 1 else f"{key[0]}/{key[1]}"

    def leading_keys(self, settings: Settings) -> list[Key]:
        """(control, sampler) of the leading recipes, as far as there are samples; all where they have none."""
        recipes = [settings.recipes[name] for name in self.leading]
        keys = [(recipe.control, recipe.sampler) for recipe in recipes if recipe.control]
        return [key for key in dict.fromkeys(keys) if key in self.synthetic] or list(self.synthetic)

    def other_keys(self, settings: Settings) -> list[Key]:
        """The rest."""
        leading = self.leading_keys(settings)
        return [key for key in self.synthetic if key not in leading]

    def row_of(self, key: Key, tile_id: str, named_by: Path) -> pd.DataFrame:
        """The one row of a sample's manifest with this id. Raises DataError, naming the file that named it, when there is none."""
        table = self.synthetic[key]
        found = table[table.tile_id == tile_id]
        if found.empty:
            raise DataError(f"{named_by}: names {tile_id!r}, which is not in {self.files['synthetic'][key]}; delete it and run it again")
        return found


def read_material(dataset: Dataset, results: Path, index: int, paths: dict[str, list[Path]], settings: Settings) -> Material:
    """Read what was made of a dataset, the ``index``-th of the report. Raises DataError naming a file that is missing or incomplete."""
    root = Layout(results).folder(dataset.name)
    if missing := [kind for kind in ONE_EACH if len(paths[kind]) <= index]:
        raise DataError(f"{missing[0]}: none is given for dataset {dataset.name}; give one per dataset")
    files = {kind: Path(paths[kind][index]) for kind in ONE_EACH}
    for kind, (result, *wildcards) in SEVERAL.items():
        mine = [(names, Path(path)) for path in paths[kind] if (names := result.names(path))["dataset"] == dataset.name]
        keys = [tuple(names[wildcard] for wildcard in wildcards) for names, _ in mine]
        files[kind] = {key if len(key) > 1 else key[0]: path for key, (_, path) in zip(keys, mine, strict=True)}
    files["comparison"] = list(files["comparison"].values()) if settings.comparison else []
    if missing := [key for key in (*files["agreement"], *files["generation"]) if key not in files["synthetic"]]:
        raise DataError(f"{Layout(results).synthetic(dataset.name, *missing[0])}: not among the files given, and its scores are; give both")

    def manifests(kind: str) -> dict[tuple, pd.DataFrame]:
        return {key: read_manifest(path) for key, path in files[kind].items()}

    def measured(kind: str, model: type[Model]) -> dict:
        return {key: read_model(path, model) for key, path in files[kind].items()}

    return Material(
        dataset, root, files, read_manifest(files["tiles"]), read_data_sheet(files["data_sheets"]),
        synthetic=manifests("synthetic"), filtered=manifests("filtered"), resampled=manifests("resampled"),
        mixes={name: read_mix(path) for name, path in files["mixes"].items()},
        agreement=measured("agreement", SamplesAgreement), generation=measured("generation", Generation),
        reconstruction=read_model(files["reconstruction"], Reconstruction), validation=measured("validation", Validation),
        comparison=read_comparison(files["comparison"]) if files["comparison"] else None,
    )  # fmt: skip
