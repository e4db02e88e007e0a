"""Re-samplings of synthetic tiles, one module per kind of the settings: ``choose`` of the module named like the kind does the work.

A kind's module has ``choose(settings, table, ...)``, which rows are kept as bool [N]; its other arguments are those of
:func:`resample_tiles`, and it may add columns to the table. ``REMEDY`` is what to do when no row is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.curation.selection import keep_rows
from crfm_core.manifest import check_paths, read_manifest
from crfm_core.settings import AnyResampling


def resample_tiles(
    settings: AnyResampling,
    manifest: Path | str,
    tiles: Path | str,
    class_losses: Sequence[float | None],
    classes: Sequence[str],
    out: Path | str,
    root: Path | str | None = None,
) -> pd.DataFrame:
    """Write the manifest ``out`` with those rows of a manifest of synthetic tiles that a re-sampling of any kind keeps.

    Images and labels stay where they are; the column ``corrections``, most of a manifest's size, is left out.

    Args:
        manifest: synthetic tiles, filtered or not.
        tiles: the manifest of the tiles whose masks were used (column ``mask_of``), with their pixels before any filter.
        class_losses: the critic's mean loss per class on real tiles, None for a class that they lack.
        root: folder that files of rows must exist in; None: not checked.

    Raises DataError when no tile is kept, or there is nothing to choose by.
    """
    if len(class_losses) != len(classes):
        raise DataError(f"{len(class_losses)} class losses for {len(classes)} classes; compute them with a critic of these classes")
    table = read_manifest(manifest, without="corrections")
    if root is not None:
        check_paths(manifest, table, root)
    kind = import_module(f"{__name__}.{settings.kind}")
    chosen = kind.choose(settings, table, manifest, tiles, class_losses, classes)
    return keep_rows(manifest, table, chosen, out, classes, kind.REMEDY)
