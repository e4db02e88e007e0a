"""New masks to draw images for, one module per kind of the settings: ``draw`` of the module named like the kind does the work.

A kind's module has ``draw(settings, sources, out, count)``, which yields ``count`` rows of the manifest ``out`` in their order, each with
its mask's file written; the first rows are the same however many are asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.layout import Layout
from crfm_core.layouts.sources import LayoutSources
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.settings import AnyLayouts

__all__ = ["LayoutSources", "draw_layouts"]


def draw_layouts(
    settings: AnyLayouts, tiles: Path, copies: int, classes: Sequence[str], out: Path, pseudo_labels: Path | None = None
) -> pd.DataFrame:
    """Write the manifest ``out`` of new masks of any kind, ``copies`` times as many as there are training tiles.

    A row's ``label`` is its mask, its ``image`` that of the tile it was made from, which ``mask_of`` names. ``layouts`` is the kind,
    ``pieces`` the number of pieces pasted in, and ``copy`` counts the rows in blocks of as many as there are training tiles, so that fewer
    copies are the beginning of more. The same arguments give the same files.

    Args:
        tiles: manifest of the training tiles.
        classes: the dataset's.
        pseudo_labels: manifest of the unlabelled tiles with the critic's labels, for kind predicted.

    Raises DataError when there is nothing to make masks of, or all of them are of one class.
    """
    out, name = Path(out), Layout.layouts.names(out)["layouts"]
    shutil.rmtree(out.with_suffix(""), ignore_errors=True)  # masks of an earlier run, made otherwise
    sources = LayoutSources(name, Path(tiles), classes, Layout.layouts.root(out), pseudo_labels and Path(pseudo_labels))
    block = len(read_manifest(tiles))
    drawn = import_module(f"{__name__}.{settings.kind}").draw(settings, sources, out, copies * block)
    rows = [row | {"copy": index // block, "layouts": settings.kind} for index, row in enumerate(drawn)]
    counts = np.sum([row["pixels"] for row in rows], axis=0)
    if np.count_nonzero(counts) < 2:
        raise DataError(
            f"layouts.{name}: all {len(rows)} masks are of one class, {classes[int(counts.argmax())]}, from which nothing can be learnt; "
            f"{sources.remedy(settings)}"
        )
    print(f"{len(rows)} layouts of kind {settings.kind} from {len({row['mask_of'] for row in rows})} tiles")
    for one, count in zip(classes, counts, strict=True):
        print(f"{one}: {100 * count / counts.sum():.1f} % of the labelled pixels")
    return write_manifest(out, rows)
