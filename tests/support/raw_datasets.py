"""Small datasets as users have them, written to a folder: good ones, each of a kind, that tests take or spoil."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
import shapely
from PIL import Image
from rasterio.transform import Affine

from crfm_core.data.rasters import open_raster
from crfm_core.data.scenes import list_scenes
from crfm_core.data.splits import check_disjoint
from crfm_core.data.tiling import tile_split
from crfm_core.settings import Dataset

COLOURS = np.array([[60, 16, 152], [254, 221, 58], [226, 169, 41]], np.uint8)


PLACE = Affine(0.5, 0, 400_000, 0, -0.5, 5_000_000)


UTM = "EPSG:32631"


def pattern(seed: int, size: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """An image [H,W,3] and ids 0...2 [H,W] in blocks."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, (size // 4, size // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    ids[0, :3] = 0, 1, 2
    return rng.integers(0, 256, (size, size, 3)).astype(np.uint8), ids


def write_tif(path: Path, array: np.ndarray, crs: str | None = UTM, transform: Affine = PLACE, **profile) -> Path:
    bands = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    place = {"crs": crs, "transform": transform} if crs else {}
    size = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", **size, **place, **profile) as target:
        target.write(bands)
    return path


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def folder_data(root: Path, suffix: str = ".png") -> dict:
    """Scenes train/a, train/b and test/c, with labels of ids."""
    for index, name in enumerate(("train/images/a", "train/images/b", "test/images/c")):
        image, ids = pattern(index)
        save(root / f"{name}{suffix}", image)
        save(root / f"{name.replace('images', 'labels')}.png", ids)
    splits = {split: {"images": f"{split}/images/*{suffix}", "labels": f"{split}/labels/*.png"} for split in ("train", "test")}
    return {"source": {"kind": "folder", "root": str(root), "splits": splits}, "tile": {"size": 8}}


def colour_data(root: Path) -> dict:
    """The same with labels of colours."""
    config = folder_data(root)
    for path in root.glob("*/labels/*.png"):
        save(path, COLOURS[np.asarray(Image.open(path))])
    return config | {"label_map": {"#3C1098": 0, "#FEDD3A": 1, "#E2A929": 2}}


def tif_data(root: Path) -> dict:
    """Georeferenced scenes train/a, train/b and test/c side by side, with labels of the same grid."""
    for index, name in enumerate(("train/images/a", "train/images/b", "test/images/c")):
        image, ids = pattern(index)
        place = PLACE @ Affine.translation(100 * index, 0)
        write_tif(root / f"{name}.tif", image, transform=place)
        write_tif(root / f"{name.replace('images', 'labels')}.tif", ids, transform=place)
    splits = {split: {"images": f"{split}/images/*.tif", "labels": f"{split}/labels/*.tif"} for split in ("train", "test")}
    return {"source": {"kind": "folder", "root": str(root), "splits": splits}, "tile": {"size": 8}}


def write_polygons(path: Path, values: list, shapes: list | None = None, crs: str | None = UTM) -> None:
    """Polygons that share out the ground of all scenes among ``values``, from left to right."""
    if shapes is None:
        edges = np.linspace(400_000, 400_000 + 0.5 * 224, len(values) + 1)
        shapes = [shapely.box(left, 5_000_000 - 12, right, 5_000_000) for left, right in pairwise(edges)]
    geometry = shapely.to_wkb(np.array(shapes, object))
    kind = shapely.from_wkb(geometry[0]).geom_type
    pyogrio.raw.write(path, geometry, [np.array(values, object)], ["class"], geometry_type=kind, crs=crs, layer="ground")


def vector_data(root: Path) -> dict:
    """The georeferenced scenes, with polygons that tell their classes."""
    tif_data(root)
    write_polygons(root / "ground.gpkg", ["wood", "field", "water"] * 6)
    source = {"kind": "geotiff", "root": str(root), "splits": {"train": "train/images/*.tif", "test": "test/images/*.tif"}}
    source |= {"labels": "ground.gpkg", "attribute": "class"}
    return {"source": source, "label_map": {"wood": 0, "field": 1, "water": 2}, "tile": {"size": 8}}


def raster_data(root: Path) -> dict:
    """The georeferenced scenes, with one label raster of a coarser grid."""
    config = vector_data(root)
    ids = np.arange(12 * 112).reshape(12, 112) // 5 % 3
    write_tif(root / "labels.tif", ids.astype(np.uint8), transform=PLACE @ Affine.scale(2))
    source = {key: value for key, value in config["source"].items() if key != "attribute"} | {"labels": "labels.tif"}
    return {"source": source, "tile": {"size": 8}}


def released_data(root: Path) -> dict:
    folder_data(root)
    for split in ("train", "test"):
        names = [path.stem for path in sorted((root / split / "images").iterdir())]
        lines = [{"source": f"{split}/labels/{n}.png", "target": f"{split}/images/{n}.png", "prompt": f"scene {n}"} for n in names]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"source": {"kind": "released", "root": str(root), "splits": {s: f"{s}.jsonl" for s in ("train", "test")}}, "tile": {"size": 8}}


def loveda_data(root: Path) -> dict:
    for index, (part, area) in enumerate((p, a) for p in ("Train", "Val") for a in ("Urban", "Rural")):
        image, ids = pattern(index)
        save(root / part / area / "images_png" / f"{index}.png", image)
        save(root / part / area / "masks_png" / f"{index}.png", ids)
    return {"source": {"kind": "loveda", "root": str(root)}, "tile": {"size": 8}, "test": "val"}


def fusu_data(root: Path) -> dict:
    for index in range(4):
        image, ids = pattern(index)
        save(root / "im1" / f"{index}_7.png", image)
        save(root / "im1_label" / f"{index}_7.png", ids)
    split = {"by": "group", "group": "([0-9]+)_[0-9]+", "shares": {"train": 0.5, "test": 0.5}}
    return {"source": {"kind": "fusu", "root": str(root)}, "split": split, "tile": {"size": 8}}


def dataset_of(config: dict) -> Dataset:
    return Dataset(**{"name": "own", "classes": ["wood", "field", "water"], "palette": COLOURS.tolist()} | config)


def run(dataset: Dataset, results: Path) -> None:
    """The stages of the data, as the workflow calls them."""
    list_scenes(dataset, results.parent, results / "scenes.parquet")
    manifests = [results / "tiles" / f"{split}.parquet" for split in dataset.splits]
    for manifest in manifests:
        tile_split(results / "scenes.parquet", dataset, manifest.stem, manifest)
    check_disjoint(manifests)


def merged(config: dict, **changes) -> dict:
    """The configuration with sections changed: ``tile={...}`` updates the section, other values replace it."""
    return config | {key: config[key] | value if isinstance(config.get(key), dict) else value for key, value in changes.items()}


def as_palette(path: Path, colours: np.ndarray) -> None:
    picture = Image.fromarray(np.asarray(Image.open(path)), mode="P")
    picture.putpalette(colours.tobytes())
    picture.save(path)


def changes(**values):
    """A case that changes the configuration alone."""
    return lambda root, config: merged(config, **values)


def describe(path: Path | str) -> dict:
    """Size and georeference of a raster: ``width``, ``height``, ``crs`` (WKT, "" without one), ``transform`` (6 floats or [])."""
    with open_raster(path) as source:
        crs = source.crs.to_wkt() if source.crs else ""
        return {
            "width": source.width,
            "height": source.height,
            "crs": crs,
            "transform": [float(value) for value in tuple(source.transform)[:6]] if crs else [],
        }
