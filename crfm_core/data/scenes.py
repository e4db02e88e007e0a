"""The scene manifest: which image belongs to which label, and to which split."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rasterio.crs import CRS

from crfm_core import DataError
from crfm_core.data.grid import grid_of, require_same_size
from crfm_core.data.rasters import open_raster, scene_limits
from crfm_core.data.sources import FoundScene, open_source
from crfm_core.data.splits import assign
from crfm_core.files import atomic_path, hash_of, sha256_of
from crfm_core.manifest import broken_row, exists_listed, read_table
from crfm_core.settings import BlockSplit, Dataset, GroupSplit

#: ``image`` and ``label`` are paths; a split by group keeps ``group`` together; ``low`` and ``high`` are the values per band that become
#: 0 and 255 (empty: pixels stay as they are); ``caption`` is the text that came with the scene. With a split by blocks ``split`` is "",
#: since a scene may have ground in several.
SCENE_COLUMNS = ("dataset", "split", "scene", "image", "label", "group", "low", "high", "caption")

LONGEST_NAME = 120


def list_scenes(dataset: Dataset, root: Path | str, out: Path | str, note: Path | str | None = None) -> None:
    """Write the scene manifest ``out``: one row per scene with the columns of :data:`SCENE_COLUMNS`.

    Scenes that the source draws, and labels that it burns onto a scene's grid, go into the folder beside ``out`` that has its name;
    other files are only listed and checked. A relative ``source.root`` counts from ``root``; ``note`` is that of
    :func:`crfm_core.data.sources.fetch_dataset` for a downloaded dataset. Paths are relative to ``out`` when they lie below its folder
    and absolute otherwise: this is the one manifest that points to a user's own files.

    Raises DataError when nothing is found, an image has no label or one of another size or place, a file is unreadable, two scenes
    have one name, or a scene is in two splits.
    """
    out, source = Path(out).resolve(), open_source(dataset, root, note)
    source.require_folder()
    rows = _rows(dataset, source.find_scenes(out.with_suffix("")))
    _check_scenes(rows)
    source.write_labels(rows, out.with_suffix(""))
    for row in rows:
        check_pair(row["image"], row["label"])
    if scale := dataset.tile.scale:
        training = [row["split"] in ("", dataset.train) for row in rows]
        limits = scene_limits([row["image"] for row in rows], training, scale, dataset.tile.bands)
        rows = [row | {"low": low, "high": high} for row, (low, high) in zip(rows, limits, strict=True)]
    for row in rows:
        for column in ("image", "label"):
            path = row[column]
            row[column] = str(path.relative_to(out.parent) if path.is_relative_to(out.parent) else path)
    table = pd.DataFrame([{"low": [], "high": []} | row for row in rows])[list(SCENE_COLUMNS)]
    with atomic_path(out) as temporary:
        table.to_parquet(temporary, index=False)


def read_scenes(path: Path | str, split: str | None = None, needed: Sequence[str] = ("image", "label")) -> pd.DataFrame:
    """A scene manifest, or one split of it, with ``image`` and ``label`` as absolute paths.

    Raises DataError when it is missing or damaged, or a row names no file, or in a ``needed`` column one that is not there.
    """
    table, folder = read_table(path, SCENE_COLUMNS, "scene"), Path(path).resolve().parent
    for column in ("image", "label"):
        listed: dict[Path, set[str]] = {}
        for scene, value in zip(table.scene, table[column], strict=True):
            if column in needed and not exists_listed(folder / value, listed):
                raise broken_row(path, scene, f"its {column} {folder / value} is not there")
        table[column] = [str(folder / value) for value in table[column]]
    return table if split is None else table[table.split == split].reset_index(drop=True)


def _rows(dataset: Dataset, found: list[FoundScene]) -> list[dict]:
    """Rows of the scenes with names and splits; paths are absolute."""
    rows = [
        {"dataset": dataset.name, "split": one.split, "scene": scene_name(one.key), "image": one.image, "label": one.label}
        | {"group": one.group, "caption": one.caption}
        for one in found
    ]
    if isinstance(dataset.split, BlockSplit):
        return [row | {"split": ""} for row in rows]
    if isinstance(dataset.split, GroupSplit):
        groups = [_group(row, one.relative, dataset.split.group) for row, one in zip(rows, found, strict=True)]
        sizes = pd.Series(groups).value_counts().to_dict()
        assigned = assign(sizes, dataset.split.shares, dataset.split.seed)
        return [row | {"group": group, "split": assigned[group]} for row, group in zip(rows, groups, strict=True)]
    return rows


def scene_name(key: tuple[str, ...]) -> str:
    """A scene's name for files and targets: letters without accents, digits and ``. _ -``.

    Names with other letters, as in other scripts, and names that are too long for a file, end with a hash.
    """
    text = "-".join(key)
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).lstrip(".")
    if all(c.isascii() for c in plain) and name and len(name) <= LONGEST_NAME:
        return name
    return f"{name.strip('_')[:LONGEST_NAME] or 'scene'}-{hash_of(text)[:8]}"


def _group(row: dict, relative: Path, how: str) -> str:
    if how in ("folder", "scene"):
        return row["group" if how == "folder" else "scene"]
    match = re.search(how, relative.as_posix())
    if not match or not match[1]:
        raise DataError(
            f"split.group: {how!r} finds no group in {relative.as_posix()!r}; correct the expression, or source.exclude the scene"
        )
    return match[1]


def _check_scenes(rows: list[dict]) -> None:
    """Refuse a scene that occurs twice, by its file or its name, and content that is in two splits."""
    files: dict[Path, dict] = {}
    names: dict[str, dict] = {}
    sizes = defaultdict(list)
    for row in rows:
        if (first := files.setdefault(row["image"].resolve(), row)) is not row:
            _refuse(first, row, "is the same file as")
        if (first := names.setdefault(row["scene"], row)) is not row:
            _refuse(first, row, f"has the same scene name {row['scene']!r} as")
        sizes[row["image"].stat().st_size].append(row)
    hashes: dict[str, dict] = {}
    for group in sizes.values():
        if len({row["split"] for row in group}) > 1:  # only files of equal length can be equal, so few are read
            for row in group:
                first = hashes.setdefault(sha256_of(row["image"]), row)
                if first["split"] != row["split"]:
                    _refuse(first, row, "has the same content as")


def _refuse(first: dict, second: dict, how: str) -> None:
    one, other = (f"{row['image']}" + f" (split {row['split']})" * bool(row["split"]) for row in (first, second))
    raise DataError(
        f"{other} {how} {one}; a scene belongs to one split: narrow the globs, leave one out by source.exclude, "
        "or rename it if they are different scenes"
    )


def check_pair(image: Path, label: Path) -> None:
    """Raise DataError unless image and label are rasters of one size and, if both are georeferenced, in the same place."""
    remedy = "resample the label to the grid of the image, or use a source of kind geotiff, which does"
    with open_raster(image) as picture, open_raster(label) as ids:
        require_same_size(picture, ids, remedy)
        ours, theirs = grid_of(picture), grid_of(ids)
    if not (ours.crs and theirs.crs):
        return
    if ours.crs != theirs.crs and CRS.from_wkt(ours.crs) != CRS.from_wkt(theirs.crs):
        raise DataError(f"{label}: is in another coordinate system than its image {image}; {remedy}")
    corners = [(0, 0), (ours.width, 0), (0, ours.height), (ours.width, ours.height)]
    one, other = (np.array([grid.transform @ corner for corner in corners]) for grid in (ours, theirs))
    if np.abs(one - other).max() > np.hypot(ours.transform.a, ours.transform.d) / 2:
        raise DataError(f"{label}: lies elsewhere on the ground than its image {image}; {remedy}")
