"""The JSON schema of the settings, and a walk along the keys of a configuration in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
