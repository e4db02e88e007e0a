"""The critic's labels of the unlabelled tiles as masks, as they are: 255 where the critic is not sure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from crfm_core import DataError
from crfm_core.files import hash_of
from crfm_core.layouts.sources import LabelledTiles, LayoutSources
from crfm_core.settings import PredictedLayouts


def draw(settings: PredictedLayouts, sources: LayoutSources, out: Path, count: int) -> Iterator[dict]:
    """Rows of the manifest ``out``: the pseudo-labelled tiles in an order by hash of seed and id, from the first again where there are few.

    No mask is written; a row keeps the place of its tile. Tiles in which the critic is sure of no pixel are left out.
    """
    if sources.pseudo_labels is None:
        raise DataError(f"layouts.{sources.name}: kind predicted needs the critic's labels of unlabelled tiles; name unlabelled scenes")
    tiles = LabelledTiles.read(sources.pseudo_labels, sources, sources.remedy(settings))
    ids, folder = list(tiles.table.tile_id), Path(out).resolve().parent
    order = sorted(range(len(tiles)), key=lambda row: hash_of("layout", settings.seed, ids[row]))
    for index in range(count):
        again, row = divmod(index, len(tiles))
        tile = order[row]
        yield tiles.table.iloc[tile].to_dict() | {
            "tile_id": f"{ids[tile]}-{sources.name}-{again}",
            "mask_of": ids[tile],
            "image": os.path.relpath(tiles.images[tile], folder),
            "label": os.path.relpath(tiles.labels[tile], folder),
            "pieces": 0,
        }
