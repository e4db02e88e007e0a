"""From a dataset's ``source`` to the scene manifest: which image belongs to which label, and to which split."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.data import scenes
from crfm_core.data.rasters import describe
from crfm_core.files import atomic_path, sha256_of
from crfm_core.settings import Dataset, EmbeddedSource, FolderSource, FolderSplit

SCENE_COLUMNS = ("dataset", "split", "scene", "image", "label")


def list_scenes(dataset: Dataset, root: Path | str, out: Path | str) -> None:
    """Write the scene manifest ``out``: one row per scene with the columns of :data:`SCENE_COLUMNS`.

    Embedded scenes are drawn into the folder beside ``out`` that has its name. Folders are only listed and checked; a relative
    ``source.root`` counts from ``root``. Paths are relative to ``out`` when they lie below its folder and absolute otherwise: this is
    the one manifest that points to a user's own files.

    Raises DataError when a glob matches no image, an image has no label or one of another size or place, a file is unreadable, or a
    scene is in two splits.
    """
    out, source = Path(out), dataset.source
    if isinstance(source, EmbeddedSource):
        rows = scenes.write_scenes(out.with_suffix(""), source.scenes, source.size, source.seed, dataset.name)
    else:
        rows = _folder_scenes(dataset.name, source, Path(root))
        _check_splits(rows)
        for row in rows:
            _check_pair(row["image"], row["label"])
            row.update({column: _written(row[column], out.parent) for column in ("image", "label")})
    with atomic_path(out) as aside:
        pd.DataFrame(rows, columns=list(SCENE_COLUMNS)).to_parquet(aside, index=False)


def read_scenes(path: Path | str, split: str | None = None) -> pd.DataFrame:
    """A scene manifest, or one split of it, with ``image`` and ``label`` as absolute paths. DataError when it is missing or damaged."""
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
        table[column] = [str(path.resolve().parent / value) for value in table[column]]
    return table if split is None else table[table.split == split].reset_index(drop=True)


def _folder_scenes(name: str, source: FolderSource, root: Path) -> list[dict]:
    """Pair images and labels of every split; ``image`` and ``label`` of the rows are resolved Paths."""
    folder = (root / source.root).resolve()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set source.root of dataset {name} to where its scenes lie")
    rows = []
    for split, files in source.splits.items():
        images, labels = _pairs(folder, files, source.label_suffix)
        where = f"dataset {name}, split {split}"
        if not images:
            raise DataError(f"{where}: no file matches images: {files.images} below {folder}; correct the glob or the root")
        without = [image for key, image in images.items() if key not in labels]
        if without:
            raise DataError(
                f"{where}: {len(without)} of {len(images)} images have no label matching {files.labels}"
                f" (stem of the image{' + ' + source.label_suffix if source.label_suffix else ''}): {', '.join(map(str, without[:3]))}"
                f"{' ...' if len(without) > 3 else ''}; add the labels, or correct labels: or label_suffix:"
            )
        for key in sorted(images):
            scene = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(key)).lstrip(".")
            rows.append({"dataset": name, "split": split, "scene": scene, "image": images[key], "label": labels[key]})
    return rows


def _pairs(folder: Path, files: FolderSplit, suffix: str) -> tuple[dict[tuple, Path], dict[tuple, Path]]:
    """Images and labels by key: what the wildcards of the glob's folders stand for, then the stem.

    ``Train/*/images/*.png`` and ``Train/*/masks/*.png`` pair ``Urban/…/1`` with ``Urban/…/1``. When the two globs have unlike numbers
    of folder wildcards the stem alone must tell.
    """
    by_stem = _folder_pattern(files.images).groups != _folder_pattern(files.labels).groups
    labels = _by_key(folder, files.labels, suffix, by_stem, skip=set())
    # Labels may lie among the images: a glob like *.tif then matches both.
    skip = set(labels.values()) if suffix or files.images != files.labels else set()
    return _by_key(folder, files.images, "", by_stem, skip), labels


def _by_key(folder: Path, pattern: str, suffix: str, by_stem: bool, skip: set[Path]) -> dict[tuple, Path]:
    found: dict[tuple, Path] = {}
    for relative in sorted(glob.glob(pattern, root_dir=folder, recursive=True)):
        path = folder / relative
        if path in skip or not path.is_file() or not path.stem.endswith(suffix):
            continue
        parents = () if by_stem else _folder_pattern(pattern).fullmatch(str(Path(relative).parent)).groups()
        key = (*(part.replace("/", "-") for part in parents if part not in ("", ".")), path.stem.removesuffix(suffix))
        if key in found:
            raise DataError(f"{found[key]} and {path} both belong to scene {'-'.join(key)}; narrow the glob {pattern}")
        found[key] = path
    return found


def _folder_pattern(pattern: str) -> re.Pattern:
    """The folder part of a glob as a regular expression with one group per wildcard."""

    def piece(part: str) -> str:
        if part.startswith("["):
            return f"({part.replace('[!', '[^')})"
        return {"**": "(.*)", "**/": "((?:.*/)?)", "*": "([^/]*)", "?": "([^/])"}.get(part) or re.escape(part)

    return re.compile("".join(map(piece, re.split(r"(\*\*/?|\*|\?|\[[^]]+\])", str(Path(pattern).parent)))))


def _check_splits(rows: list[dict]) -> None:
    """Refuse a scene that is in two splits: the same file, the same name or the same content."""
    names, files, sizes = {}, {}, defaultdict(list)
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
    raise DataError(
        f"{second['image']} (split {second['split']}) {how} {first['image']} (split {first['split']});"
        " a scene belongs to one split: remove one, or rename it if they are different scenes"
    )


def _check_pair(image: Path, label: Path) -> None:
    ours, theirs = describe(image), describe(label)
    if (ours["width"], ours["height"]) != (theirs["width"], theirs["height"]):
        raise DataError(
            f"{label}: {theirs['width']}x{theirs['height']} pixels, but its image {image} has {ours['width']}x{ours['height']};"
            " resample the label to the grid of the image"
        )
    if ours["crs"] and theirs["crs"]:
        pixel = np.hypot(ours["transform"][0], ours["transform"][3])
        if not np.allclose(ours["transform"], theirs["transform"], rtol=0, atol=pixel / 2):
            raise DataError(f"{label}: lies elsewhere on the ground than its image {image}; resample the label to the grid of the image")


def _written(path: Path, folder: Path) -> str:
    folder = folder.resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
