"""Put the tiles of a scene together again: one raster in the scene's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rasterio.transform import Affine

from crfm_core import DataError
from crfm_core.data.rasters import IGNORE, create_raster, read_label, read_rgb, strips_of
from crfm_core.manifest import paths_of, read_manifest


def mosaic(manifest: Path | str, root: Path | str, scene: str, kind: str, out: Path | str) -> None:
    """Write ``out`` (.tif or .png), the scene that the tiles of ``manifest`` were cut from, with the scene's size, CRS and transform.

    Where tiles overlap the later row is used; tiles of one scene have the same pixels there. Padding beyond the scene is left out;
    ground without a tile is black, or 255 for labels. Written in strips, so a scene may be larger than memory.

    Args:
        manifest: of tiles, with the columns scene_width and scene_height that tiling writes.
        root: folder that the manifest's paths must stay in.
        scene: the scene's name.
        kind: ``image`` or ``label``.

    Raises DataError for a scene that the manifest does not have, and ResourceError when the disk is full.
    """
    out, table = Path(out), read_manifest(manifest)
    rows = table[table.scene == scene]
    if rows.empty:
        raise DataError(f"{manifest}: no tile of scene {scene!r}; it has {', '.join(sorted(set(table.scene))[:8])}, ...")
    first, paths = rows.iloc[0], paths_of(manifest, rows, kind, root)
    width, height = int(first.scene_width), int(first.scene_height)
    read, bands, fill = (read_rgb, 3, 0) if kind == "image" else (read_label, 1, IGNORE)
    corner = Affine(*first["transform"]) @ Affine.translation(-int(first.col), -int(first.row)) if first.crs else None
    with create_raster(out, bands, width, height, first.crs, corner) as target:
        for window in strips_of(target):
            top, strip = window.row_off, np.full((window.height, width, bands), fill, np.uint8)
            for (row, col), path in zip(rows[["row", "col"]].itertuples(index=False), paths, strict=True):
                if row < top + len(strip) and row + first.height > top:
                    _paste(strip, read(path), row - top, col)
            target.write(np.moveaxis(strip, -1, 0), window=window)


def _paste(strip: np.ndarray, tile: np.ndarray, row: int, col: int) -> None:
    """Lay the part of a tile that meets the strip [h,W,bands] into it; ``row`` counts from the strip's top and may be negative."""
    tile = tile.reshape(*tile.shape[:2], -1)
    skip = max(0, -row)
    part = tile[skip : len(strip) - row, : strip.shape[1] - col]
    strip[row + skip : row + skip + len(part), col : col + part.shape[1]] = part
