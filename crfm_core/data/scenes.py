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
from crfm_core.data.grid import grid_of, metres_per_pixel, require_same_size
from crfm_core.data.rasters import is_palette, open_raster, scene_limits
from crfm_core.data.sources import FoundScene, open_source
from crfm_core.data.splits import assign
from crfm_core.files import atomic_path, hash_of, sha256_of
from crfm_core.manifest import broken_row, exists_listed, read_table
from crfm_core.settings import UNLABELLED, BlockSplit, Dataset, GroupSplit, Tiling

#: ``image`` and ``label`` are paths; a split by group keeps ``group`` together; ``low`` and ``high`` are the values per band that become
#: 0 and 255 (empty: pixels stay as they are); ``caption`` is the text that came with the scene. With a split by blocks ``split`` is "",
#: since a scene may have ground in several. Scenes of the split ``unlabelled`` have the label "", and names that begin with its name.
SCENE_COLUMNS = ("dataset", "split", "scene", "image", "label", "group", "low", "high", "caption")

LONGEST_NAME = 120
#: How many times as large, or as small, as those of labelled scenes the pixels of one without a label may be on the ground.
LARGEST_ZOOM = 1.1


def list_scenes(dataset: Dataset, root: Path | str, out: Path | str, note: Path | str | None = None) -> None:
    """Write the scene manifest ``out``: one row per scene with the columns of :data:`SCENE_COLUMNS`.

    Scenes that the source draws, and labels that it burns onto a scene's grid, go into the folder beside ``out`` that has its name;
    other files are only listed and checked. A relative ``source.root`` counts from ``root``; ``note`` is that of
    :func:`crfm_core.data.sources.fetch_dataset` for a downloaded dataset. Paths are relative to ``out`` when they lie below its folder
    and absolute otherwise: this is the one manifest that points to a user's own files.

    Raises DataError when nothing is found, an image has no label or one of another size or place, a file is unreadable, two scenes
    have one name, or a scene is in two splits. A scene without a label may be one of the training split too; its pixels must be as large
    on the ground as those of labelled scenes.
    """
    out, source = Path(out).resolve(), open_source(dataset, root, note)
    source.require_folder()
    labelled = _rows(dataset, source.find_scenes(out.with_suffix("")))
    labels = {row["label"] for row in labelled}  # which may lie among the images
    found = [one for one in source.find_unlabelled(out.with_suffix("")) if one.image not in labels]
    unlabelled = [_row(dataset, one) | {"label": ""} for one in found]
    rows = labelled + unlabelled
    _check_scenes(rows, dataset.train)
    source.write_labels(labelled, out.with_suffix(""))
    for row in labelled:
        check_pair(row["image"], row["label"])
    check_unlabelled([row["image"] for row in unlabelled], [row["image"] for row in labelled], dataset.tile)
    if scale := dataset.tile.scale:
        training = [row["split"] in ("", dataset.train) for row in rows]
        limits = scene_limits([row["image"] for row in rows], training, scale, dataset.tile.bands)
        rows = [row | {"low": low, "high": high} for row, (low, high) in zip(rows, limits, strict=True)]
    for row in rows:
        for column in ("image", "label"):
            if path := row[column]:
                row[column] = str(path.relative_to(out.parent) if path.is_relative_to(out.parent) else path)
    table = pd.DataFrame([{"low": [], "high": []} | row for row in rows])[list(SCENE_COLUMNS)]
    with atomic_path(out) as temporary:
        table.to_parquet(temporary, index=False)


def read_scenes(path: Path | str, split: str | None = None, needed: Sequence[str] = ("image", "label")) -> pd.DataFrame:
    """A scene manifest, or one split of it, with ``image`` and ``label`` as absolute paths; the label "" stays as it is.

    Raises DataError when it is missing or damaged, or a row names no file, or in a ``needed`` column one that is not there.
    """
    table, folder = read_table(path, SCENE_COLUMNS, "scene", labelled=False), Path(path).resolve().parent
    for column in ("image", "label"):
        listed: dict[Path, set[str]] = {}
        for scene, value, own in zip(table.scene, table[column], table.split, strict=True):
            if not value and own != UNLABELLED:
                raise broken_row(path, scene, f"its {column} is {value!r}, which is no path")
            if value and column in needed and not exists_listed(folder / value, listed):
                raise broken_row(path, scene, f"its {column} {folder / value} is not there")
        table[column] = [value and str(folder / value) for value in table[column]]
    return table if split is None else table[table.split == split].reset_index(drop=True)


def _rows(dataset: Dataset, found: list[FoundScene]) -> list[dict]:
    """Rows of labelled scenes with names and splits; paths are absolute."""
    rows = [_row(dataset, one) for one in found]
    if isinstance(dataset.split, BlockSplit):
        return [row | {"split": ""} for row in rows]
    if isinstance(dataset.split, GroupSplit):
        groups = [_group(row, one.relative, dataset.split.group) for row, one in zip(rows, found, strict=True)]
        sizes = pd.Series(groups).value_counts().to_dict()
        assigned = assign(sizes, dataset.split.shares, dataset.split.seed)
        return [row | {"group": group, "split": assigned[group]} for row, group in zip(rows, groups, strict=True)]
    return rows


def _row(dataset: Dataset, one: FoundScene) -> dict:
    # Of a scene that is also listed with a label, the name tells which is meant, and so do the ids of its tiles.
    key = (UNLABELLED, *one.key) if one.split == UNLABELLED else one.key
    row = {"dataset": dataset.name, "split": one.split, "scene": scene_name(key), "image": one.image, "label": one.label}
    return row | {"group": one.group, "caption": one.caption}


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


def _check_scenes(rows: list[dict], train: str) -> None:
    """Refuse a scene that occurs twice, by its file or its name, and content that is in two splits; but one without a label, which come
    last, may be one of the split ``train`` too."""
    files: dict[tuple[Path, bool], dict] = {}
    names: dict[tuple[str, bool], dict] = {}
    sizes = defaultdict(list)

    def check(known: dict, key: Path | str, row: dict, how: str) -> None:
        unlabelled = row["split"] == UNLABELLED
        for first in ([known.get((key, False), row)] if unlabelled else []) + [known.setdefault((key, unlabelled), row)]:
            if first is not row and not (unlabelled and first["split"] == train):
                _refuse(first, row, how)

    for row in rows:
        check(files, row["image"].resolve(), row, "is the same file as")
        name = row["scene"].removeprefix(f"{UNLABELLED}-") if row["split"] == UNLABELLED else row["scene"]
        check(names, name, row, f"has the same scene name {name!r} as")
        sizes[row["image"].stat().st_size].append(row)
    hashes: dict[str, dict] = {}
    for group in sizes.values():
        if len({row["split"] for row in group}) > 1:  # only files of equal length can be equal, so few are read
            for row in group:
                first = hashes.setdefault(sha256_of(row["image"]), row)
                if first["split"] != row["split"] and (first["split"], row["split"]) != (train, UNLABELLED):
                    _refuse(first, row, "has the same content as")
    taken = {row["scene"] for row in rows if row["split"] != UNLABELLED}
    if again := [row for row in rows if row["split"] == UNLABELLED and row["scene"] in taken]:
        raise DataError(f"{again[0]['image']}: its scene name {again[0]['scene']!r} is that of a labelled scene; rename that one")


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


def check_unlabelled(images: Sequence[Path], labelled: Sequence[Path], tiling: Tiling) -> None:
    """Raise DataError unless the images without labels can be read, show as many bands as labelled ones, and have pixels about as large,
    where both are georeferenced. ``tiling`` may make either alike, by ``bands`` and ``ground_distance``."""
    shown = {bands_shown(path) for path in labelled} if images and not tiling.bands else set()
    for image in images if shown else ():
        if (count := bands_shown(image)) not in shown:
            others = " or ".join(map(str, sorted(shown)))
            raise DataError(
                f"{image}: shows {count} band{'s' * (count > 1)}, the labelled scenes {others}; give a copy of it with as many, or leave "
                "it out of source.unlabelled"
            )
    known = [size for path in labelled if (size := pixel_size(path))] if images and not tiling.ground_distance else []
    for image in images:
        size = pixel_size(image)
        if size and known and not min(known) / LARGEST_ZOOM <= size <= max(known) * LARGEST_ZOOM:
            span = f"{min(known):.3g} m" if max(known) < 1.01 * min(known) else f"{min(known):.3g} to {max(known):.3g} m"
            raise DataError(
                f"{image}: has pixels of {size:.3g} m, and those of the labelled scenes have {span}; set tile.ground_distance, so that all "
                "are cut at one scale, or leave it out of source.unlabelled"
            )


def bands_shown(image: Path) -> int:
    """How many bands a picture shows: 1 for grey, 3 for colours, those of a palette too."""
    with open_raster(image) as picture:
        return 3 if picture.count >= 3 or is_palette(picture) else 1


def pixel_size(image: Path) -> float | None:
    """Side of a raster's pixels in metres; None without a georeference, or where the units of its system are not known."""
    with open_raster(image) as picture:
        if not picture.crs or not (picture.crs.is_geographic or picture.crs.is_projected):
            return None
        return float(np.sqrt(np.prod(metres_per_pixel(picture))))
