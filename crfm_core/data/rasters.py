"""Reading and writing images and label maps: GeoTIFF when there is a georeference, PNG when there is none."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image, PngImagePlugin
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import Affine
from rasterio.windows import Window

from crfm_core import DataError, ResourceError
from crfm_core.files import atomic_path

IGNORE = 255
IGNORED = (64, 68, 74)  #: colour of ignored pixels in pictures; dark, as palettes are light or vivid


@contextlib.contextmanager
def open_raster(path: Path | str) -> Iterator[rasterio.DatasetReader]:
    """Open any raster GDAL knows; whatever goes wrong with it, also while it is read inside the block, is a DataError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as source:
                yield source
        except RasterioError as error:
            reason = str(error.__cause__ or error)
            raise DataError(f"{path}: not a readable raster ({reason}); is it complete, and an image?") from error


def describe(path: Path | str) -> dict:
    """Size and georeference without reading pixels: ``width``, ``height``, ``crs`` (WKT, "" without one), ``transform`` (6 floats or []).

    A file counts as georeferenced when it has a CRS; a transform alone says nothing about the ground.
    """
    with open_raster(path) as source:
        crs = source.crs.to_wkt() if source.crs else ""
        return {
            "width": source.width,
            "height": source.height,
            "crs": crs,
            "transform": [float(value) for value in tuple(source.transform)[:6]] if crs else [],
        }


def read_tags(path: Path | str) -> dict[str, str]:
    """The text entries of a raster, as :func:`write_raster` wrote them."""
    with open_raster(path) as source:
        return source.tags()


def read_rgb(path: Path | str, window: Window | None = None) -> np.ndarray:
    """The first three bands (a grey or palette image is expanded) as uint8 [H,W,3]; DataError for any other depth."""
    with open_raster(path) as source:
        return rgb_of(source, window)


def read_label(path: Path | str, window: Window | None = None) -> np.ndarray:
    """The class ids of a single-band raster as uint8 [H,W]; its declared nodata value becomes 255 (ignore)."""
    with open_raster(path) as source:
        return label_of(source, window)


def rgb_of(source: rasterio.DatasetReader, window: Window | None = None) -> np.ndarray:
    """:func:`read_rgb` of a raster that is open already."""
    if any(dtype != "uint8" for dtype in source.dtypes[:3]):
        raise DataError(f"{source.name}: pixels are {source.dtypes[0]}, expected uint8; scale the scene to 0..255 first")
    if source.count >= 3:
        return np.ascontiguousarray(np.moveaxis(source.read((1, 2, 3), window=window), 0, -1))
    grey = source.read(1, window=window)
    if source.colorinterp[0] is rasterio.enums.ColorInterp.palette:
        colours = np.zeros((256, 3), np.uint8)
        for value, rgba in source.colormap(1).items():
            colours[value] = rgba[:3]
        return colours[grey]
    return np.repeat(grey[..., None], 3, axis=2)


def label_of(source: rasterio.DatasetReader, window: Window | None = None) -> np.ndarray:
    """:func:`read_label` of a raster that is open already."""
    if source.count != 1:
        raise DataError(f"{source.name}: {source.count} bands, expected one band of class ids; convert colours to ids first")
    ids = source.read(1, window=window)
    if source.nodata is not None:
        ids = np.where(np.isnan(ids) if np.isnan(source.nodata) else ids == source.nodata, IGNORE, ids)
    if ids.dtype != np.uint8:
        if (ids < 0).any() or (ids > 255).any() or (ids != np.round(ids)).any():
            raise DataError(f"{source.name}: values {ids.min()}..{ids.max()} are not class ids, expected whole numbers 0..255")
        ids = ids.astype(np.uint8)
    return ids


def write_raster(
    path: Path | str,
    array: np.ndarray,
    crs: str | None = None,
    transform: Sequence[float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write uint8 [H,W] or [H,W,3] atomically: a GeoTIFF (deflate) for .tif, a PNG for .png, ``tags`` as its text entries.

    ``crs`` is WKT (or any text rasterio understands) and ``transform`` six affine numbers; a PNG has room for neither.
    Raises DataError for what cannot be written so, ResourceError or OSError when the disk does not take it all.
    """
    path, array = Path(path), np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] == 3):
        raise DataError(f"{path}: cannot write {array.dtype} {list(array.shape)}, expected uint8 [H,W] or [H,W,3]")
    tags = {name: str(value) for name, value in (tags or {}).items()}
    if path.suffix == ".png":
        if crs:
            raise DataError(f"{path}: a PNG cannot hold a coordinate system; write a .tif")
        entries = PngImagePlugin.PngInfo()
        for name, value in tags.items():
            entries.add_text(name, value)
        with atomic_path(path) as aside:
            Image.fromarray(array).save(aside, pnginfo=entries)
        return
    if path.suffix not in (".tif", ".tiff"):
        raise DataError(f"{path}: unknown suffix {path.suffix!r}, expected .tif or .png")
    bands = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    profile = {
        "driver": "GTiff",
        "count": len(bands),
        "height": bands.shape[1],
        "width": bands.shape[2],
        "dtype": "uint8",
        "compress": "deflate",
        "bigtiff": "if_safer",
        "crs": crs or None,
        "transform": Affine(*transform) if transform is not None and len(transform) else None,
    }
    if len(bands) == 3:
        profile["photometric"] = "RGB"
    with warnings.catch_warnings(), atomic_path(path) as aside:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(aside, "w", **profile) as target:
            target.write(bands)
            target.update_tags(**tags)
        # On a full disk GDAL ends small files early when it closes them, and says nothing.
        try:
            with rasterio.open(aside) as written:
                written.read()
        except RasterioError as error:
            raise ResourceError(f"{path}: could not be written whole ({error}); see that the disk has room") from None


def paint(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class ids [H,W] as colours uint8 [H,W,3]."""
    colours = np.full((256, 3), IGNORED, np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = IGNORED
    return colours[label]
