"""The grid that tiles are cut on: a scene's own pixels, or pixels of a configured ground distance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import MaskFlags, Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT

from crfm_core import DataError
from crfm_core.data.rasters import alpha_band, name_of, open_raster

METRES_PER_DEGREE = 111_320.0  #: along a meridian, and along the equator


@dataclass(frozen=True)
class Grid:
    """Size and place of a scene's pixels; ``crs`` is WKT, "" without georeference, when ``transform`` counts pixels."""

    width: int
    height: int
    crs: str
    transform: Affine

    @property
    def is_north_up(self) -> bool:
        return self.transform.b == self.transform.d == 0 and self.transform.a > 0 and (self.transform.e < 0 or not self.crs)


def metres_per_pixel(source: rasterio.DatasetReader) -> tuple[float, float]:
    """Sides of a pixel on the ground, along a row and along a column; for degrees those at the scene's middle. DataError without a CRS."""
    if not source.crs:
        raise DataError(f"{name_of(source)}: has no coordinate system, so its ground distance is unknown; leave out tile.ground_distance")
    t = source.transform
    along, down = np.hypot(t.a, t.d), np.hypot(t.b, t.e)
    if source.crs.is_geographic:
        _, latitude = t @ (source.width / 2, source.height / 2)
        return along * METRES_PER_DEGREE * np.cos(np.radians(latitude)), down * METRES_PER_DEGREE
    factor = source.crs.linear_units_factor[1]
    return along * factor, down * factor


def grid_of(source: rasterio.DatasetReader, ground_distance: float | None = None) -> Grid:
    """The grid of an open raster, or one over the same ground with pixels of ``ground_distance`` metres, up to rounding."""
    crs = source.crs.to_wkt() if source.crs else ""
    own = Grid(source.width, source.height, crs, source.transform if crs else Affine.identity())
    if ground_distance is None:
        return own
    along, down = metres_per_pixel(source)
    width, height = max(1, round(own.width * along / ground_distance)), max(1, round(own.height * down / ground_distance))
    return Grid(width, height, crs, own.transform @ Affine.scale(own.width / width, own.height / height))


def require_same_size(image: rasterio.DatasetReader, label: rasterio.DatasetReader, remedy: str) -> None:
    """Raise DataError with ``remedy`` unless an image and its label have as many rows and columns."""
    if image.shape != label.shape:
        raise DataError(
            f"{label.name}: {label.width}x{label.height} pixels, but its image {image.name} has {image.width}x{image.height}; {remedy}"
        )


@contextlib.contextmanager
def open_scene(
    image: Path | str, label: Path | str, ground_distance: float | None = None
) -> Iterator[tuple[rasterio.DatasetReader, rasterio.DatasetReader]]:
    """A scene's image and label, open on the grid that its tiles are cut on, to be read by window.

    With ``ground_distance`` images are averaged when they shrink, from overviews where the file has them, and interpolated when they
    grow; of a label's ids, or indices into its palette, the most frequent is taken, of its colours the nearest. Raises DataError when
    the two differ in size.
    """
    with open_raster(image) as picture, open_raster(label) as ids:
        require_same_size(picture, ids, "resample the label to the grid of the image")
        if ground_distance is None:
            yield picture, ids
            return
        grid = grid_of(picture, ground_distance)
        shrinks = grid.width < picture.width
        labels = Resampling.mode if shrinks and ids.count == 1 else Resampling.nearest
        overview = _overview_level(picture, grid)
        masked = any(MaskFlags.per_dataset in flags for flags in picture.mask_flag_enums) and alpha_band(picture) is None
        colours = Resampling.average if shrinks else Resampling.bilinear
        # A label's nodata is one value among others here: it may be a class, which the label map knows.
        plain = {"nodata": None, "src_nodata": None}
        with (
            contextlib.nullcontext(picture) if overview is None else open_raster(image, overview_level=overview) as reduced,
            _resampled(reduced, grid, colours, reduced, add_alpha=masked) as near,
            _resampled(ids, grid, labels, picture, **plain) as flat,
        ):
            yield near, flat


def _overview_level(picture: rasterio.DatasetReader, grid: Grid) -> int | None:
    """The coarsest overview of the image that is not coarser than ``grid``; None without one."""
    shrink = min(picture.width / grid.width, picture.height / grid.height)
    common = set.intersection(*(set(picture.overviews(band)) for band in picture.indexes))
    levels = [level for level, factor in enumerate(picture.overviews(1)) if factor in common and factor <= shrink * 1.001]
    return levels[-1] if levels else None


def _resampled(source: rasterio.DatasetReader, grid: Grid, how: Resampling, placed: rasterio.DatasetReader, **options: Any) -> WarpedVRT:
    """``source`` resampled to ``grid``; it lies where ``placed`` does, as a label without a georeference lies under its image."""
    if source.nodata is None and source.dtypes[0].startswith("float"):
        options = {"nodata": np.nan, "src_nodata": np.nan} | options
    grids = {"src_crs": placed.crs, "src_transform": placed.transform, "crs": placed.crs, "transform": grid.transform}
    return WarpedVRT(source, width=grid.width, height=grid.height, resampling=how, **grids, **options)
