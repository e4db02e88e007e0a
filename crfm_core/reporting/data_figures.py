"""Figures that show a dataset: its tiles, the shares of its classes, where its tiles lie in scenes and on the ground."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageOps
from scipy import ndimage

from crfm_core.data.rasters import IGNORE, paint
from crfm_core.reporting.composition import SplitNumbers
from crfm_core.reporting.figures import FIGURE_WIDTH, INK, STYLE, legend_above, repeated, sample_sheet, save, shortened
from crfm_core.reporting.rendering import percent

SPLIT_COLOURS = ("#2878b8", "#e07b16", "#2f9e6a", "#a04fb8", "#c94a4a", "#8a8b3a", "#17a2b8", "#a0622d")
OUTSIDE = "#dfe2e5"  #: colour of scenes outside all tiles, in the legend
SHARP = 160  #: dots per inch of figures with photographs
VIEW = 256  #: longer side of a picture of a tile in pixels
LETTERS = 72  #: of a line below the three pictures of a tile


def split_colours(splits: Sequence[str]) -> dict[str, str]:
    """One colour per split, the same in all figures of a dataset."""
    return dict(zip(splits, repeated(SPLIT_COLOURS, len(splits)), strict=True))


def _split_patches(splits: Sequence[str]) -> list[Patch]:
    colours = split_colours(splits).items()
    return [Patch(facecolor=mpl.colors.to_rgba(colour, 0.3), edgecolor=colour, label=split) for split, colour in colours]


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


@mpl.rc_context(STYLE)
def share_bars(splits: dict[str, SplitNumbers], classes: Sequence[str], folder: Path, name: str) -> str:
    """Share of each class in the labelled pixels of each split, and what is ignored of all pixels.

    The axis is that of square roots: it has a zero, so a missing class has no bar, and a class of a thousandth can still be seen.
    """
    entries, colours, thick = [*classes, "ignored (of all pixels)"], split_colours(list(splits)), 0.8 / len(splits)
    figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + (0.16 * len(splits) + 0.08) * len(entries)), layout="constrained")
    axes = figure.add_subplot()
    for index, (split, numbers) in enumerate(splits.items()):
        values = np.array([*numbers.shares, 1 - numbers.labelled])
        places = np.arange(len(entries)) + (index - (len(splits) - 1) / 2) * thick
        bars = axes.barh(places, 100 * values, 0.9 * thick, color=colours[split])
        axes.bar_label(bars, [percent(value) if value else "none" for value in values], padding=4, fontsize=7.5)
    axes.set_xscale("function", functions=(lambda value: np.sqrt(np.maximum(value, 0)), np.square))
    axes.set_xlim(0, min(100.0, 1.1 * axes.dataLim.xmax))
    ticks = [tick for tick in (0, 0.1, 1, 5, 10, 20, 30, 50, 75, 100) if tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("percent of the labelled pixels; square-root axis")
    axes.set_yticks(range(len(entries)), entries)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    legend_above(figure, [Patch(color=colour, label=split) for split, colour in colours.items()])
    return save(figure, folder, name)


@dataclass(frozen=True)
class SceneView:
    """A scene as a small picture uint8 [h,w,3], its size in pixels of the tiles, and per split the tiles [n,4]: row, col, height, width."""

    name: str
    picture: np.ndarray
    width: int
    height: int
    tiles: dict[str, np.ndarray]


@mpl.rc_context(STYLE)
def scene_map(scenes: Sequence[SceneView], splits: Sequence[str], folder: Path, name: str) -> str:
    """Scenes with the outlines of their tiles in the colours of the splits; ground in no tile is faded and grey."""
    across = min(4, len(scenes))
    lines = [scenes[begin : begin + across] for begin in range(0, len(scenes), across)]
    column, letters = FIGURE_WIDTH / across, 128 // across
    # As high as its highest scene, within reason: a strip of ground is then narrower than its column.
    heights = [min(column * max(scene.height / scene.width for scene in line), 1.3 * column, 7.0) for line in lines]
    figure = Figure(figsize=(FIGURE_WIDTH, 0.4 + sum(heights) + 0.4 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), across, squeeze=False, height_ratios=heights)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, scene in zip(panels.flat, scenes, strict=False):
        counts = ", ".join(f"{len(scene.tiles[split])} {split}" for split in splits if split in scene.tiles)
        below = shortened(f"{scene.width} × {scene.height} px: {counts or 'no tile'}", letters)
        axes.set_title(f"{shortened(scene.name, letters)}\n{below}", fontsize=8, fontweight="normal", pad=3)
        _draw_scene(axes, scene, split_colours(splits))
    legend_above(figure, [*_split_patches(splits), Patch(facecolor=OUTSIDE, label="in no tile")])
    return save(figure, folder, name, SHARP)


def _draw_scene(axes: Axes, scene: SceneView, colours: dict[str, str]) -> None:
    faded = 0.22 * scene.picture.mean(axis=2, keepdims=True) + 0.78 * 235
    shown = np.where(_within(scene)[..., None], scene.picture, np.round(faded)).astype(np.uint8)
    axes.imshow(shown, extent=(0, scene.width, scene.height, 0))
    for split, tiles in scene.tiles.items():
        row, col, high, wide = tiles.T[..., None]
        corners = np.stack([col + wide * np.array([0, 1, 1, 0]), row + high * np.array([0, 0, 1, 1])], -1)
        thick = float(np.clip(10 * np.median(wide) / scene.width, 0.2, 1))  # many small tiles leave the picture to be seen
        axes.add_collection(_outlines(corners, colours[split], 0.12, thick))
    axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))


def _outlines(corners: np.ndarray, colour: str, opacity: float, thick: float) -> PolyCollection:
    """Quadrangles [n,4,2], which an SVG holds as a picture: there may be very many."""
    return PolyCollection(
        list(corners), facecolors=mpl.colors.to_rgba(colour, opacity), edgecolors=colour, linewidths=thick, rasterized=True
    )


def _within(scene: SceneView) -> np.ndarray:
    """Which pixels of the small picture lie in a tile."""
    height, width = scene.picture.shape[:2]
    within = np.zeros((height, width), bool)
    for tiles in scene.tiles.values():
        edges = np.stack([tiles[:, :2], tiles[:, :2] + tiles[:, 2:]], 1) * [height / scene.height, width / scene.width]
        for (top, left), (bottom, right) in edges.round().astype(int):
            within[top:bottom, left:right] = True
    return within


@dataclass(frozen=True)
class Ground:
    """Footprints of one coordinate system: per split the corners [n,4,2] in its units, of which one is ``metres`` across and up."""

    name: str
    axes: tuple[str, str]
    metres: tuple[float, float] | None
    quads: dict[str, np.ndarray]


@mpl.rc_context(STYLE)
def ground_map(grounds: Sequence[Ground], splits: Sequence[str], folder: Path, name: str) -> str:
    """All footprints in ground coordinates, one map per coordinate system, with a scale bar where the length of its units is known."""
    figure = Figure(figsize=(FIGURE_WIDTH, 0.4 + 3.6 * len(grounds)), layout="constrained")
    panels = figure.subplots(len(grounds), 1, squeeze=False)[:, 0]
    for axes, ground in zip(panels, grounds, strict=True):
        for split, quads in ground.quads.items():
            axes.add_collection(_outlines(quads, split_colours(splits)[split], 0.3, 1.5))  # a small tile is a dot as large as its outline
        across, up = ground.metres or (1.0, 1.0)
        axes.autoscale_view()
        axes.set_aspect(up / across, adjustable="datalim")
        axes.set_title(shortened(ground.name, 60))
        axes.set_xlabel(ground.axes[0])
        axes.set_ylabel(ground.axes[1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.spines[:].set_visible(True)
    legend_above(figure, _split_patches(splits))
    figure.draw_without_rendering()  # now the limits are those of equal scales
    for axes, ground in zip(panels, grounds, strict=True):
        if ground.metres:
            _add_scale_bar(axes, ground.metres[0])
    return save(figure, folder, name, SHARP)


def _add_scale_bar(axes: Axes, metres: float) -> None:
    """A bar of a round length above the map at its right end, where it hides nothing; ``metres`` is the length of a unit across."""
    low, high = axes.get_xlim()
    most = (high - low) * metres / 5
    power = 10 ** math.floor(math.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    wide, place = length / metres, axes.get_xaxis_transform()
    axes.add_artist(Rectangle((high - wide, 1.03), wide, 0.015, transform=place, facecolor=INK, clip_on=False))
    axes.text(high - 1.05 * wide, 1.04, text, transform=place, ha="right", va="center", fontsize=9)
