"""Reading and checking configurations and dataset files, with errors that name every wrong key."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from crfm_core import ConfigError
from crfm_core.settings.checks import faults_between_sections, faults_of_compared, faults_with_dataset
from crfm_core.settings.data import Dataset
from crfm_core.settings.run import Settings
from crfm_core.settings.schema import faults_of


def load_settings(config: dict, source: str = "configuration") -> Settings:
    """Check a configuration as read from YAML. Raises ConfigError naming every wrong key, with what is allowed."""
    try:
        settings = Settings.model_validate(config)
    except ValidationError as error:
        raise _invalid(source, faults_of(error, Settings)) from None
    if faults := faults_between_sections(settings):
        raise _invalid(source, faults)
    return settings


def load_dataset(path: Path | str) -> Dataset:
    """Read a dataset file; with ``like: NAME`` it takes what it does not say itself from the file NAME.yaml beside it.

    Raises ConfigError when it is missing, not YAML or not a valid dataset.
    """
    content = _read_dataset(Path(path))
    try:
        return Dataset.model_validate(content)
    except ValidationError as error:
        raise _invalid(str(path), faults_of(error, Dataset)) from None


def _invalid(source: str, faults: list[str]) -> ConfigError:
    return ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults)))


def _read_dataset(path: Path, liked: tuple[Path, ...] = ()) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"datasets: no file {path}; allowed: a path, or one of {known or '(no files there)'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no keys; write a dataset as in configs/datasets/folder.yaml")
    if (other := content.pop("like", None)) is None:
        return content
    if path in liked or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(other)):
        raise ConfigError(f"{path}: like: {other!r} {'goes in a circle' if path in liked else 'is no name'}; name a dataset file beside it")
    return _read_dataset(path.parent / f"{other}.yaml", (*liked, path)) | content


def load_datasets(settings: Settings, root: Path | str) -> dict[str, Dataset]:
    """Read the dataset files that ``settings.datasets`` names (below ``root``/configs/datasets, or as paths), and those that only its
    experiments name, and check that what the settings say of splits and classes fits each of those that the run uses."""
    folder = Path(root) / "configs" / "datasets"
    datasets: dict[str, Dataset] = {}
    for entry in settings.datasets:
        dataset = load_dataset(entry if entry.endswith(".yaml") else folder / f"{entry}.yaml")
        if dataset.name in datasets:
            raise ConfigError(f"datasets: the name {dataset.name!r} occurs twice ({entry})")
        datasets[dataset.name] = dataset
    for key, table in settings.experiments.items():
        for name in table.datasets or []:
            if name not in datasets:
                dataset = load_dataset(folder / f"{name}.yaml")
                if dataset.name != name:
                    raise ConfigError(f"experiments.{key}.datasets: {folder / name}.yaml is named {dataset.name!r}; let both be the same")
                datasets[name] = dataset
    own = list(datasets)[: len(settings.datasets)]
    compared = [name for table in settings.tables for name in settings.experiments[table].datasets or []]
    for name in dict.fromkeys([*own, *compared]):
        tables = [settings.experiments[key] for key in settings.tables]
        recipes = dict.fromkeys(recipe for table in tables if name in (table.datasets or own) for recipe in table.recipes)
        if faults := faults_with_dataset(settings, datasets[name]) + faults_of_compared(settings, datasets[name], recipes):
            raise ConfigError("\n".join(faults))
    return datasets
