"""A contact sheet: tiles of a split as image, mask and overlay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from PIL import Image

from crfm_core.data.rasters import IGNORE, IGNORED, paint
from crfm_core.reporting.figures import FAINT, FIGURE_WIDTH, STYLE


def overlay(image: np.ndarray, label: np.ndarray, palette: Sequence[tuple[int, int, int]], cover: float = 0.45) -> np.ndarray:
    """The mask laid over its image, uint8 [H,W,3]: a class covers the share ``cover``, its rim is its full colour, and ignored
    pixels are dark and hatched."""
    colours, image = paint(label, palette).astype(float), image.astype(float)
    mixed = (1 - cover) * image + cover * colours
    height, width = label.shape
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // 4) % 3 == 0
    ignored = label == IGNORE
    mixed[ignored] = 0.35 * image[ignored] + 0.4 * np.array(IGNORED)
    mixed[ignored & stripes] = 0.3 * image[ignored & stripes] + 110
    rim = _rim(label) & ~ignored
    mixed[rim] = colours[rim]
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)


def _rim(label: np.ndarray) -> np.ndarray:
    """Pixels with another class to the left, right, above or below."""
    rim = np.zeros(label.shape, bool)
    down, across = label[1:] != label[:-1], label[:, 1:] != label[:, :-1]
    rim[1:] |= down
    rim[:-1] |= down
    rim[:, 1:] |= across
    rim[:, :-1] |= across
    return rim


@dataclass(frozen=True)
class ContactTile:
    """A tile with its mask: uint8 [H,W,3] and class ids uint8 [H,W]."""

    name: str
    image: np.ndarray
    label: np.ndarray


def contact_sheet(tiles: Sequence[ContactTile], classes: Sequence[str], palette: Sequence[tuple], folder: Path, name: str) -> str:
    """Tiles as image, mask and overlay, two beside each other, each with its name and what covers it, the legend below; PNG only.

    Small tiles are enlarged by whole factors, so their pixels stay squares; large ones are averaged down. The pictures are put in
    place pixel by pixel, at :func:`contact_places`.
    """
    cell, width, height = _contact_size(tiles)
    dpi, across = width / FIGURE_WIDTH, min(2, len(tiles))
    swatch, legend = _legend_rows([*zip(classes, palette, strict=True), ("ignored", IGNORED)], dpi)
    legend_height = round(len(legend) * 1.7 * swatch)
    canvas = np.full((height + legend_height, width, 3), 255, np.uint8)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width / dpi, len(canvas) / dpi), dpi=dpi)

        def write(x: float, y: float, text: str, size: float, **more: object) -> None:
            figure.text(x / width, 1 - y / len(canvas), text, fontsize=size, va="top", **more)

        for tile, (top, left) in zip(tiles, contact_places(tiles), strict=True):
            label, image = _fitted(tile.label, cell), _fitted(tile.image, cell)
            step = cell + _gap(cell)
            for column, picture in enumerate((image, paint(label, palette), overlay(image, label, palette))):
                place = slice(top, top + len(picture)), slice(left + column * step, left + column * step + picture.shape[1])
                canvas[place] = picture
            block, below = 3 * cell + 2 * _gap(cell), top + cell + _gap(cell)
            shares = np.bincount(tile.label.ravel(), minlength=256) / tile.label.size
            _share_bar(canvas[below : below + _gap(cell), left : left + block], shares, palette)
            below += round(1.6 * _gap(cell))
            write(left, below, shortened(tile.name, block / dpi, 8, "bold"), 8, fontweight="bold")
            write(left, below + 0.145 * dpi, _cover(shares, classes, block / dpi, 7.5), 7.5, color=FAINT)
        for column in range(3 * across):
            left = contact_places(tiles)[column // 3][1] + column % 3 * (cell + _gap(cell))
            write(left, 0.02 * dpi, ("image", "mask", "overlay")[column % 3], 8)
        for line, entries in enumerate(legend):
            for left, entry, colour in entries:
                top = height + round(line * 1.7 * swatch)
                canvas[top : top + swatch, left : left + swatch] = _rgb(FAINT)
                canvas[top + 1 : top + swatch - 1, left + 1 : left + swatch - 1] = colour
                write(left + 1.5 * swatch, top - 0.02 * swatch, entry, 8)
        figure.figimage(canvas)
        figure.savefig(folder / f"{name}.png", dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return name


def contact_places(tiles: Sequence[ContactTile]) -> list[tuple[int, int]]:
    """Row and column of the first pixel of each tile's image in the sheet; mask and overlay follow a cell and a gap further right."""
    cell, width, _ = _contact_size(tiles)
    top, step = round(0.22 * width / FIGURE_WIDTH), cell + round(0.52 * width / FIGURE_WIDTH)
    return [(top + index // 2 * step, index % 2 * (3 * cell + 2 * _gap(cell) + _between(cell))) for index in range(len(tiles))]


def _contact_size(tiles: Sequence[ContactTile]) -> tuple[int, int, int]:
    """Pixels: side of a cell, width of the sheet, height without the legend."""
    side = max(max(tile.label.shape) for tile in tiles)
    cell = side * max(1, round(256 / side)) if side <= 340 else 256
    width = 6 * cell + 4 * _gap(cell) + _between(cell)
    dpi, rows = width / FIGURE_WIDTH, math.ceil(len(tiles) / 2)
    return cell, width, round(0.22 * dpi) + rows * (cell + round(0.52 * dpi))


def _gap(cell: int) -> int:
    return max(2, cell // 32)


def _between(cell: int) -> int:
    return cell // 6


def _fitted(picture: np.ndarray, cell: int) -> np.ndarray:
    """Class ids or an image at the size of a cell."""
    height, width = picture.shape[:2]
    if max(height, width) <= cell:
        factor = cell // max(height, width)
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    size = tuple(max(1, round(side * cell / max(height, width))) for side in (width, height))
    how = Image.Resampling.NEAREST if picture.ndim == 2 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize(size, how))


def _share_bar(place: np.ndarray, shares: np.ndarray, palette: Sequence[tuple]) -> None:
    """Paint the tile's composition into ``place``, one stretch per class in order of id, a thin frame around."""
    ids = [*range(len(palette)), IGNORE]
    edges = np.round(np.cumsum([0, *shares[ids]]) * place.shape[1]).astype(int)
    for value, begin, end in zip(ids, edges, edges[1:], strict=False):
        place[:, begin:end] = IGNORED if value == IGNORE else palette[value]
    place[[0, -1]] = place[:, [0, -1]] = _rgb("#b9c1c8")


def _cover(shares: np.ndarray, classes: Sequence[str], width: float, size: float) -> str:
    """What is ignored in a tile and its largest classes, as many as fit."""
    order = [value for value in np.argsort(-shares[: len(classes)], kind="stable") if shares[value] > 0]
    parts = [f"{classes[value]} {f'{100 * shares[value]:.0f}' if shares[value] >= 0.01 else '< 1'} %" for value in order]
    ignored = [f"ignored {100 * shares[IGNORE]:.0f} %"] if shares[IGNORE] >= 0.005 else []
    for most in range(len(parts), 0, -1):
        text = ", ".join([*parts[:most], *([f"{len(parts) - most} more"] if most < len(parts) else []), *ignored])
        if _text_width(text, size) <= width:
            return text
    return shortened(", ".join([*parts, *ignored]), width, size)


def _legend_rows(entries: Sequence[tuple[str, tuple]], dpi: float) -> tuple[int, list[list[tuple[int, str, tuple]]]]:
    """Side of a swatch in pixels, and the entries (name, colour) in lines with their left edges before them."""
    swatch, lines, left = round(0.12 * dpi), [[]], 0.0
    for entry, colour in entries:
        needed = 1.5 * swatch + _text_width(entry, 8) * dpi
        if lines[-1] and left + needed > FIGURE_WIDTH * dpi:
            lines.append([])
            left = 0.0
        lines[-1].append((round(left), entry, colour))
        left += needed + 1.6 * swatch
    return swatch, lines


def _text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches."""
    return TextToPath().get_text_width_height_descent(text, FontProperties(family="sans-serif", size=size, weight=weight), False)[0] / 72


def shortened(text: str, width: float, size: float, weight: str = "normal") -> str:
    """A text with its middle left out where it is wider than ``width`` inches."""
    keep = len(text)
    short = text
    while keep > 2 and _text_width(short, size, weight) > width:
        keep -= 1
        short = f"{text[: math.ceil(keep / 2)]}…{text[len(text) - keep // 2 :]}"
    return short


def _rgb(colour: str) -> np.ndarray:
    return np.round(np.array(mpl.colors.to_rgb(colour)) * 255).astype(np.uint8)
