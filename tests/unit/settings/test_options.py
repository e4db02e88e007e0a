"""Every option of the settings is used: by a configuration that ships, by the combined one of the tests, or by a test named here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from paths import CONFIGS, ROOT

from crfm_core.settings import Dataset, Section, Settings, load_dataset, load_settings
from crfm_core.settings.checks import faults_with_dataset
from crfm_core.settings.schema import Place


def options(model: type[Section]) -> Iterator[tuple[str, Any]]:
    """The dotted path of each option, and its default."""
    schema = model.model_json_schema()

    def below(place: Place, path: str) -> Iterator[tuple[str, Any]]:
        for one in [place.of_kind(kind) for kind in place.kinds] or [place]:
            for key, node in one.node.get("properties", {}).items():
                child, name = one.below(key), f"{path}.{key}".lstrip(".")
                while child.node.get("type") == "object" and "properties" not in child.node and not child.kinds:
                    child, name = child.below("NAME"), f"{name}.NAME"
                refs = [Place(schema, option) for option in child.node.get("anyOf", []) if "$ref" in option]
                found = [sub for each in (child, *refs) for sub in below(each, name)]
                yield from found or [(name, node.get("default"))]

    return below(Place(schema, schema), "")


def used(model: type[Section], content: dict) -> set[str]:
    """The options that a configuration sets to another value than the default."""
    schema = model.model_json_schema()

    def below(place: Place, value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict) and (place.node.get("properties") or place.kinds):
            if place.kinds:
                place = place.of_kind(value[place.discriminator]) if place.discriminator in value else place
            for key, each in value.items():
                if each != place.node.get("properties", {}).get(key, {}).get("default", "required"):
                    yield from below(place.below(key), each, f"{path}.{key}".lstrip("."))
        elif isinstance(value, dict) and place.node.get("type") == "object":
            for each in value.values():
                yield from below(place.below("NAME"), each, f"{path}.NAME")
        elif isinstance(value, dict):  # one of several types
            for option in place.node.get("anyOf", []):
                if "$ref" in option:
                    yield from below(Place(schema, option), value, path)
        else:
            yield path

    return set(below(Place(schema, schema), content, ""))


#: What goes with none of those configurations: the test that uses it instead, below tests/.
ELSEWHERE = {
    "base_model.path": "unit/test_hub.py",
    "base_model.repo": "unit/test_hub.py",
    "base_model.revision": "unit/test_hub.py",
    "captions.kind": "unit/text/test_captions.py",
    "captions.model.path": "unit/text/test_captions.py",
    "captions.model.repo": "unit/text/test_captions.py",
    "captions.model.revision": "unit/text/test_captions.py",
    "captions.model.prompt": "unit/text/test_captions.py",
    "captions.model.max_new_tokens": "unit/text/test_captions.py",
    "captions.model.batch_size": "unit/text/test_captions.py",
    "controls.NAME.processes": "unit/generator/test_processes.py",
    "controls.NAME.parallel": "unit/generator/test_processes.py",
    "controls.NAME.unlabelled_share": "unit/generator/test_missing_masks_in_training.py",
    "controls.NAME.unlabelled_masks": "unit/generator/test_missing_masks_in_training.py",
    "controls.NAME.validation_share": "unit/generator/test_early_stop.py",  # it is of datasets without val
    "controls.NAME.compile": "unit/generator/test_generator.py",
    "samplers.NAME.rectify.search": "unit/sampling/test_correction.py",  # the preset adaptive sets it
    "samplers.NAME.compile": "unit/sampling/test_shards.py",
    "segmentors.NAME.processes": "unit/segmentor/test_segmentor_processes.py",
    "segmentors.NAME.pretrained.path": "unit/segmentor/test_pretrained.py",
    "critic.path": "unit/segmentor/test_critic.py",
    "generation.weights.path": "unit/segmentor/test_pretrained.py",  # downloads of both kinds of weights are one class
    "source.label_suffix": "unit/data/test_scenes.py",
    "source.exclude": "unit/data/test_sources.py",
    "source.download": "unit/data/test_published_datasets.py",
    "source.repo": "unit/data/test_published_datasets.py",
    "source.revision": "unit/data/test_published_datasets.py",
    "source.date": "unit/data/test_published_datasets.py",
    "source.splits": "unit/data/test_sources.py",
    "source.layer": "unit/data/test_sources.py",
    "source.background": "unit/data/test_sources.py",
    "split.seed": "unit/data/test_splits.py",
    "select.NAME.ids": "unit/data/test_tiling.py",
}


def configurations(model: type[Section]) -> Iterator[dict]:
    datasets = [*(ROOT / "configs" / "datasets").glob("*.yaml"), CONFIGS / "combined_world.yaml"]
    runs = [ROOT / "config.yaml", CONFIGS / "combined.yaml", *(ROOT / "configs").glob("*.yaml")]
    for path in datasets if model is Dataset else runs:
        if path.name not in ("paper_results.yaml", "rates.yaml"):
            yield yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_option_is_used_by_a_configuration_or_by_a_test_named_here():
    unused = {
        name
        for model in (Settings, Dataset)
        for name in dict(options(model)).keys() - set().union(*(used(model, content) for content in configurations(model)))
    }
    assert unused == set(ELSEWHERE)  # one that is used has no place in the list, and one that is not used goes or gets a test


@pytest.mark.parametrize(("option", "file"), ELSEWHERE.items())
def test_the_test_of_an_option_names_it(option, file):
    assert re.search(rf"\b{option.rsplit('.', 1)[-1]}\b", (ROOT / "tests" / file).read_text(encoding="utf-8"))


def test_every_option_says_what_it_means():
    for model in (Settings, Dataset):
        schema = model.model_json_schema()
        sections = [schema, *(node for node in schema["$defs"].values() if "properties" in node)]
        assert [f"{s['title']}.{key}" for s in sections for key, node in s["properties"].items() if not node.get("description")] == []


def test_the_combined_configuration_is_valid():
    settings = load_settings(yaml.safe_load((CONFIGS / "combined.yaml").read_text()))
    assert faults_with_dataset(settings, load_dataset(CONFIGS / "combined_world.yaml")) == []
