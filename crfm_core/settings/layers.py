"""Several configurations over each other, later ones over earlier ones, where a later one may choose another kind of a section."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from crfm_core.settings.run import Settings
from crfm_core.settings.schema import Place


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
