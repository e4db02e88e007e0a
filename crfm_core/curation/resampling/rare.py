"""Keep images that show a poorly segmented class, or of which most survived the pixel filter (TISynth)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.settings import RareResampling

REMEDY = "lower the re-sampling's min_pixels or survival, or raise the margin of the filter"


def choose(
    settings: RareResampling, table: pd.DataFrame, manifest: Path, tiles: Path, class_losses: Sequence[float | None], classes: Sequence[str]
) -> np.ndarray:
    """Which rows are kept, bool [N], by the named or worst classes. Raises DataError unless a pixel filter went before."""
    if settings.classes:
        rare = [list(classes).index(name) for name in settings.classes]
    else:
        known = {c: loss for c, loss in enumerate(class_losses) if loss is not None}
        if not known:
            raise DataError("no class has a mean loss on real tiles, so none is the worst; name some: classes of the re-sampling")
        rare = sorted(known, key=lambda c: (-known[c], c))[: settings.worst]
    print(f"poorly segmented: {', '.join(classes[c] for c in rare)}", flush=True)
    if "kept" not in table:
        raise DataError(
            f"{manifest}: no pixel filter went before (there is no column kept), so a re-sampling of kind rare would keep every "
            "image; give the recipe a filter of kind pixel, or one after such a filter"
        )
    return by_rare_class(table, rare, settings.min_pixels, settings.survival)


def by_rare_class(table: pd.DataFrame, rare: Sequence[int], min_pixels: int, survival: float) -> np.ndarray:
    """Which rows are kept, bool [N]: those with at least ``min_pixels`` pixels of one of the ``rare`` classes, or of whose labelled pixels
    more than the share ``survival`` went through the filter (column ``kept``). Tiles without any labelled pixel do not."""
    pixels = np.array(list(table.pixels))
    shows = (pixels[:, list(rare)] >= min_pixels).any(axis=1)
    survived = (table.kept.to_numpy() > survival) & (pixels.sum(axis=1) > 0)
    only = int((survived & ~shows).sum())
    print(f"{int(shows.sum())} tiles show a poorly segmented class, {only} others came through the filter", flush=True)
    return shows | survived
