"""From a dataset's ``source`` to the scene manifest: which image belongs to which label, and to which split.

Each kind of source has a module of its own, whose ``find_scenes`` lists what lies in a folder; what follows is the same for all.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rasterio.crs import CRS
from rasterio.transform import Affine

from crfm_core import DataError
from crfm_core.data.adapters import folder, fusu, geotiff, loveda, released
from crfm_core.data.adapters.found import FoundScene
from crfm_core.data.rasters import describe
from crfm_core.data.scaling import scene_limits
from crfm_core.data.splits import deal
from crfm_core.files import atomic_path, hash_of, read_json, sha256_of
from crfm_core.manifest import broken_row, is_there
from crfm_core.settings import BlockSplit, Dataset, EmbeddedSource, FolderSource, GeotiffSource, GroupSplit, ReleasedSource

#: ``image`` and ``label`` are paths; ``group`` is what a split by group keeps together; ``low`` and ``high`` hold the values per band
#: that become 0 and 255 (empty: pixels stay as they are); ``caption`` is the text that came with the scene. With a split by blocks
#: ``split`` is "", since a scene may have ground in several.
SCENE_COLUMNS = ("dataset", "split", "scene", "image", "label", "group", "low", "high", "caption")

LONGEST_NAME = 120

FINDERS = {
    "folder": folder.find_scenes,
    "geotiff": geotiff.find_scenes,
    "loveda": loveda.find_scenes,
    "fusu": fusu.find_scenes,
    "released": released.find_scenes,
}


def list_scenes(dataset: Dataset, root: Path | str, out: Path | str, fetched: Path | str | None = None) -> None:
    """Write the scene manifest ``out``: one row per scene with the columns of :data:`SCENE_COLUMNS`.

    Embedded scenes are drawn, and labels of another grid or of polygons are burned onto their scene's grid, into the folder beside
    ``out`` that has its name. Otherwise files are only listed and checked; a relative ``source.root`` counts from ``root``, and
    ``fetched`` is the note of :func:`crfm_core.data.downloads.fetch_dataset` for sources that it fetched. Paths are relative to ``out``
    when they lie below its folder and absolute otherwise: this is the one manifest that points to a user's own files.

    Raises DataError when nothing is found, an image has no label or one of another size or place, a file is unreadable, two scenes
    have one name, or a scene is in two splits.
    """
    out, source = Path(out).resolve(), dataset.source
    if isinstance(source, EmbeddedSource):
        from crfm_core.data.scenes import write_scenes  # what draws them takes a while to import

        rows = write_scenes(out.with_suffix(""), source.scenes, source.size, source.seed, dataset.name)
    else:
        place = source_folder(dataset, root, fetched)
        rows = _rows(dataset, FINDERS[source.kind](dataset, place))
        _check_scenes(rows)
        if isinstance(source, GeotiffSource):
            geotiff.burn_labels(dataset, place, rows, out.with_suffix(""))
        for row in rows:
            check_pair(row["image"], row["label"])
        if scale := dataset.tile.scale:
            training = [row["split"] in ("", dataset.train) for row in rows]
            limits = scene_limits([row["image"] for row in rows], training, scale, dataset.tile.bands)
            rows = [row | {"low": low, "high": high} for row, (low, high) in zip(rows, limits, strict=True)]
        for row in rows:
            row.update({column: _written(row[column], out.parent) for column in ("image", "label")})
    table = pd.DataFrame([{"group": "", "low": [], "high": [], "caption": ""} | row for row in rows])[list(SCENE_COLUMNS)]
    with atomic_path(out) as aside:
        table.to_parquet(aside, index=False)


def source_folder(dataset: Dataset, root: Path | str, fetched: Path | str | None = None) -> Path:
    """The folder of a dataset's scenes (see :func:`list_scenes`). DataError when it is not there."""
    place = Path(read_json(fetched)["folder"]) if fetched else (Path(root) / dataset.source.root).resolve()
    if not place.is_dir():
        raise DataError(f"{place}: no such folder; set source.root of dataset {dataset.name} to where its scenes lie")
    return place


def source_faults(dataset: Dataset, place: Path) -> list[str]:
    """What of a dataset's files is seen to be missing below its folder at a glance: no image is read and nothing is paired."""
    source, name = dataset.source, dataset.name
    if isinstance(source, ReleasedSource):
        missing = [(split, place / index) for split, index in source.splits.items() if not (place / index).is_file()]
        return [f"dataset {name}: {index}: no such file; correct source.root or source.splits.{split}" for split, index in missing]
    patterns: list[str | None] = []
    if isinstance(source, FolderSource):
        splits = (source.splits or {}).values()
        patterns = [source.images, source.labels, *(pattern for files in splits for pattern in (files.images, files.labels))]
    elif isinstance(source, GeotiffSource):
        patterns = [source.images, *(source.splits or {}).values(), *source.labels]
    missing = [pattern for pattern in patterns if pattern and not any(glob.iglob(pattern, root_dir=place, recursive=True))]
    return [f"dataset {name}: no file matches {pattern} below {place}; correct the glob or the root" for pattern in missing]


def read_scenes(path: Path | str, split: str | None = None, needed: Sequence[str] = ("image", "label")) -> pd.DataFrame:
    """A scene manifest, or one split of it, with ``image`` and ``label`` as absolute paths.

    Raises DataError when it is missing or damaged, or a row names no file, or in a ``needed`` column one that is not there.
    """
    path = Path(path)
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such scene manifest; build it by naming it as a target of the workflow") from None
    except (OSError, ValueError) as error:  # what pyarrow raises for damaged files
        raise DataError(f"{path}: not a readable parquet file ({error}); delete it and run the workflow again") from None
    missing = [name for name in SCENE_COLUMNS if name not in table]
    if missing:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}; delete it and run the workflow again")
    for column in ("image", "label"):
        listed: dict[Path, set[str]] = {}
        for scene, value in zip(table.scene, table[column], strict=True):
            if not isinstance(value, str) or not value:
                raise broken_row(path, scene, f"its {column} is {value!r}, which is no path")
            place = path.resolve().parent / value
            if column in needed and not is_there(place, listed):
                raise broken_row(path, scene, f"its {column} {place} is not there")
        table[column] = [str(path.resolve().parent / value) for value in table[column]]
    return table if split is None else table[table.split == split].reset_index(drop=True)


def _rows(dataset: Dataset, found: list[FoundScene]) -> list[dict]:
    """Rows with Paths, names and splits."""
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
        dealt = deal(sizes, dataset.split.shares, dataset.split.seed)
        return [row | {"group": group, "split": dealt[group]} for row, group in zip(rows, groups, strict=True)]
    return rows


def scene_name(key: tuple[str, ...]) -> str:
    """A scene's name for files and targets: letters without accents, digits and ``. _ -``.

    What has no such letters, as names in other scripts, or is too long for a file's name, is told apart by a hash of the whole.
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
    """Refuse a scene that is there twice, by its file or its name, and content that is in two splits."""
    files, names, sizes = {}, {}, defaultdict(list)
    for row in rows:
        for seen, key in ((files, row["image"].resolve()), (names, row["scene"])):
            first = seen.setdefault(key, row)
            if first is not row:
                _refuse(first, row, "is the same file as" if seen is files else f"has the same scene name {row['scene']!r} as")
        sizes[row["image"].stat().st_size].append(row)
    hashes: dict[str, dict] = {}
    for group in sizes.values():
        if len({row["split"] for row in group}) > 1:  # only files of equal length can be equal: most are never read here
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
    """Raise DataError unless image and label are rasters of one size that, where both say so, lie in the same place."""
    ours, theirs = describe(image), describe(label)
    if (ours["width"], ours["height"]) != (theirs["width"], theirs["height"]):
        raise DataError(
            f"{label}: {theirs['width']}x{theirs['height']} pixels, but its image {image} has {ours['width']}x{ours['height']};"
            " resample the label to the grid of the image, or use a source of kind geotiff, which does"
        )
    if not (ours["crs"] and theirs["crs"]):
        return
    if not same_crs(ours["crs"], theirs["crs"]):
        raise DataError(
            f"{label}: is in another coordinate system than its image {image}; warp the label to that of the image (gdalwarp), or use a "
            "source of kind geotiff, which does"
        )
    one, other = (np.array([Affine(*grid["transform"]) @ corner for corner in _corners(grid)]) for grid in (ours, theirs))
    if np.abs(one - other).max() > np.hypot(ours["transform"][0], ours["transform"][3]) / 2:
        raise DataError(
            f"{label}: lies elsewhere on the ground than its image {image}; resample the label to the grid of the image, or use a source "
            "of kind geotiff, which does"
        )


def _corners(grid: dict) -> list[tuple[int, int]]:
    return [(0, 0), (grid["width"], 0), (0, grid["height"]), (grid["width"], grid["height"])]


def same_crs(one: str, other: str) -> bool:
    """Whether two WKT texts mean the same coordinate system."""
    return one == other or CRS.from_wkt(one) == CRS.from_wkt(other)


def _written(path: Path, folder: Path) -> str:
    folder = folder.resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
