"""What is wrong with a configuration, in words: one line per fault with the key's path and what is allowed."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from crfm_core import ConfigError
from crfm_core.settings.base import Section
from crfm_core.settings.schema import Place, locate


def invalid(source: str, faults: list[str]) -> ConfigError:
    """The error of a configuration with these faults; ``source`` says where it was read from."""
    return ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults)))


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
