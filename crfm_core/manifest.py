"""The table that one stage hands to the next: a parquet file with one row per tile, written last and atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from pyarrow.parquet import read_schema

from crfm_core import DataError
from crfm_core.files import atomic_path, hash_of, inside

#: Columns every tile manifest has. Later stages add to them (caption, prompt, source, mask_of, seed, sampler, ...).
#: ``image`` and ``label`` are paths relative to the manifest; ``classes`` lists the ids present in order;
#: ``pixels`` counts them, one entry per class of the dataset; ``transform`` holds six affine numbers (empty without
#: georeference), ``crs`` a WKT text or ""; ``digest`` is the hash of the image and label files. Tiles without a label have the
#: label "", no class, zeros as pixels and the hash of the image alone.
TILE_COLUMNS = (
    "tile_id", "dataset", "split", "scene", "row", "col", "width", "height", "image", "label",
    "crs", "transform", "classes", "pixels", "digest",
)  # fmt: skip


def write_manifest(path: Path | str, rows: pd.DataFrame | list[dict]) -> pd.DataFrame:
    """Write rows as the manifest ``path``; refuse an empty one, missing columns and repeated tile ids (DataError)."""
    table = pd.DataFrame(rows).reset_index(drop=True)
    if table.empty:
        raise DataError(f"{path}: no rows; the stage before it selected nothing")
    if missing := [name for name in TILE_COLUMNS if name not in table]:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}")
    repeated = table.loc[table.tile_id.duplicated(), "tile_id"].unique()
    if len(repeated):
        raise DataError(f"{path}: tile_id repeated: {', '.join(map(str, repeated[:5]))}")
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)
    return table


def read_manifest(path: Path | str, without: str | None = None, labelled: bool = True) -> pd.DataFrame:
    """Read a manifest, except for the column ``without``. DataError when it is missing, damaged or empty, lacks columns or has a broken
    row: with ``labelled`` also one without a label."""
    table = read_table(path, TILE_COLUMNS, "tile_id", without, labelled)
    for tile_id, classes, pixels in zip(table.tile_id, table.classes, table.pixels, strict=True):
        if classes is None or pixels is None or len(classes) and not 0 <= min(classes) <= max(classes) < len(pixels):
            raise broken_row(path, tile_id, f"its classes are {classes}, and it counts the pixels of 0...{len(pixels) - 1}")
    return table


def read_table(path: Path | str, columns: Sequence[str], name: str, without: str | None = None, labelled: bool = True) -> pd.DataFrame:
    """Read a parquet file with at least these ``columns``, whose rows have an image, a label ("" is allowed unless ``labelled``) and the
    column ``name``; errors as of :func:`read_manifest`."""
    try:
        table = pd.read_parquet(path, columns=without and [column for column in read_schema(path).names if column != without])
    except FileNotFoundError:
        raise DataError(f"{path}: no such manifest; build it by naming it as a target of the workflow") from None
    except Exception as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); delete it and run the workflow again") from None
    if missing := [column for column in columns if column not in table]:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}; delete it and run the workflow again")
    if table.empty:
        raise DataError(f"{path}: it has no rows")
    for column in ("image", "label"):
        for row, value in zip(table[name], table[column], strict=True):
            if not isinstance(value, str) or not value and (labelled or column == "image"):
                raise broken_row(path, row, f"its {column} is {value!r}, which is no path")
    return table


def broken_row(manifest: Path | str, row: object, fault: str) -> DataError:
    """The error for a row that no stage writes."""
    return DataError(f"{manifest}: row {row}: {fault}; delete {manifest} and run the workflow again")


def exists_listed(path: Path, listed: dict[Path, set[str]]) -> bool:
    """Whether a file exists, by the listing of its folder, which ``listed`` caches: faster than a look at each of many files."""
    if path.parent not in listed:
        listed[path.parent] = {file.name for file in path.parent.iterdir()} if path.parent.is_dir() else set()
    return path.name in listed[path.parent]


def check_paths(
    manifest: Path | str,
    table: pd.DataFrame,
    root: Path | str,
    listed: dict[Path, set[str]] | None = None,
    columns: Sequence[str] = ("image", "label"),
) -> None:
    """Check the columns as :func:`paths_of` does: for stages that pass rows on without opening their files."""
    for column in columns:
        paths_of(manifest, table, column, root, listed)


def paths_of(
    manifest: Path | str, table: pd.DataFrame, column: str, root: Path | str, listed: dict[Path, set[str]] | None = None
) -> list[Path]:
    """Absolute paths of ``column`` ("image" or "label") of a manifest's rows.

    Paths are relative to the manifest and may point to a neighbouring stage, but never outside ``root`` (the dataset's
    results folder), and their files must exist: DataError names the offending row. ``listed`` caches the listings of folders, for several
    manifests whose files share folders.
    """
    folder, root = Path(manifest).resolve().parent, Path(root).resolve()
    found, folders, listed = [], {}, {} if listed is None else listed
    for tile_id, relative in zip(table.tile_id, table[column], strict=True):
        try:
            if Path(relative).is_absolute():
                raise DataError(f"path {relative!r} is absolute")
            if "\0" in relative:
                raise DataError(f"path {relative!r} holds a null character")
            head, name = os.path.split(relative)
            if head not in folders:  # many tiles share few folders, and resolving a path is slow
                folders[head] = inside(root, str((folder / head).resolve()))
            path = folders[head] / name
            found.append(inside(root, str(path.resolve())) if name in ("", "..") or path.is_symlink() else path)
            if not exists_listed(path, listed):
                raise DataError(f"its {column} {path} is not there")
        except DataError as error:
            raise broken_row(manifest, tile_id, str(error)) from None
    return found


def in_subfolder(name: str) -> str:
    """A file's path in one of 256 subfolders by the hash of its name, "5f/NAME".

    Shared file systems are slow where one folder holds very many files. The path follows from the name alone, so that it stays the same
    however many files there are and whoever writes them.
    """
    return f"{hash_of(name)[:2]}/{name}"


def relocate(relative: str, old_manifest: Path | str, new_manifest: Path | str) -> str:
    """The path ``relative`` of one manifest, written as a path relative to another."""
    return relocate_all([relative], old_manifest, new_manifest)[0]


def relocate_all(paths: Iterable[str], old_manifest: Path | str, new_manifest: Path | str) -> list[str]:
    """Paths of one manifest, written as paths relative to another; each of their folders is resolved once."""
    old, new, folders, found = Path(old_manifest).parent, Path(new_manifest).parent, {}, []
    for path in paths:
        head, name = os.path.split(path)
        if head not in folders:
            folders[head] = os.path.relpath(old / head, new)
        found.append(name if folders[head] == "." else f"{folders[head]}/{name}")
    return found
