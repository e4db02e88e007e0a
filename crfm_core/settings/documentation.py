"""The page docs/configuration.md, written from the settings: for each section a heading, what it is and a table of its keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from crfm_core.settings.data import Dataset
from crfm_core.settings.run import Settings
from crfm_core.settings.schema import Node, Place

INTRO = """\
# Configuration

A run reads two kinds of YAML files: the *configuration of the run*, which says what is made and compared, and one *dataset file* per
dataset, which says where its scenes are and what their classes are. This page lists every key of both.

**Which files are read.** Without further arguments a run reads `config.yaml`, the embedded default, which explains its keys in comments.
With `--configfile FILE` it reads FILE instead. With `--configfile config.yaml FILE` it lays FILE over `config.yaml`.
The names in `datasets` are those of files `configs/datasets/NAME.yaml`; an entry that ends in `.yaml` is the path of a file. A dataset
file with `like: OTHER` takes the keys that it does not have from `OTHER.yaml` beside it.

**How files are laid over each other.** A key of a later file replaces that of an earlier one. Sections are merged key by key, lists are
replaced as a whole. `--config key=value` is laid over all files. Where a later file chooses another kind of a section, for example
`base_model: {kind: folder, path: models/mine}` over `kind: embedded`, the keys of earlier files that the new kind does not have are
dropped, and the run names them: `unused settings: base_model.seed, base_model.vae, base_model.transformer`.

**Errors.** Everything is checked before anything runs. An error names the file, the key, what is wrong and what is allowed. A key that is
not on this page is an error. `configs/schema.json` is the JSON schema of the configuration of a run; editors use it to complete and check
YAML files.

**How to read the tables.** A key without a default is *required*. NAME stands for a name of your choice: letters, digits, `_` and `-`.

This page is generated: `python -m crfm_core.settings docs > docs/configuration.md`.
"""


def configuration_page() -> str:
    """The page as Markdown."""
    parts = [INTRO]
    for title, model in (("The configuration of a run", Settings), ("A dataset file", Dataset)):
        schema = model.model_json_schema()
        parts += [f"## {title}", *_Pages(Place(schema, schema)).text()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


class _Pages:
    """The sections of one kind of file, each with the paths at which it stands; the same section is described once."""

    def __init__(self, root: Place) -> None:
        self.root = root
        self.paths: dict[str, list[str]] = {}
        self.places: dict[str, Place] = {}
        for path, place in _sections(root, ""):
            title = _title(place)
            self.paths.setdefault(title, []).append(path)
            self.places.setdefault(title, place)

    def text(self) -> Iterator[str]:
        yield _plain(self.root.node["description"])
        yield self.table(self.root)
        for title, place in self.places.items():
            yield f"### {self.heading(title)}"
            if not place.kinds:
                yield _plain(place.node["description"])
                yield self.table(place)
            for kind in place.kinds:
                yield f"#### {self.heading(title)} with `{place.discriminator}: {kind}`"
                yield _plain(place.of_kind(kind).node["description"])
                yield self.table(place.of_kind(kind))

    def heading(self, title: str) -> str:
        return ", ".join(f"`{path}`" for path in self.paths[title])

    def table(self, section: Place) -> str:
        lines = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
        for key in section.allowed:
            node = section.node["properties"][key]
            default = "*required*" if key in section.node.get("required", []) else _default(node.get("default"))
            lines.append(f"| `{key}` | {self.type_of(section.below(key))} | {default} | {_cell(node['description'])} |")
        return "\n".join(lines)

    def type_of(self, place: Place) -> str:
        """What a value may be, in words; a section as a link to its heading."""
        node, nullable = place.node, place.nullable
        if _title(place) in self.paths:
            slug = re.sub(r"[^\w\s-]", "", self.heading(_title(place))).lower().replace(" ", "-")
            text = f"[section](#{slug})"
        elif "anyOf" in node:
            text = " or ".join(self.type_of(Place(place.schema, option)) for option in node["anyOf"] if option.get("type") != "null")
        elif "enum" in node or "const" in node:
            text = " or ".join(
                f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in node.get("enum", [node.get("const")])
            )
        elif node.get("type") == "array":
            items = node.get("prefixItems")
            text = f"list of {len(items)} integers" if items else f"list: {self.type_of(place.below(0))}"
        elif node.get("type") == "object":
            text = f"by name: {self.type_of(place.below('NAME'))}"
        else:
            text = {"string": "text", "boolean": "`true` or `false`"}.get(node.get("type", ""), str(node.get("type", ""))) + _bounds(node)
        return f"{text} or `null`" if nullable else text


def _sections(place: Place, path: str) -> Iterator[tuple[str, Place]]:
    """The paths of the sections below a section, each before those below it."""
    for one in [place.of_kind(kind) for kind in place.kinds] or [place]:
        for key in one.node.get("properties", {}):
            yield from _sections_at(one.below(key), f"{path}.{key}".lstrip("."))


def _sections_at(place: Place, path: str) -> Iterator[tuple[str, Place]]:
    if place.kinds or "properties" in place.node:
        yield path, place
        yield from _sections(place, path)
    elif place.node.get("type") == "object":
        yield from _sections_at(place.below("NAME"), f"{path}.NAME")
    for option in place.node.get("anyOf", []):
        if "$ref" in option:
            yield from _sections_at(Place(place.schema, option), path)


def _title(place: Place) -> str:
    """What tells sections apart: the name of the class, or of the classes of its kinds."""
    return " ".join(node["title"] for node in place.kinds.values()) or str("properties" in place.node and place.node["title"])


def _bounds(node: Node) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    return "".join(f", {word} {node[key]:g}" for key, word in words.items() if key in node)


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return "its defaults" if value else "none"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    """A description as a cell of a table: what Markdown would read as marks is shown as it is."""
    text = text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return re.sub(r"\{\w+\}", r"`\g<0>`", text)


def _plain(docstring: str) -> str:
    """A docstring in Markdown."""
    return re.sub(r":\w+:`[~.]?([^`]*)`", r"`\1`", docstring).replace("``", "`")
