"""The one table that stages hand to each other: a parquet file with one row per tile, written last and atomically."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.files import atomic_path, inside

#: Columns every tile manifest has. Later stages add to them (caption, prompt, source, mask_of, seed, sampler, ...).
#: ``image`` and ``label`` are paths relative to the manifest; ``classes`` lists the ids present in order;
#: ``pixels`` counts them, one entry per class of the dataset; ``transform`` holds six affine numbers (empty without
#: georeference), ``crs`` a WKT text or ""; ``digest`` is the hash of the image and label files.
TILE_COLUMNS = (
    "tile_id", "dataset", "split", "scene", "row", "col", "width", "height", "image", "label",
    "crs", "transform", "classes", "pixels", "digest",
)  # fmt: skip


def write_manifest(path: Path | str, rows: pd.DataFrame | list[dict]) -> pd.DataFrame:
    """Write rows as the manifest ``path``; refuse an empty one, missing columns and repeated tile ids (DataError)."""
    table = pd.DataFrame(rows).reset_index(drop=True)
    if table.empty:
        raise DataError(f"{path}: no rows; the stage before it selected nothing")
    missing = [name for name in TILE_COLUMNS if name not in table]
    if missing:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}")
    repeated = table.loc[table.tile_id.duplicated(), "tile_id"].unique()
    if len(repeated):
        raise DataError(f"{path}: tile_id repeated: {', '.join(map(str, repeated[:5]))}")
    with atomic_path(path) as aside:
        table.to_parquet(aside, index=False)
    return table


def read_manifest(path: Path | str) -> pd.DataFrame:
    """Read a manifest; DataError when it is missing, damaged, empty or lacks columns."""
    path = Path(path)
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest; build it by naming it as a target of the workflow") from None
    except Exception as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); delete it and run the workflow again") from None
    missing = [name for name in TILE_COLUMNS if name not in table]
    if missing or table.empty:
        raise DataError(f"{path}: " + (f"columns missing: {', '.join(missing)}" if missing else "it has no rows"))
    return table


def paths_of(manifest: Path | str, table: pd.DataFrame, column: str, root: Path | str) -> list[Path]:
    """Absolute paths of ``column`` ("image" or "label") of a manifest's rows.

    Paths are relative to the manifest and may point to a neighbouring stage, but never outside ``root`` (the dataset's
    results folder): DataError names the offending row.
    """
    folder, root = Path(manifest).resolve().parent, Path(root).resolve()
    found, folders = [], {}
    for tile_id, relative in zip(table.tile_id, table[column], strict=True):
        try:
            if Path(relative).is_absolute():
                raise DataError(f"path {relative!r} is absolute")
            if "\0" in relative:
                raise DataError(f"path {relative!r} holds a null character")
            head, name = os.path.split(relative)
            if head not in folders:  # a manifest of many tiles has few folders, and resolving each path takes a while
                folders[head] = inside(root, str((folder / head).resolve()))
            path = folders[head] / name
            found.append(inside(root, str(path.resolve())) if name in ("", "..") or path.is_symlink() else path)
        except DataError as error:
            raise DataError(f"{manifest}: row {tile_id}: {error}") from None
    return found


def relocate(relative: str, old_manifest: Path | str, new_manifest: Path | str) -> str:
    """The path ``relative`` of one manifest, written as a path relative to another."""
    return os.path.relpath(Path(old_manifest).parent / relative, Path(new_manifest).parent)
