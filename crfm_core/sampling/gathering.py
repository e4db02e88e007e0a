"""Joining the shards of one sampler; a module of its own, because it needs none of the networks' libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import ArrowException
from pyarrow.parquet import ParquetWriter, read_metadata, read_table

from crfm_core import DataError
from crfm_core.files import atomic_path
from crfm_core.layout import Layout
from crfm_core.manifest import check_paths, read_manifest

#: Rows that are sorted and written at once.
ROWS_AT_ONCE = 20_000


def masks_to_draw(captions: Path, copies: int) -> pd.DataFrame:
    """The tiles whose masks are drawn: all of a captioned manifest.

    One of new layouts has the columns ``layouts`` and ``copy``: a mask for each image of so many copies, of which the first are taken.
    Raises DataError when it has too few.
    """
    table = read_manifest(captions)
    if "layouts" not in table:
        return table
    if (made := int(table["copy"].max()) + 1) < copies:
        raise DataError(f"{captions}: has masks for {made} copies, and {copies} are to be drawn; delete it and run the workflow again")
    return table[table["copy"] < copies].reset_index(drop=True)


def gather_shards(shards: list[Path], captions: Path, copies: int, out: Path) -> None:
    """Join the shards' manifests, which lie beside ``out``, into one, ordered by tile and copy.

    Shards that had nothing to sample, because there were more of them than batches, have empty manifests. The rows, a good part of a
    gigabyte for a large dataset, are held in memory once and written a part at a time. Raises DataError unless every tile has all its
    copies once, or its only one where masks are new layouts.
    """
    parts: list[pa.Table] = []
    listed: dict = {}
    for path in shards:
        if not _is_empty(path):
            check_paths(path, read_manifest(path, without="corrections"), Layout.synthetic.root(out), listed)
            parts.append(read_table(path))
    masks, count = masks_to_draw(captions, copies), sum(map(len, parts))
    expected = len(masks) if "layouts" in masks else copies * len(masks)
    if count == expected:
        keys = pa.concat_tables([part.select(["mask_of", "copy"]) for part in parts]).to_pandas()
        known = keys.mask_of.isin(masks.tile_id) & keys["copy"].between(0, copies - 1)
        if known.all() and not keys.duplicated().any():
            _write(parts, keys.sort_values(["mask_of", "copy"]).index.to_numpy(), out)
            return
    raise DataError(f"{out}: the shards hold {count} images instead of {expected}; delete the shards' manifests and rerun")


def _write(parts: list[pa.Table], order: np.ndarray, out: Path) -> None:
    """Write the rows of all parts, counted through, in this ``order``."""
    schema = pa.unify_schemas([part.schema for part in parts], promote_options="permissive")
    begins = np.cumsum([0, *map(len, parts)])
    with atomic_path(out) as unfinished, ParquetWriter(unfinished, schema) as writer:
        for first in range(0, len(order), ROWS_AT_ONCE):
            rows = np.sort(order[first : first + ROWS_AT_ONCE])
            ends = np.searchsorted(rows, begins)
            pieces = [part.take(rows[ends[i] : ends[i + 1]] - begins[i]) for i, part in enumerate(parts) if ends[i] < ends[i + 1]]
            table = pa.concat_tables(pieces, promote_options="permissive").cast(schema).combine_chunks()
            writer.write_table(table.take(np.searchsorted(rows, order[first : first + ROWS_AT_ONCE])))


def _is_empty(manifest: Path) -> bool:
    """Whether a manifest has no rows; False for one that cannot be read, which :func:`crfm_core.manifest.read_manifest` refuses."""
    try:
        return read_metadata(manifest).num_rows == 0
    except (OSError, ArrowException):
        return False
