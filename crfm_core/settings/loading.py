"""Reading and checking configurations and dataset files, with errors that name every wrong key; and their JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import ValidationError

from crfm_core import ConfigError
from crfm_core.settings.data import Dataset
from crfm_core.settings.run import Settings


def _explain(source: str, error: ValidationError) -> ConfigError:
    """One line per fault: the key's path, what is wrong, what is allowed."""
    lines = []
    for fault in error.errors():
        path = ".".join(_keys_of(fault["loc"]))
        message = re.sub(r"^Value error, ", "", fault["msg"])
        if fault["type"] == "extra_forbidden":
            message = f"unknown key; allowed: {', '.join(_allowed_keys(error.title, fault['loc'][:-1])) or 'none'}"
        elif "input" in fault and not isinstance(fault["input"], (dict, list)):
            message += f" (found {fault['input']!r})"
        # a section's own check names the key below it first ("rectify.steps: ...")
        joint = "." if fault["type"] == "value_error" and re.match(r"[\w.]+: ", message) else ": "
        lines += [f"  {path}{joint}{message}" if path else f"  {part}" for part in message.split("\n")[: 1 if path else None]]
    return ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines))


#: The kinds that pydantic puts between the keys of a fault's location.
KINDS = {
    "base_model": ("embedded", "folder", "hub"),
    "source": ("embedded", "folder", "geotiff", "released", "loveda", "fusu"),
    "split": ("group", "blocks"),
}


def _keys_of(location: tuple) -> Iterator[str]:
    """The keys of a fault's location, without the kinds and types that pydantic puts between them."""
    for before, part in zip(("", *location), location, strict=False):
        is_kind = part in KINDS.get(before, ())
        if not is_kind and not re.match(r"constrained-|literal\[|function-", str(part)):
            yield str(part)


def _allowed_keys(model_name: str, location: tuple) -> list[str]:
    """Keys allowed in the section at ``location``, found by walking the schema the models give."""
    schema = {"Settings": Settings, "Dataset": Dataset}[model_name].model_json_schema()
    node = schema

    def resolve(node: dict) -> dict:
        while "$ref" in node or "anyOf" in node:
            if "anyOf" in node:  # one or null
                node = next(option for option in node["anyOf"] if option.get("type") != "null")
            else:
                node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        return node

    for part in location:
        node = resolve(node)
        if "discriminator" in node and part in node["discriminator"]["mapping"]:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:
            node = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), {})
    return list(resolve(node).get("properties", {}))


def load_settings(config: dict, source: str = "configuration") -> Settings:
    """Check a configuration as read from YAML. Raises ConfigError naming every wrong key, with what is allowed."""
    try:
        return Settings.model_validate(config)
    except ValidationError as error:
        raise _explain(source, error) from None


def load_dataset(path: Path | str) -> Dataset:
    """Read a dataset file; with ``like: NAME`` it takes what it does not say itself from the file NAME.yaml beside it.

    Raises ConfigError when it is missing, not YAML or not a valid dataset.
    """
    content = _read_dataset(Path(path))
    try:
        return Dataset.model_validate(content)
    except ValidationError as error:
        raise _explain(str(path), error) from None


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
    compared = [name for table in settings.tables for name in settings.experiments[table].datasets or []]
    for name in dict.fromkeys([*list(datasets)[: len(settings.datasets)], *compared]):
        _check_fit(settings, datasets[name])
    return datasets


def _check_fit(settings: Settings, dataset: Dataset) -> None:
    """Raise ConfigError when the settings name splits or classes that the dataset does not have, or train on its test split."""
    named = {f"recipes.{name}.split": recipe.split or dataset.train for name, recipe in settings.recipes.items()}
    named |= {f"filters.{name}.statistics_split": one.statistics_split for name, one in settings.filters.items()}
    for key, split in named.items():
        if split is not None and split not in dataset.splits:
            raise ConfigError(f"{key}: {dataset.name} has no split {split!r}; allowed: {', '.join(dataset.splits)}")
        if split == dataset.test:
            raise ConfigError(f"{key}: {split!r} is the test split of {dataset.name}; nothing may train on it")
    looked = settings.evaluation
    if looked.stride and looked.stride > (looked.window or dataset.tile.size):
        raise ConfigError(
            f"evaluation.stride: {looked.stride} with windows of {dataset.name}'s tile size, {dataset.tile.size}, leaves gaps"
        )
    if settings.generation.split not in (None, *dataset.splits):
        raise ConfigError(
            f"generation.split: {dataset.name} has no split {settings.generation.split!r}; allowed: {', '.join(dataset.splits)}"
        )
    for name, resampling in settings.resamplings.items():
        if unknown := [one for one in resampling.classes or [] if one not in dataset.classes]:
            raise ConfigError(
                f"resamplings.{name}.classes: {dataset.name} has no class {unknown[0]!r}; allowed: {', '.join(dataset.classes)}"
            )
    for name, segmentor in settings.segmentors.items():
        if isinstance(segmentor.class_weights, list) and len(segmentor.class_weights) != len(dataset.classes):
            raise ConfigError(
                f"segmentors.{name}.class_weights: {len(segmentor.class_weights)} numbers for the {len(dataset.classes)} classes of "
                f"{dataset.name}; give one per class"
            )


def json_schema() -> str:
    """The configuration's JSON schema, as written to configs/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"
