"""From the ids or colours of label rasters to training ids 0...K-1 and 255; labels are remapped only here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import rasterio
from rasterio.enums import MaskFlags
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from crfm_core import ConfigError, DataError
from crfm_core.data.rasters import IGNORE, alpha_band, is_palette, name_of, palette_of, read_bands, strips_of

UNKNOWN = -1


class LabelMap:
    """From the values of a label raster to training ids.

    Args:
        label_map: raw ids 0...65535, or colours "#RRGGBB", to ids 0...K-1 or 255 (ignore); None: raw ids are training ids.
        num_classes: K; None: any id below 255.

    A raw 255, and the nodata value of a raster of ids, is ignored unless ``label_map`` names it; masked and transparent pixels and NaN
    are ignored. ConfigError for a key or an id out of range.
    """

    def __init__(self, label_map: Mapping[int | str, int] | None, num_classes: int | None = None) -> None:
        keys = {i: i for i in range(num_classes or IGNORE)} if label_map is None else dict(label_map)
        self.by_colour = any(isinstance(key, str) for key in keys)
        self._named = set(label_map or ())
        self._lookup = np.full(1 << 24 if self.by_colour else 1 << 16, UNKNOWN, np.int16)
        if not self.by_colour:
            self._lookup[IGNORE] = IGNORE
        top = (num_classes or IGNORE) - 1
        for raw, new in keys.items():
            place = int(raw[1:], 16) if isinstance(raw, str) else raw
            if not 0 <= place < len(self._lookup) or (new != IGNORE and not 0 <= new <= top):
                raise ConfigError(f"label_map: {raw} -> {new}; raw ids are 0...65535, classes 0...{top} or 255 (ignore)")
            self._lookup[place] = new
        colours = ", ".join(str(key) for key in sorted(keys)[:12]) + (", ..." if len(keys) > 12 else "")
        self._allowed = f"0...{top} and 255" if label_map is None else f"those of label_map ({colours})" + " and 255" * (not self.by_colour)

    def ids_of(self, source: rasterio.DatasetReader, window: Window | None = None) -> np.ndarray:
        """Training ids of an open label raster, or a window of it, as uint8 [H,W].

        Raises DataError for a raster of another kind than the map's, and for values that the map does not have: with each value, its
        number of pixels in the raster and the first of them.
        """
        return self._known(self._read(source, window)[1], source)

    def ids_of_values(self, values: np.ndarray, source: rasterio.DatasetReader) -> np.ndarray:
        """Training ids of raw ids from ``source``, as uint8 of the same shape; errors as of :meth:`ids_of`."""
        return self._known(self._lookup.take(_whole(values, source)), source)

    def _known(self, ids: np.ndarray, source: rasterio.DatasetReader) -> np.ndarray:
        if (ids < 0).any():
            raise DataError(self._unknown(source.src_dataset if isinstance(source, WarpedVRT) else source))
        return ids.astype(np.uint8)

    def _read(self, source: rasterio.DatasetReader, window: Window | None) -> tuple[np.ndarray, np.ndarray]:
        """Raw ids, or colours as 0xRRGGBB, and the training ids of them, :data:`UNKNOWN` where there is none; both [H,W]."""
        raw, ignored = (self._colours if self.by_colour else self._ids)(source, window)
        ids = self._lookup.take(raw)
        if ignored is not None:
            ids[ignored] = IGNORE
        return raw, ids

    def _ids(self, source: rasterio.DatasetReader, window: Window | None) -> tuple[np.ndarray, np.ndarray | None]:
        require_ids(source)
        ids = read_bands(source, 1, window)
        ignored = self.without_label(ids, source)
        if MaskFlags.per_dataset in source.mask_flag_enums[0]:
            masked = source.read_masks(1, window=window) == 0
            ignored = masked if ignored is None else ignored | masked
        if ignored is not None:
            ids = np.where(ignored, np.zeros_like(ids), ids)
        return _whole(ids, source, window), ignored

    def without_label(self, ids: np.ndarray, source: rasterio.DatasetReader) -> np.ndarray | None:
        """Which raw ids from ``source`` mean no label: its nodata, unless the map names it, and NaN; None: none can."""
        nodata = (source.src_dataset if isinstance(source, WarpedVRT) else source).nodata
        missing = np.isnan(ids) if ids.dtype.kind == "f" else None
        if nodata is None or np.isnan(nodata) or nodata in self._named:
            return missing
        return ids == nodata if missing is None else missing | (ids == nodata)

    def _colours(self, source: rasterio.DatasetReader, window: Window | None) -> tuple[np.ndarray, np.ndarray | None]:
        if source.count < 3 and not is_palette(source):
            raise DataError(f"{name_of(source)}: {source.count} band without a palette, and label_map has colours; give it ids as keys")
        if any(dtype != "uint8" for dtype in source.dtypes):
            raise DataError(f"{name_of(source)}: colours of {source.dtypes[0]}, expected uint8; save it as an 8-bit picture")
        if is_palette(source):
            rgba = np.moveaxis(palette_of(source)[read_bands(source, 1, window)], -1, 0)
            rgb, transparent = rgba[:3].astype(np.int32), rgba[3] == 0
        else:
            rgb, transparent = read_bands(source, (1, 2, 3), window).astype(np.int32), None
        if (alpha := alpha_band(source)) is not None:
            transparent = read_bands(source, alpha, window) == 0
        return rgb[0] << 16 | rgb[1] << 8 | rgb[2], transparent

    def _unknown(self, source: rasterio.DatasetReader) -> str:
        """The message about values that the map does not have, counted over the whole raster, read in strips."""
        counts: dict[int, int] = {}
        first: dict[int, tuple[int, int]] = {}
        for window in strips_of(source):
            raw, ids = self._read(source, window)
            unknown = ids == UNKNOWN
            places = np.argwhere(unknown)
            values, starts, numbers = np.unique(raw[unknown], return_index=True, return_counts=True)
            for value, start, number in zip(values.tolist(), starts, numbers.tolist(), strict=True):
                counts[value] = counts.get(value, 0) + number
                first.setdefault(value, (int(places[start][0]) + window.row_off, int(places[start][1])))
        most = sorted(counts, key=lambda value: (-counts[value], value))
        name = (lambda value: f"colour #{value:06X}") if self.by_colour else (lambda value: f"id {value}")
        found = "; ".join(f"{name(v)} in {counts[v]} pixels, first at row {first[v][0]}, column {first[v][1]}" for v in most[:5])
        more = f"; and {len(most) - 5} more" if len(most) > 5 else ""
        return (
            f"{name_of(source)}: unknown label {found}{more}; allowed are {self._allowed}. "
            "Add it to label_map (255 = ignore) or correct the label"
        )


def require_ids(source: rasterio.DatasetReader) -> None:
    """Raise DataError unless a label raster has one band."""
    if source.count != 1:
        raise DataError(
            f"{name_of(source)}: {source.count} bands, expected one band of class ids; "
            "if these are colours, give label_map keys like '#RRGGBB'"
        )


def _whole(ids: np.ndarray, source: rasterio.DatasetReader, window: Window | None = None) -> np.ndarray:
    """Ids as indices of a table; DataError, with the place of the first, for anything but whole numbers 0...65535."""
    if ids.dtype in (np.uint8, np.uint16):
        return ids
    if (wrong := ~((ids >= 0) & (ids <= 65535) & (ids == np.round(ids)))).any():
        first, where = np.argwhere(wrong)[0], ""
        if len(first) == 2:
            row, column = first + ((window.row_off, window.col_off) if window else (0, 0))
            where = f", first at row {row:.0f}, column {column:.0f}"
        raise DataError(
            f"{name_of(source)}: {ids[wrong][0]} is no class id{where}; expected whole numbers 0...65535. Declare it as nodata "
            "(gdal_edit.py -a_nodata) if it means no label, or write the labels again"
        )
    return ids.astype(np.uint16)
