"""Joining the shards of one sampler; apart from their sampling, because it needs none of the models' libraries."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.manifest import read_manifest, write_manifest


def gather_shards(shards: list[Path], captions: Path, copies: int, out: Path) -> pd.DataFrame:
    """Join the shards' manifests, which lie beside ``out``, into one; DataError unless every tile has all its copies once."""
    table = pd.concat([read_manifest(path) for path in shards], ignore_index=True)
    wanted = {(tile, copy) for tile in read_manifest(captions).tile_id for copy in range(copies)}
    found = list(zip(table.mask_of, table["copy"], strict=True))
    if set(found) != wanted or len(found) != len(wanted):
        raise DataError(f"{out}: the shards hold {len(found)} images, {len(wanted)} were asked for; delete the shards' manifests and rerun")
    return write_manifest(out, table.sort_values(["mask_of", "copy"]))
