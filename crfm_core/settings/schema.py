"""The JSON schema of the settings, and what a walk along the keys of a configuration in it tells: wrong keys, and keys of another kind."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from crfm_core.settings.base import Section
from crfm_core.settings.run import Settings

Node = dict[str, Any]


def json_schema() -> str:
    """The schema of a configuration, as written to configs/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


@dataclass
class Place:
    """A place in a schema: what may stand there."""

    schema: Node
    node: Node
    #: The keys that lead there, without the kinds and types that pydantic puts between them.
    keys: list[str] = field(default_factory=list)
    #: Of a section that has kinds: the key that names the kind, and by kind its section.
    discriminator: str = ""
    kinds: dict[str, Node] = field(default_factory=dict)
    nullable: bool = False

    def __post_init__(self) -> None:
        self.nullable = any(option.get("type") == "null" for option in self.node.get("anyOf", []))
        self.node = self._resolved(self.node)
        if found := self.node.get("discriminator"):
            self.discriminator = found["propertyName"]
            self.kinds = {kind: self._resolved({"$ref": ref}) for kind, ref in found["mapping"].items()}

    def _resolved(self, node: Node) -> Node:
        """The node that a reference names; of a node or null the node."""
        while True:
            options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
            if "$ref" in node:
                node = self.schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
            elif len(options) == 1:
                node = options[0]
            else:
                return node

    @property
    def allowed(self) -> list[str]:
        """The keys of the section here, the one that names its kind first."""
        return sorted(self.node.get("properties", {}), key=lambda key: key != self.discriminator)

    def of_kind(self, kind: str) -> Place:
        """The section of this kind."""
        return Place(self.schema, self.kinds[kind], self.keys, self.discriminator, self.kinds)

    def below(self, part: str | int) -> Place:
        """What may stand under a key, or at an index, of what is here."""
        properties, others = self.node.get("properties", {}), self.node.get("additionalProperties")
        patterns = [*self.node.get("patternProperties", {}).values()]
        options = {option["$ref"].rsplit("/", 1)[-1]: option for option in self.node.get("anyOf", []) if "$ref" in option}
        if isinstance(part, int):
            child = self.node.get("items", {})
        elif part in properties:
            child = properties[part]
        elif isinstance(others, dict) or patterns:
            child = others if isinstance(others, dict) else patterns[0]
        elif "anyOf" in self.node:  # not a key: the name of one of several types
            return Place(self.schema, options.get(part, {}), self.keys)
        else:
            child = {}
        return Place(self.schema, child, [*self.keys, str(part)])


def locate(schema: Node, location: Iterable[str | int]) -> Place:
    """The place of a fault in a schema, from the location that pydantic gives: keys, with kinds and types between them."""
    place = Place(schema, schema)
    for part in location:
        place = place.of_kind(str(part)) if part in place.kinds and "discriminator" in place.node else place.below(part)
    return place


def faults_of(error: ValidationError, model: type[Section]) -> list[str]:
    """The faults that pydantic found."""
    schema, faults = model.model_json_schema(), error.errors()
    places = [locate(schema, fault["loc"]) for fault in faults]
    pairs = zip(faults, places, strict=True)
    return [_line(fault, place, schema) for fault, place in pairs if not _of_another_type(fault, place, faults, places)]


def _of_another_type(fault: Any, place: Place, faults: list[Any], places: list[Place]) -> bool:
    """Whether a value may be of several types and this fault speaks of one that it is not, while another fault speaks of its own."""
    return fault["type"].endswith("_type") and any(
        not other["type"].endswith("_type") and at.keys[: len(place.keys)] == place.keys for other, at in zip(faults, places, strict=True)
    )


def _line(fault: Any, place: Place, schema: dict[str, Any]) -> str:
    path, message = ".".join(place.keys), re.sub(r"^Value error, ", "", fault["msg"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path}: {_why_unknown(place.keys[-1], locate(schema, fault['loc'][:-1]))}"
    if fault["type"] == "union_tag_invalid":
        return f"{path}.{place.discriminator}: unknown kind {fault['ctx']['tag']!r}; allowed: {', '.join(place.kinds)}"
    if fault["type"] == "union_tag_not_found":
        return f"{path}.{place.discriminator}: missing; allowed: {', '.join(place.kinds)}"
    names_a_key = fault["type"] == "value_error" and re.match(r"[\w.]+: ", message)  # a section's own check: "steps: ..."
    joint = "" if not path else "." if names_a_key else ": "
    return f"{path}{joint}{message}{_found(fault)}"


def _found(fault: Any) -> str:
    simple = "input" in fault and not isinstance(fault["input"], (dict, list))
    return f" (found {fault['input']!r})" if simple else ""


def _why_unknown(key: str, section: Place) -> str:
    """Why a section does not have a key: it belongs to another kind of the section, or to none."""
    allowed = ", ".join(section.allowed) or "none"
    owners = [kind for kind, node in section.kinds.items() if key in node.get("properties", {})]
    own = [kind for kind, node in section.kinds.items() if node == section.node]
    if owners and own:
        return f"belongs to {section.discriminator} {', '.join(owners)}; {own[0]} allows: {allowed}"
    return f"unknown key; allowed: {allowed}"


def merge_layers(layers: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The configuration that several files, or changes on the command line, give together, and the settings that it does not use.

    A key of a later layer replaces that of earlier ones; sections are merged key by key. Where a later layer chooses another kind of a
    section, the keys of earlier layers that the new kind does not have are left out. They are returned as dotted paths. A key that
    stands in the layer that chooses the kind, or in a later one, always stays, so that a wrong one is refused.
    """
    schema = Settings.model_json_schema()
    merged: dict[str, Any] = {}
    unused: list[str] = []
    for layer in layers:
        _lay_over(merged, layer, Place(schema, schema), unused)
    return merged, list(dict.fromkeys(unused))


def _lay_over(below: dict[str, Any], above: Mapping[str, Any], place: Place, unused: list[str]) -> None:
    if place.kinds:
        before, kind = below.get(place.discriminator), above.get(place.discriminator, below.get(place.discriminator))
        if isinstance(kind, str) and kind in place.kinds:
            place = place.of_kind(kind)
            _drop(below, [key for key in below if before not in (None, kind) and key not in place.allowed], place, unused)
    for group in place.node.get("alternatives", []):
        if any(above.get(key) is not None for key in group):
            others = {key for other in place.node["alternatives"] if other != group for key in other}
            _drop(below, [key for key in below if key in others - set(above)], place, unused)
    for key, value in above.items():
        if isinstance(value, Mapping):
            if not isinstance(below.get(key), dict):
                below[key] = {}
            _lay_over(below[key], value, place.below(key), unused)
        else:
            below[key] = copy.deepcopy(value)


def _drop(section: dict[str, Any], keys: list[str], place: Place, unused: list[str]) -> None:
    for key in keys:
        if section.pop(key) is not None:
            unused.append(".".join([*place.keys, key]))
