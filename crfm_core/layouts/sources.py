"""The tiles that new layouts are made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.data.rasters import encode_raster
from crfm_core.files import sha256_of, write_bytes
from crfm_core.manifest import in_subfolder, paths_of, read_manifest
from crfm_core.settings import AnyLayouts


@dataclass(frozen=True)
class LayoutSources:
    """What layouts are made of.

    Attributes:
        name: of the layouts in the configuration; part of every row's ``tile_id``.
        tiles: manifest of the training tiles.
        classes: the dataset's.
        root: folder that files of rows must exist in.
        pseudo_labels: manifest of the unlabelled tiles with the critic's labels.
    """

    name: str
    tiles: Path
    classes: Sequence[str]
    root: Path
    pseudo_labels: Path | None = None

    def remedy(self, settings: AnyLayouts) -> str:
        """What to do where these tiles give no layouts."""
        if settings.NEEDS_UNLABELLED:
            return "raise pseudo_labels.keep, or give more unlabelled scenes"
        return "give training tiles of more classes"


@dataclass(frozen=True)
class LabelledTiles:
    """The rows of a manifest that have labelled pixels: their files, and their pixels per class, int64 [N,K]."""

    table: pd.DataFrame
    images: list[Path]
    labels: list[Path]
    pixels: np.ndarray

    @classmethod
    def read(cls, manifest: Path, sources: LayoutSources, remedy: str) -> LabelledTiles:
        """Raises DataError, with the ``remedy``, when there is none, or counts are of other classes."""
        table = read_manifest(manifest)
        for tile_id, pixels in zip(table.tile_id, table.pixels, strict=True):
            if len(pixels) != len(sources.classes):
                raise DataError(f"{manifest}: row {tile_id}: counts {len(pixels)} classes, the dataset has {len(sources.classes)}; "
                                "delete it and run the workflow again")  # fmt: skip
        table = table[[pixels.sum() > 0 for pixels in table.pixels]].reset_index(drop=True)
        if table.empty:
            raise DataError(f"{manifest}: no tile has a labelled pixel, of which layouts.{sources.name} could be made; {remedy}")
        images, labels = (paths_of(manifest, table, column, sources.root) for column in ("image", "label"))
        return cls(table, images, labels, np.array(list(table.pixels), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.table)


def mask_row(tiles: LabelledTiles, tile: int, again: int, mask: np.ndarray, sources: LayoutSources, out: Path, **columns: object) -> dict:
    """Write a mask [H,W] into the folder beside the manifest ``out`` that has its name; return its row, with more ``columns``.

    It was made from a ``tile``, of which it is the ``again``-th one, counted from 0. It is no real place and has no coordinates.
    """
    base, folder, suffix = tiles.table.iloc[tile].to_dict(), Path(out).resolve().parent, tiles.labels[tile].suffix
    name = f"{base['tile_id']}-{sources.name}-{again}"
    label = folder / Path(out).stem / in_subfolder(f"{name}{suffix}")
    write_bytes(label, encode_raster(suffix, np.ascontiguousarray(mask)))
    pixels, (height, width) = count_pixels(mask, len(sources.classes)), mask.shape
    sides = {"height": height, "width": width, "inner_height": height, "inner_width": width}
    return base | {key: side for key, side in sides.items() if key in base} | {
        "tile_id": name, "mask_of": base["tile_id"], "image": os.path.relpath(tiles.images[tile], folder),
        "label": os.path.relpath(label, folder), "crs": "", "transform": [], "classes": np.flatnonzero(pixels).tolist(),
        "pixels": pixels.tolist(), "digest": sha256_of(tiles.images[tile], label), "pieces": 0, **columns,
    }  # fmt: skip


def count_pixels(mask: np.ndarray, classes: int) -> np.ndarray:
    """Labelled pixels per class, int64 [K]."""
    return np.bincount(mask.ravel(), minlength=256)[:classes].astype(np.int64)
