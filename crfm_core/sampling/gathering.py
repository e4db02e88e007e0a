"""Joining the shards of one sampler; apart from their sampling, because it needs none of the models' libraries."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pyarrow import ArrowException
from pyarrow.parquet import read_metadata

from crfm_core import DataError
from crfm_core.manifest import check_paths, read_manifest, write_manifest


def gather_shards(shards: list[Path], captions: Path, copies: int, out: Path) -> pd.DataFrame:
    """Join the shards' manifests, which lie beside ``out``, into one; DataError unless every tile has all its copies once.

    Shards that had nothing to sample, because there were more of them than batches, have empty manifests.
    """
    filled = [path for path in shards if not _is_empty(path)]
    parts = [read_manifest(path) for path in filled]
    for path, table in zip(filled, parts, strict=True):
        check_paths(path, table, Path(out).parents[3])  # results/{dataset}/synthetic/{control}/{sampler}/...: the dataset's folder
    wanted = {(tile, copy) for tile in read_manifest(captions).tile_id for copy in range(copies)}
    found = [key for part in parts for key in zip(part.mask_of, part["copy"], strict=True)]
    if set(found) != wanted or len(found) != len(wanted):
        raise DataError(f"{out}: the shards hold {len(found)} images, {len(wanted)} were asked for; delete the shards' manifests and rerun")
    return write_manifest(out, pd.concat(parts).sort_values(["mask_of", "copy"]))


def _is_empty(manifest: Path) -> bool:
    """Whether a manifest has no rows; one that cannot be read is left to :func:`crfm_core.manifest.read_manifest` to complain of."""
    try:
        return read_metadata(manifest).num_rows == 0
    except (OSError, ArrowException):
        return False
