"""A contact sheet: tiles of a split as image, mask and overlay."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from crfm_core.data.rasters import IGNORE, paint
from crfm_core.reporting.figures import sample_sheet, shortened
from crfm_core.reporting.rendering import percent

VIEW = 256  #: longer side of a picture in pixels
LETTERS = 64  #: of a line below the three pictures of a tile


@dataclass(frozen=True)
class ContactTile:
    """A tile with its mask: uint8 [H,W,3] and class ids uint8 [H,W]."""

    name: str
    image: np.ndarray
    label: np.ndarray


def contact_sheet(
    tiles: Sequence[ContactTile], classes: Sequence[str], palette: Sequence[tuple[int, int, int]], folder: Path, name: str
) -> str:
    """Tiles as image, mask and overlay, two beside each other, each with its name and what covers it, the legend below."""
    rows: list[list[np.ndarray | None]] = []
    captions = {}
    for index, tile in enumerate(tiles):
        if index % 2 == 0:
            rows.append([])
        captions[index // 2, len(rows[-1])] = f"{shortened(tile.name, LETTERS)}\n{_coverage(tile.label, classes)}"
        rows[-1] += views_of(tile, palette)
    titles = ["image", "mask", "overlay"] * min(2, len(tiles))
    return sample_sheet(titles, rows, classes, palette, folder, name, captions, dpi=188)


def views_of(tile: ContactTile, palette: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
    """Image, mask and overlay of a tile, uint8 [h,w,3] with a longer side of VIEW: large images are averaged down, masks never."""
    smaller = max(tile.label.shape) > VIEW
    label = _resized(tile.label, Image.Resampling.NEAREST)
    image = _resized(tile.image, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
    return [image, paint(label, palette), overlay(image, label, palette)]


def _resized(picture: np.ndarray, how: Image.Resampling) -> np.ndarray:
    return np.asarray(ImageOps.contain(Image.fromarray(picture), (VIEW, VIEW), how))


def overlay(image: np.ndarray, label: np.ndarray, palette: Sequence[tuple[int, int, int]], cover: float = 0.45) -> np.ndarray:
    """The mask laid over its image, uint8 [H,W,3]: a class covers the share ``cover``, its rim has its full colour."""
    colours = paint(label, palette)
    cross = ndimage.generate_binary_structure(2, 1)
    rim = ndimage.maximum_filter(label, footprint=cross) != ndimage.minimum_filter(label, footprint=cross)
    mixed = np.round((1 - cover) * image + cover * colours).astype(np.uint8)
    return np.where(rim[..., None], colours, mixed)


def _coverage(label: np.ndarray, classes: Sequence[str]) -> str:
    """The largest classes of a tile, as many as fit a line, after what is ignored."""
    shares = np.bincount(label.ravel(), minlength=256) / label.size
    named = {value: name for value, name in [(IGNORE, "ignored"), *enumerate(classes)] if shares[value]}
    order = sorted(named, key=lambda value: (value != IGNORE, -shares[value]))
    parts = [f"{named[value]} {percent(shares[value])}".replace(" ", "\u00a0") for value in order]  # a line ends between classes
    return textwrap.wrap(", ".join(parts), LETTERS, max_lines=1, placeholder=" …")[0]
