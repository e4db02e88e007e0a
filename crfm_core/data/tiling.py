"""Cut scenes into tiles of one size, with labels as training ids and the georeference kept, and put them together again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from rasterio.transform import Affine
from rasterio.windows import Window
from tqdm import tqdm

from crfm_core import ConfigError, DataError
from crfm_core.data.grid import Grid, grid_of, open_scene
from crfm_core.data.labels import LabelMap
from crfm_core.data.rasters import (
    IGNORE,
    create_raster,
    encode_raster,
    has_holes,
    hash_of_pixels,
    invalid_of,
    open_raster,
    read_label,
    read_rgb,
    rgb_of,
    strips_of,
)
from crfm_core.data.scenes import read_scenes
from crfm_core.data.selection import rest_of, select_tiles
from crfm_core.data.splits import Region, regions_of
from crfm_core.data.windows import window_offsets
from crfm_core.files import write_bytes, write_text
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.settings import UNLABELLED, Dataset, Tiling

#: Tiles that a process cuts at once: neighbours, which share what is read, and few enough to keep all processes busy to the end.
CHUNK = 16


@dataclass(frozen=True)
class Scene:
    """One scene to cut: its files, how it is cut, and what its tiles' manifest rows say."""

    image: Path
    label: Path | None  #: None for a scene without a label: no label is written for its tiles
    out_dir: Path
    tiling: Tiling
    dataset: str
    split: str
    name: str
    licence: str
    caption: str
    limits: tuple[Sequence[float], Sequence[float]] | None
    label_map: tuple[tuple[int | str, int], ...] | None
    num_classes: int | None


@dataclass(frozen=True)
class TileWindow:
    """Where one tile lies in a scene, in pixels: its corner, and how much of it is inside its region; beyond that it is padding."""

    row: int
    col: int
    height: int
    width: int


def tile_scene(
    image: Path | str,
    label: Path | str | None,
    out_dir: Path | str,
    size: int,
    stride: int | None = None,
    *,
    dataset: str = "",
    split: str = "",
    scene: str = "",
    licence: str = "",
    limits: tuple[Sequence[float], Sequence[float]] | None = None,
    label_map: Mapping[int | str, int] | None = None,
    num_classes: int | None = None,
    processes: int = 1,
    **tiling: Any,
) -> list[dict]:
    """Cut one scene into ``size`` x ``size`` tiles below ``out_dir`` and return their manifest rows.

    Tiles are ``<out_dir>/images/<tile_id>`` and ``<out_dir>/labels/<tile_id>``: GeoTIFFs with their own transform when the image has a
    CRS, PNGs otherwise, or by ``format``; ``tile_id`` is ``<scene>_<row>_<col>`` with pixel offsets. Paths in the rows are relative
    to the folder that holds ``out_dir``, where the manifest lies. The scene is read window by window.

    Args:
        image, label: rasters of one size; see :class:`crfm_core.data.labels.LabelMap` for what a label may hold. None: there is none;
            the tiles have the label "" and no class, and only those that are wholly nodata are left out.
        limits: see :func:`crfm_core.data.rasters.rgb_of`.
        label_map: from values of the labels to ids 0...K-1 or 255 (ignore); None: the values are training ids.
        num_classes: K; None: the largest id plus one.
        processes: the tiles are the same with any number of them.
        tiling: edge, min_labelled, bands, ground_distance and format of :class:`crfm_core.settings.Tiling`. Padding is black and ignored.

    Pixels that the label or the image declares as nodata, or that are not numbers, become 255. Rows have the columns
    :data:`crfm_core.manifest.TILE_COLUMNS`, and inner_width and inner_height (without padding), scene_width, scene_height, image_digest
    (hash of the pixels), uniform (whether all pixels have one colour), licence and given_caption.

    Raises DataError for an unreadable file, sizes that differ, a scene smaller than a tile (edge ``shift``), or a label outside map or
    classes; ConfigError for a stride that would leave gaps.
    """
    stride = stride or size
    if not 0 < stride <= size:
        raise ConfigError(f"tile.stride: {stride} with tiles of {size} pixels leaves gaps; it must be 1...{size}")
    mapped = None if label_map is None else tuple(label_map.items())
    about = (dataset, split, scene or Path(image).stem, licence, "")
    files = Path(image), None if label is None else Path(label), Path(out_dir)
    task = Scene(*files, Tiling(size=size, stride=stride, **tiling), *about, limits, mapped, num_classes)
    rows = list(_cut_all([(task, tile_windows(task))], processes))
    if num_classes is None:
        largest = max((row["classes"][-1] for row in rows if row["classes"]), default=0)
        for row in rows:
            row["pixels"] = row["pixels"][: largest + 1]
    return rows


def tile_split(scenes_manifest: Path | str, dataset: Dataset, split: str, out_manifest: Path | str, processes: int = 1) -> pd.DataFrame:
    """Tile every scene of one split into the folder beside ``out_manifest`` that has its name; write and return that manifest.

    Where the dataset selects tiles of the split, labels are read first and only the selected tiles are written, with the list of their
    ids in ``<split>.ids.txt`` beside the manifest; ``select: {SPLIT: {ids: FILE}}`` takes such a file.

    Tiles of the split ``unlabelled`` have no labels, and a selection draws them by its seed alone; ``nodata`` counts their pixels without
    a picture, which are black.

    Raises DataError when the split has no scene, no labelled tile or only one class, and the errors of :func:`tile_scene`.
    """
    out_manifest, tiling = Path(out_manifest), dataset.tile
    folder, label_map = out_manifest.with_suffix(""), None if dataset.tile_label_map is None else tuple(dataset.tile_label_map.items())
    scenes = read_scenes(scenes_manifest)
    regions = regions_of(scenes, dataset, dataset.scenes_split(split))
    if not regions:
        remedy = "name them in source.unlabelled" if split == UNLABELLED else "give it scenes in the dataset's source"
        raise DataError(f"{scenes_manifest}: no scene in split {split!r}; {remedy}")
    tasks = []
    for row in scenes[scenes.scene.isin(list(regions))].itertuples():
        about = (dataset.name, split, row.scene, dataset.licence, row.caption)
        limits = (row.low, row.high) if tiling.scale else None
        task = Scene(
            Path(row.image), Path(row.label) if row.label else None, folder, tiling, *about, limits, label_map, len(dataset.classes)
        )
        tasks.append((task, tile_windows(task, regions[row.scene])))
    title = f"{dataset.name}/{split}"
    if selection := dataset.select.get(split):
        found = list(_cut_all(tasks, processes, f"{'tiles' if split == UNLABELLED else 'labels'} of {title}", write=False))
        _require_classes(found, dataset, scenes_manifest, split)
        tiles = pd.DataFrame(found)
        if base := selection.rest_of:
            tiles = rest_of(tiles, select_tiles(tiles, dataset.select[base], f"select.{base}", dataset.classes), tiling.size)
        chosen = select_tiles(tiles, selection, f"select.{split}", dataset.classes)
        tasks = [(task, [tile for tile in windows if _tile_id(task, tile) in chosen]) for task, windows in tasks]
    shutil.rmtree(folder, ignore_errors=True)  # tiles of an earlier run, cut otherwise
    rows = list(_cut_all(tasks, processes, f"tiles of {title}"))
    _require_classes(rows, dataset, scenes_manifest, split)
    listed = out_manifest.with_suffix(".ids.txt")
    if selection:
        write_text(listed, "".join(f"{row['tile_id']}\n" for row in rows))
    else:
        listed.unlink(missing_ok=True)
    return write_manifest(out_manifest, rows)


def tile_windows(scene: Scene, regions: Sequence[Region] | None = None) -> list[TileWindow]:
    """The tiles of a scene, or of regions of it, row by row. DataError when a whole scene is smaller than a tile and edge is ``shift``."""
    tiling = scene.tiling
    with open_raster(scene.image) as picture:
        grid = grid_of(picture, tiling.ground_distance)
    if regions is None:
        regions = [(0, 0, grid.height, grid.width)]
    if tiling.edge == "shift" and min(grid.width, grid.height) < tiling.size:
        raise DataError(
            f"{scene.image}: {grid.width}x{grid.height} pixels, smaller than a tile of {tiling.size}; "
            "lower tile.size, set tile.edge to pad or drop, or leave it out"
        )
    stride, tiles = tiling.stride or tiling.size, []
    for top, left, height, width in regions:
        offsets = (window_offsets(side, tiling.size, stride, tiling.edge) for side in (height, width))
        for row, col in product(*offsets):
            tiles.append(TileWindow(top + row, left + col, min(tiling.size, height - row), min(tiling.size, width - col)))
    return tiles


def read_mask(image: Path | str, label: Path | str, dataset: Dataset) -> tuple[np.ndarray, Grid]:
    """A whole scene's label as training ids, uint8 [H, W] with 255 where ignored, and the grid of its tiles, on which it lies.

    Errors as of :func:`tile_scene`; and for a scene without a label, whose ``label`` is "".
    """
    if not str(label):
        raise DataError(f"{image}: the scene has no label, and an image is drawn for one; name a labelled scene")
    with open_scene(image, label, dataset.tile.ground_distance) as (picture, ids):
        return LabelMap(dataset.tile_label_map, len(dataset.classes)).ids_of(ids), grid_of(picture)


def _cut_all(tasks: list[tuple[Scene, list[TileWindow]]], processes: int, title: str = "tiles", write: bool = True) -> Iterator[dict]:
    """Rows of all tiles, in order; in this process alone when there is too little work for more."""
    chunks = [(task, tiles[i : i + CHUNK], write) for task, tiles in tasks for i in range(0, len(tiles), CHUNK)]
    total = sum(len(tiles) for _, tiles, _ in chunks)
    with tqdm(total=total, desc=title, unit="tile", disable=None) as progress:
        for (_, tiles, _), rows in zip(chunks, _mapped(chunks, min(processes, total // CHUNK)), strict=True):
            yield from rows
            progress.update(len(tiles))


def _mapped(chunks: list[tuple], processes: int) -> Iterator[list[dict]]:
    if processes < 2:
        yield from map(_cut, chunks)
        return
    # Forked, so that they start at once; they only read and write by GDAL, and nothing of GDAL is open in this process.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(_cut, chunks)
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """End this process when ``parent`` has ended, even by kill -9."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(4)  # the table of all colours is slow to make
def _label_map(items: tuple | None, num_classes: int | None) -> LabelMap:
    return LabelMap(None if items is None else dict(items), num_classes)


def _cut(chunk: tuple[Scene, list[TileWindow], bool]) -> list[dict]:
    """Cut some tiles of a scene; without ``write`` only their labels are read, and rows have only ids, places and classes."""
    scene, tiles, write = chunk
    tiling, labels = scene.tiling, _label_map(scene.label_map, scene.num_classes)
    rows = []
    # without a label the image stands in for it: nothing of it is read
    with open_scene(scene.image, scene.label or scene.image, tiling.ground_distance) as (picture, ids):
        holes, crs = has_holes(picture), picture.crs.to_wkt() if picture.crs else ""
        for tile in tiles:
            window = Window(tile.col, tile.row, tile.width, tile.height)
            invalid = invalid_of(picture, window, tiling.bands) if holes else None
            mask, pixels = None, np.zeros(scene.num_classes or IGNORE, int)
            if scene.label is None:
                if invalid is not None and invalid.all():
                    continue
            else:
                mask = labels.ids_of(ids, window)
                if invalid is not None:
                    mask[invalid] = IGNORE
                mask = _padded(mask, tiling.size, IGNORE)
                pixels = np.bincount(mask.ravel(), minlength=256)[: scene.num_classes or IGNORE]
                if not pixels.any() or pixels.sum() < tiling.min_labelled * mask.size:
                    continue
            row = {"tile_id": _tile_id(scene, tile), "scene": scene.name, "row": tile.row, "col": tile.col}
            row |= {"classes": np.nonzero(pixels)[0].tolist(), "pixels": pixels.tolist()}
            if write:
                image = rgb_of(picture, window, tiling.bands, scene.limits)
                if scene.label is None:  # no label will say where there is no picture
                    row["nodata"] = 0 if invalid is None else int(invalid.sum())
                    if invalid is not None:
                        image[invalid] = 0
                row = _write(scene, tile, picture, crs, _padded(image, tiling.size, 0), mask) | row
            rows.append(row)
    return rows


def _padded(array: np.ndarray, size: int, value: int) -> np.ndarray:
    """``array`` [h,w,...] in the upper left of a square of ``value`` with ``size`` pixels a side."""
    if array.shape[:2] == (size, size):
        return array
    padded = np.full((size, size, *array.shape[2:]), value, np.uint8)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _tile_id(scene: Scene, tile: TileWindow) -> str:
    return f"{scene.name}_{tile.row}_{tile.col}"


def _write(scene: Scene, tile: TileWindow, picture: rasterio.DatasetReader, crs: str, image: np.ndarray, mask: np.ndarray | None) -> dict:
    """Write a tile's two files, or its image alone, and return its row; ``crs`` is that of ``picture`` as WKT, which is slow to make."""
    transform = [float(v) for v in tuple(picture.transform @ Affine.translation(tile.col, tile.row))[:6]] if crs else []
    suffix = f".{scene.tiling.format}" if scene.tiling.format else ".tif" if crs else ".png"
    tags = {"licence": scene.licence} if scene.licence else {}
    tile_id, digest, paths = _tile_id(scene, tile), hashlib.sha256(), {"image": "", "label": ""}
    for kind, array in (("image", image), ("label", mask)):
        if array is None:
            continue
        path = scene.out_dir / f"{kind}s" / f"{tile_id}{suffix}"
        content = encode_raster(suffix, array, picture.crs, transform, tags)
        write_bytes(path, content)
        digest.update(content)
        paths[kind] = str(path.relative_to(scene.out_dir.parent))
    size = scene.tiling.size
    return {
        "tile_id": tile_id, "dataset": scene.dataset, "split": scene.split, "scene": scene.name, "row": tile.row, "col": tile.col,
        "width": size, "height": size, **paths, "crs": crs, "transform": transform, "classes": [], "pixels": [],
        "digest": digest.hexdigest(), "inner_width": tile.width, "inner_height": tile.height,
        "scene_width": picture.width, "scene_height": picture.height, "image_digest": hash_of_pixels(image),
        "uniform": bool((image[0] == image[0, 0]).all() and (image == image[0, 0]).all()),
        "licence": scene.licence, "given_caption": scene.caption,
    }  # fmt: skip


def _require_classes(rows: list[dict], dataset: Dataset, manifest: Path | str, split: str) -> None:
    """Refuse a split without labelled tiles, and a training split of one class, from which no segmentor can learn."""
    if not rows and split == UNLABELLED:
        raise DataError(f"{manifest}: the scenes without labels have no tile: all are nodata; check source.unlabelled and the edge rule")
    if not rows:
        raise DataError(
            f"{manifest}: split {split!r} has no tile with labelled pixels: all are nodata or ignored; "
            "check label_map, tile.min_labelled and the edge rule"
        )
    present = sorted({index for row in rows for index in row["classes"]})
    if split == dataset.train and len(present) == 1:
        raise DataError(
            f"{manifest}: all {len(rows)} tiles of the training split {split!r} show one class, {dataset.classes[present[0]]}; "
            "a segmentor learns nothing from that: check label_map, or give the split other scenes"
        )


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
    out, table = Path(out), read_manifest(manifest, labelled=False)
    rows = table[table.scene == scene]
    if kind == "label" and not rows.label.all():
        raise DataError(f"{manifest}: its tiles have no labels; join their images, or what a segmentor predicts for them")
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
