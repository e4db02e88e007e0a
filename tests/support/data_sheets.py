"""A tiny dataset of tiles and the data sheet drawn of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core.data.rasters import IGNORE, write_raster
from crfm_core.manifest import write_manifest
from crfm_core.settings import Dataset

EVIL = "<b>wood</b>"


CLASSES = ["soil", "water", EVIL]


PALETTE = [(150, 110, 70), (30, 60, 220), (40, 160, 40)]


def dataset_of(**changes):
    source = {"kind": "embedded", "scenes": {"train": 1, "test": 1}}
    about = "Tiles drawn by hand & <i>counted</i>."
    parts = {"name": "d", "about": about, "classes": CLASSES, "palette": PALETTE, "source": source, "tile": {"size": 8}}
    return Dataset(**parts | changes)


def label_of(rows: str) -> np.ndarray:
    """A label of 8x8 pixels from a letter per pair of rows and columns: a digit is a class, a dot is ignored."""
    small = np.array([[IGNORE if letter == "." else int(letter) for letter in row] for row in rows.split()], np.uint8)
    return small.repeat(2, axis=0).repeat(2, axis=1)


#: Split to tiles: name, scene, row, col, label.
TILES = {
    "train": [("t0", "a", 0, 0, "0000 0000 1111 1111"), ("t1", "a", 0, 4, "0000 0000 0000 00..")],
    "test": [("u0", "b", 0, 0, "2222 2222 1111 ....")],
}


def row_of(split, name, scene, row, col, label, crs="", transform=()):
    pixels = np.bincount(label.ravel(), minlength=256)[: len(CLASSES)]
    suffix = ".tif" if crs else ".png"
    return {
        "tile_id": name, "dataset": "d", "split": split, "scene": scene, "row": row, "col": col, "width": 8, "height": 8,
        "image": f"{split}/images/{name}{suffix}", "label": f"{split}/labels/{name}{suffix}", "crs": crs, "transform": list(transform),
        "classes": np.flatnonzero(pixels).tolist(), "pixels": pixels.tolist(), "digest": name,
        "scene_width": {"a": 12}.get(scene, 8), "scene_height": 8,
    }  # fmt: skip


def write_scene_manifest(path, rows):
    defaults = {"dataset": "d", "split": "", "label": "none.png", "group": "", "low": [], "high": [], "caption": ""}
    pd.DataFrame([defaults | row for row in rows]).to_parquet(path)


def build(folder: Path, tiles=TILES, crs="", **scene):
    """A results folder with scenes and tiles; returns the arguments of draw_data_sheet."""
    root = folder / "results" / "d"
    manifests, used = {}, {}
    for split, entries in tiles.items():
        rows = []
        for name, place, row, col, text in entries:
            transform = [0.5, 0.0, 5e5 + col / 2 + 100 * (place == "b"), 0.0, -0.5, 5e6 - row / 2] if crs else []
            label = label_of(text)
            rows.append(row_of(split, name, place, row, col, label, crs, transform))
            write_raster(root / "tiles" / rows[-1]["image"], np.full((8, 8, 3), 100, np.uint8), crs, transform)
            write_raster(root / "tiles" / rows[-1]["label"], label, crs, transform)
            used.setdefault(place, split)
        manifests[split] = root / "tiles" / f"{split}.parquet"
        write_manifest(manifests[split], rows)
    for place in used:
        write_raster(root / "scenes" / f"{place}.png", np.full((8, 12, 3), 90, np.uint8))
    write_scene_manifest(
        root / "scenes.parquet", [{"scene": place, "split": split, "image": f"scenes/{place}.png"} | scene for place, split in used.items()]
    )
    return {"dataset": dataset_of(), "scenes": root / "scenes.parquet", "tiles": manifests, "root": root, "out": root / "data_sheet"}
