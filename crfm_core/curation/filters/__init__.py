"""Filters of synthetic tiles, one module per kind of the settings: ``apply`` of the module named like the kind does the work."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pandas as pd

from crfm_core.curation.filter_inputs import FilterInputs
from crfm_core.curation.filters.pixel import filter_pixels
from crfm_core.manifest import check_paths, read_manifest
from crfm_core.settings import AnyFilter

__all__ = ["filter_pixels", "filter_tiles"]


def filter_tiles(
    settings: AnyFilter,
    manifest: Path,
    root: Path,
    out: Path,
    classes: Sequence[str],
    critic: Path | None = None,
    losses: Path | None = None,
    clip: Path | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Filter the synthetic tiles of a manifest by a filter of any kind, and write the manifest ``out`` of what is left.

    ``critic`` (checkpoint or folder), ``losses`` (file of :func:`crfm_core.curation.class_losses.class_losses`) and ``clip`` (folder, or
    the note of fetching it) are opened when the kind asks for them. Raises DataError when a file is missing or nothing is left.
    """
    check_paths(manifest, read_manifest(manifest), root)
    inputs = FilterInputs(manifest, root, out, classes, critic, losses, clip, device)
    return import_module(f"{__name__}.{settings.kind}").apply(settings, inputs)
