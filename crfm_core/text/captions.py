"""Captions: the classes present in a tile, in order of id."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from crfm_core.manifest import read_manifest, relocate, write_manifest
from crfm_core.settings import Captions, Dataset
from crfm_core.text.encoders import prompt_key


def caption_of(present: list[int], classes: list[str], settings: Captions) -> str:
    """The caption of a tile that holds the classes with ids ``present``: "a satellite image of road, water, agriculture"."""
    return settings.template.replace("{classes}", ", ".join(classes[index] for index in present))


def caption_tiles(tiles: Path, dataset: Dataset, settings: Captions, out: Path) -> pd.DataFrame:
    """Write the manifest ``tiles`` again as ``out``, with ``caption`` and ``prompt`` (its key in the prompt cache) per tile."""
    table = read_manifest(tiles)
    table["caption"] = [caption_of(list(present), dataset.classes, settings) for present in table.classes]
    table["prompt"] = [prompt_key(caption) for caption in table.caption]
    for column in ("image", "label"):
        table[column] = [relocate(path, tiles, out) for path in table[column]]
    return write_manifest(out, table)
