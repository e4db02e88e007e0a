"""Scenes to tiles: windows of one size that cover every pixel, with ids remapped and the georeference kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from rasterio.enums import MaskFlags
from rasterio.windows import Window
from tqdm import tqdm

from crfm_core import ConfigError, DataError
from crfm_core.data.adapters import read_scenes
from crfm_core.data.rasters import IGNORE, label_of, open_raster, rgb_of, write_raster
from crfm_core.files import sha256_of
from crfm_core.manifest import write_manifest
from crfm_core.settings import Dataset


def tile_offsets(length: int, size: int, stride: int) -> list[int]:
    """Where tiles begin along one side: every ``stride`` pixels, the last one shifted back so that it ends with the scene."""
    return [*range(0, length - size, stride), length - size]


def tile_scene(
    image: Path | str,
    label: Path | str,
    out_dir: Path | str,
    size: int,
    stride: int | None = None,
    *,
    dataset: str = "",
    split: str = "",
    scene: str = "",
    label_map: Mapping[int, int] | None = None,
    num_classes: int | None = None,
) -> list[dict]:
    """Cut one scene into ``size`` x ``size`` tiles below ``out_dir`` and return their manifest rows (:data:`manifest.TILE_COLUMNS`).

    Tiles are ``<out_dir>/images/<tile_id>`` and ``<out_dir>/labels/<tile_id>``: GeoTIFFs with their own transform when the image has a
    CRS, PNGs otherwise; ``tile_id`` is ``<scene>_<row>_<col>`` with pixel offsets. Paths in the rows are relative to the folder that
    holds ``out_dir``, where the manifest lies. The scene is read window by window.

    ``label_map`` takes raw ids to ids 0...K-1 or 255 (ignore); without it raw ids are kept. Pixels that the label or the image declares
    as nodata become 255; a tile that has no labelled pixel left is not written. Without ``num_classes`` K is the largest id plus one.

    Raises DataError for an unreadable file, sizes that differ, a scene smaller than a tile, or an id outside map or classes;
    ConfigError for a stride that would leave gaps.
    """
    out_dir, scene, stride = Path(out_dir), scene or Path(image).stem, stride or size
    if not 0 < stride <= size:
        raise ConfigError(f"tile.stride: {stride} with tiles of {size} pixels leaves gaps; it must be 1...{size}")
    lookup = _lookup(label_map, num_classes)
    rows = []
    with open_raster(image) as picture, open_raster(label) as ids:
        if picture.shape != ids.shape:
            raise DataError(f"{label}: {ids.width}x{ids.height} pixels, but its image {image} has {picture.width}x{picture.height}")
        if min(picture.shape) < size:
            raise DataError(
                f"{image}: {picture.width}x{picture.height} pixels, smaller than a tile of {size}; lower tile.size or leave it out"
            )
        crs = picture.crs.to_wkt() if picture.crs else ""
        holes = any(MaskFlags.all_valid not in flags for flags in picture.mask_flag_enums)
        for row in tile_offsets(picture.height, size, stride):
            for col in tile_offsets(picture.width, size, stride):
                window = Window(col, row, size, size)
                mapped = lookup[label_of(ids, window)]
                if (mapped < 0).any():
                    raise DataError(_unknown_ids(ids, lookup, label_map, num_classes))
                mapped = mapped.astype(np.uint8)
                if holes:
                    mapped[picture.dataset_mask(window=window) == 0] = IGNORE
                if (mapped == IGNORE).all():
                    continue
                transform = [float(value) for value in tuple(picture.window_transform(window))[:6]] if crs else []
                tile_id = f"{scene}_{row}_{col}"
                paths = {}
                for kind, array in (("image", rgb_of(picture, window)), ("label", mapped)):
                    paths[kind] = out_dir / f"{kind}s" / f"{tile_id}{'.tif' if crs else '.png'}"
                    write_raster(paths[kind], array, crs, transform)
                pixels = np.bincount(mapped.ravel(), minlength=256)[: num_classes or IGNORE]
                rows.append(
                    {
                        "tile_id": tile_id,
                        "dataset": dataset,
                        "split": split,
                        "scene": scene,
                        "row": row,
                        "col": col,
                        "width": size,
                        "height": size,
                        "image": str(paths["image"].relative_to(out_dir.parent)),
                        "label": str(paths["label"].relative_to(out_dir.parent)),
                        "crs": crs,
                        "transform": transform,
                        "classes": np.nonzero(pixels)[0].tolist(),
                        "pixels": pixels.tolist(),
                        "digest": sha256_of(paths["image"], paths["label"]),
                    }
                )
    if num_classes is None:
        largest = max((row["classes"][-1] for row in rows), default=0)
        for row in rows:
            row["pixels"] = row["pixels"][: largest + 1]
    return rows


def tile_split(scenes_manifest: Path | str, dataset: Dataset, split: str, out_manifest: Path | str) -> pd.DataFrame:
    """Tile every scene of one split into the folder beside ``out_manifest`` that has its name; write and return that manifest.

    Raises DataError when the split has no scene or no labelled tile, and what :func:`tile_scene` raises.
    """
    out_manifest = Path(out_manifest)
    scenes = read_scenes(scenes_manifest, split)
    if scenes.empty:
        raise DataError(f"{scenes_manifest}: no scene in split {split!r}; give it scenes in the dataset's source")
    rows = []
    for scene in tqdm(scenes.itertuples(), total=len(scenes), desc=f"tiles of {dataset.name}/{split}", unit="scene", disable=None):
        rows += tile_scene(
            scene.image,
            scene.label,
            out_manifest.with_suffix(""),
            dataset.tile.size,
            dataset.tile.stride,
            dataset=dataset.name,
            split=split,
            scene=scene.scene,
            label_map=dataset.label_map,
            num_classes=len(dataset.classes),
        )
    if not rows:
        raise DataError(f"{scenes_manifest}: split {split!r} has no labelled pixel: all are nodata or ignored; check label_map")
    return write_manifest(out_manifest, rows)


def read_mask(label: Path | str, label_map: Mapping[int, int] | None, num_classes: int) -> np.ndarray:
    """A whole label raster as training ids, uint8 [H, W] with 255 for ignored pixels; ``label_map`` and errors as in :func:`tile_scene`."""
    lookup = _lookup(label_map, num_classes)
    with open_raster(label) as ids:
        mapped = lookup[label_of(ids)]
        if (mapped < 0).any():
            raise DataError(_unknown_ids(ids, lookup, label_map, num_classes))
    return mapped.astype(np.uint8)


def _lookup(label_map: Mapping[int, int] | None, num_classes: int | None) -> np.ndarray:
    """Training id per raw id as int16 [256]; -1 where a raw id is unknown."""
    lookup = np.full(256, -1, np.int16)
    lookup[IGNORE] = IGNORE
    for raw, new in ({i: i for i in range(num_classes or IGNORE)} if label_map is None else label_map).items():
        if not 0 <= raw <= 255 or (new != IGNORE and not 0 <= new < (num_classes or IGNORE)):
            raise ConfigError(f"label_map: {raw} -> {new}; raw ids are 0...255, classes 0...{(num_classes or IGNORE) - 1} or 255 (ignore)")
        lookup[raw] = new
    return lookup


def _unknown_ids(ids: rasterio.DatasetReader, lookup: np.ndarray, label_map: Mapping[int, int] | None, num_classes: int | None) -> str:
    """What to say about ids that are not allowed: counts over the whole label, read in strips."""
    counts, first = np.zeros(256, int), {}
    for top in range(0, ids.height, 512):
        strip = label_of(ids, Window(0, top, ids.width, min(512, ids.height - top)))
        counts += np.bincount(strip.ravel(), minlength=256)
        for value in np.unique(strip[lookup[strip] < 0]):
            first.setdefault(int(value), tuple(int(v) for v in np.argwhere(strip == value)[0] + (top, 0)))
    found = "; ".join(f"id {value} in {counts[value]} pixels, first at row {r}, column {c}" for value, (r, c) in sorted(first.items())[:5])
    allowed = f"0...{num_classes - 1}" if label_map is None else f"those of label_map ({', '.join(map(str, sorted(label_map)))})"
    return f"{ids.name}: unknown label {found}; allowed are {allowed} and 255. Add it to label_map (255 = ignore) or correct the label"
