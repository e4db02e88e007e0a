"""Figures that show a dataset: the shares of its classes, where its tiles lie in scenes and on the ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from scipy import ndimage

from crfm_core.data.rasters import IGNORED
from crfm_core.reporting.contact_sheet import shortened
from crfm_core.reporting.figures import FAINT, FIGURE_WIDTH, INK, STYLE, repeated, save
from crfm_core.reporting.rendering import percent

SPLIT_COLOURS = ("#2878b8", "#e07b16", "#2f9e6a", "#a04fb8", "#c94a4a", "#8a8b3a", "#17a2b8", "#a0622d")
SPECK = 2.0  #: points; tiles that would be smaller on a map are drawn so large
MANY = 5000  #: from so many outlines on an SVG holds them as a picture
SHARP = 160  #: dots per inch of figures with photographs


def split_colours(splits: Sequence[str]) -> dict[str, str]:
    """One colour per split, the same in all figures of a dataset."""
    return dict(zip(splits, repeated(SPLIT_COLOURS, len(splits)), strict=True))


# ------------------------------------------------------------------------------------------------------- contact sheet


# -------------------------------------------------------------------------------------------------------- class shares


def share_bars(
    shares: dict[str, list[float]], ignored: dict[str, float], classes: Sequence[str], palette: Sequence[tuple], folder: Path, name: str
) -> str:
    """Share of each class in the labelled pixels of each split, and what is ignored of all pixels.

    The axis is that of square roots: it has a zero, so a missing class has no bar, and a class of a thousandth can still be seen.
    """
    splits, entries = list(shares), [*classes, "ignored"]
    colours, thick = split_colours(splits), 0.78 / len(splits)
    centres = np.arange(len(entries)) + np.array([0.0] * len(classes) + [0.35])  # the last one is of another whole
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + (0.16 * len(splits) + 0.08) * (len(entries) + 0.35)), layout="constrained")
        axes = figure.add_subplot()
        for index, split in enumerate(splits):
            values = 100 * np.array([*shares[split], ignored[split]])
            places = centres + (index - (len(splits) - 1) / 2) * thick
            axes.barh(places, values, 0.9 * thick, color=colours[split], label=split)
            for place, value in zip(places, values, strict=True):
                axes.annotate(
                    percent(value / 100) if value else "none", (value, place), (4, 0), textcoords="offset points", va="center",
                    fontsize=7.5, color=INK if value else FAINT, style="normal" if value else "italic",
                )  # fmt: skip
        axes.set_xscale("function", functions=(lambda value: np.sqrt(np.maximum(value, 0)), np.square))
        top = 100 * max(*(value for one in shares.values() for value in one), *ignored.values())
        axes.set_xlim(0, min(100.0, 1.08 * top))
        axes.set_xticks([tick for tick in (0, 0.1, 1, 5, 10, 20, 30, 50, 75, 100) if tick <= axes.get_xlim()[1]])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_xlabel("percent of the labelled pixels (ignored: of all pixels); square-root axis")
        axes.set_yticks(centres, [*classes, "ignored"])
        axes.tick_params(axis="y", pad=17)
        axes.set_ylim(centres[-1] + 0.55, -0.55)
        axes.axhline(centres[-1] - 0.68, color=FAINT, linewidth=0.8)
        axes.scatter(
            np.full(len(entries), -0.013), centres, 58, marker="s", facecolors=np.array([*palette, IGNORED]) / 255, edgecolors=FAINT,
            linewidths=0.6, transform=axes.get_yaxis_transform(), clip_on=False, zorder=3,
        )  # fmt: skip
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=6, columnspacing=1.6, handlelength=1.1)
        return save(figure, folder, name)


# ----------------------------------------------------------------------------------------------------- tiles in scenes


@dataclass(frozen=True)
class SceneView:
    """A scene as a small picture uint8 [h,w,3], its size in pixels of the tiles, and per split the tiles [n,4]: row, col, height, width."""

    name: str
    picture: np.ndarray
    width: int
    height: int
    tiles: dict[str, np.ndarray]


def scene_map(scenes: Sequence[SceneView], splits: Sequence[str], title: str, folder: Path, name: str) -> str:
    """Scenes with the outlines of their tiles in the colours of the splits; ground in no tile is faded and grey."""
    colours, across = split_colours(splits), min(4, len(scenes))
    column = (FIGURE_WIDTH - 0.14 * (across - 1)) / across
    lines = [scenes[begin : begin + across] for begin in range(0, len(scenes), across)]
    # As high as its highest scene, within reason: a strip of ground is then narrower than its column.
    heights = [min(column * max(scene.height / scene.width for scene in line), 1.3 * column, 7.0) for line in lines]
    rasterise = sum(len(tiles) for scene in scenes for tiles in scene.tiles.values()) > MANY
    head, words, gap = 0.52, 0.31, 0.16
    height = head + sum(heights) + (words + gap) * len(lines)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, height))
        figure.text(0, 1, title, fontsize=11, fontweight="bold", va="top")
        handles = [Patch(facecolor=(*mpl.colors.to_rgb(colours[split]), 0.2), edgecolor=colours[split], label=split) for split in splits]
        handles.append(Patch(facecolor="#dfe2e5", edgecolor="none", label="in no tile"))
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - 0.2 / height), ncols=7, fontsize=9, borderpad=0, borderaxespad=0,
            handlelength=1.3, columnspacing=1.6,
        )  # fmt: skip
        top = height - head
        for line, deep in zip(lines, heights, strict=True):
            for index, scene in enumerate(line):
                left = index * (column + 0.14)
                axes = figure.add_axes(
                    (left / FIGURE_WIDTH, (top - words - deep) / height, column / FIGURE_WIDTH, deep / height), anchor="NW"
                )
                _draw_scene(axes, scene, colours, min(column / scene.width, deep / scene.height), rasterise)
                figure.text(
                    left / FIGURE_WIDTH, top / height, shortened(scene.name, column, 8, "bold"), fontsize=8, fontweight="bold", va="top"
                )
                counts = ", ".join(f"{len(scene.tiles[split])} {split}" for split in splits if len(scene.tiles.get(split, ())))
                line_below = shortened(f"{scene.width} × {scene.height} px: {counts or 'no tile'}", column, 7.5)
                figure.text(left / FIGURE_WIDTH, (top - 0.14) / height, line_below, fontsize=7.5, color=FAINT, va="top")
            top -= words + deep + gap
        return save(figure, folder, name, SHARP)


def _draw_scene(axes: Axes, scene: SceneView, colours: dict[str, str], inches_per_pixel: float, rasterise: bool) -> None:
    picture = scene.picture.astype(float)
    grey = picture.mean(axis=2, keepdims=True)
    within = _within(scene)[..., None]
    axes.imshow(
        np.round(np.where(within, picture, 0.22 * grey + 0.78 * 235)).astype(np.uint8), extent=(0, scene.width, scene.height, 0),
        interpolation="antialiased",
    )  # fmt: skip
    area = sum(float(tiles[:, 2:].prod(axis=1).sum()) for tiles in scene.tiles.values())
    often = max(1.0, area / max(1.0, within.mean() * scene.width * scene.height))  # the more tiles lie over each other, the paler each is
    for split, tiles in scene.tiles.items():
        if len(tiles) == 0:
            continue
        side = 72 * inches_per_pixel * float(np.median(tiles[:, 2:]))  # points
        inset = min(0.6 / (72 * inches_per_pixel), 0.06 * float(np.median(tiles[:, 2:])))  # neighbours stay two outlines, overlaps cross
        row, col, high, wide = tiles.T[..., None]
        x = col + inset + (wide - 2 * inset) * np.array([0, 1, 1, 0])
        y = row + inset + (high - 2 * inset) * np.array([0, 0, 1, 1])
        outlines = PolyCollection(
            np.stack([x, y], -1), facecolors=(*mpl.colors.to_rgb(colours[split]), 0.15 / often), edgecolors=colours[split],
            linewidths=float(np.clip(side / 30, 0.15, 0.9)), rasterized=rasterise,
        )  # fmt: skip
        axes.add_collection(outlines, autolim=False)
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.set_axis_off()


def _within(scene: SceneView) -> np.ndarray:
    """Which pixels of the small picture lie in a tile."""
    height, width = scene.picture.shape[:2]
    within = np.zeros((height, width), bool)
    for tiles in scene.tiles.values():
        for row, col, high, wide in tiles:
            top, bottom = (round(edge * height / scene.height) for edge in (row, row + high))
            left, right = (round(edge * width / scene.width) for edge in (col, col + wide))
            within[top:bottom, left:right] = True
    return within


# ------------------------------------------------------------------------------------------------- tiles on the ground


@dataclass(frozen=True)
class Ground:
    """Footprints of one coordinate system: per split the corners [n,4,2] in its units, of which one is ``metres`` across and up."""

    name: str
    axes: tuple[str, str]
    metres: tuple[float, float] | None
    quads: dict[str, np.ndarray]

    def metres_across(self, box: np.ndarray) -> np.ndarray:
        """Width and height of a box (left, bottom, right, top) in metres, or in the units of the system where their length is unknown."""
        return (box[2:] - box[:2]) * np.array(self.metres or (1.0, 1.0))

    @property
    def corners(self) -> np.ndarray:
        return np.concatenate(list(self.quads.values()))

    @property
    def tile(self) -> float:
        """Side of a tile, as in :meth:`metres_across`."""
        corners = self.corners
        return float(np.median((corners.max(1) - corners.min(1)) * np.array(self.metres or (1.0, 1.0))))


def ground_map(grounds: Sequence[Ground], splits: Sequence[str], folder: Path, name: str) -> str:
    """All footprints in ground coordinates, one map per coordinate system with its own scale bar.

    Where tiles lie in places so far from each other that they are specks on the map, up to four places are drawn larger below it.
    """
    colours = split_colours(splits)
    rasterise = sum(len(quads) for ground in grounds for quads in ground.quads.values()) > MANY
    inner = FIGURE_WIDTH - 0.95  # left of it stand the numbers of the axis
    layout, height = [], 0.3  # (ground, box, left, top, width, height in inches, letter)
    for ground in grounds:
        box = _box(ground.corners)
        across, up = np.maximum(ground.metres_across(box), 1e-9)
        scale = max(across / inner, up / 4.6)
        places = _places(ground) if 97 * ground.tile < 4 * scale else []  # less than four pixels of a page
        places = [place for place in places if max(ground.metres_across(place)) < inner * scale / 3]  # else larger is not larger
        deep = 1.9 if places else float(np.clip(inner * up / across, 1.2, 4.6))
        layout.append((ground, box, 0.95, height + 0.35, inner, deep, ""))
        height += 0.35 + deep + 0.55
        for line in _lines([ground.metres_across(place) for place in places], inner):
            for index, left, wide, high in line:
                layout.append((ground, places[index], 0.95 + left, height + 0.25, wide, high, "ABCD"[index]))
            height += 0.25 + max(high for *_, high in line) + 0.15
    with mpl.rc_context(STYLE | {"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 9}):
        figure = Figure(figsize=(FIGURE_WIDTH, height))
        handles = [Patch(facecolor=(*mpl.colors.to_rgb(colours[split]), 0.35), edgecolor=colours[split], label=split) for split in splits]
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=6, borderpad=0, borderaxespad=0, handlelength=1.3,
            columnspacing=1.6,
        )  # fmt: skip
        whole = None
        for ground, box, left, top, wide, high, letter in layout:
            axes = figure.add_axes((left / FIGURE_WIDTH, 1 - (top + high) / height, wide / FIGURE_WIDTH, high / height))
            scale = _draw_ground(axes, ground, box, colours, (wide, high), rasterise)
            if letter:
                axes.set_title(letter, fontsize=9, pad=3)
                axes.tick_params(labelbottom=False, labelleft=False)
                axes.grid(visible=False)
                whole.annotate(
                    letter, (box[2], (box[1] + box[3]) / 2), (4, 0), textcoords="offset points", va="center", fontsize=9, fontweight="bold"
                )
            else:
                whole = axes
                axes.set_title(shortened(ground.name, inner - 2.4, 11, "bold"))
                axes.set_xlabel(ground.axes[0])
                axes.set_ylabel(ground.axes[1])
            _scale_bar(axes, ground, scale, (wide, high))
        return save(figure, folder, name, SHARP)


def _draw_ground(axes: Axes, ground: Ground, box: np.ndarray, colours: dict[str, str], size: tuple[float, float], rasterise: bool) -> float:
    """Fill an axes of ``size`` inches with the ground around ``box`` at equal scales; return metres (or units) per inch."""
    units = np.array(ground.metres or (1.0, 1.0))
    scale = 1.08 * float(np.max(np.maximum(ground.metres_across(box), ground.tile) / size))
    middle, half = (box[:2] + box[2:]) / 2, scale * np.array(size) / units / 2
    low, high = middle - half, middle + half
    side = 72 * ground.tile / scale  # points
    for split, quads in ground.quads.items():
        near = ((quads.max(1) >= low) & (quads.min(1) <= high)).all(1)
        middles = quads.mean(1, keepdims=True)
        quads = middles + max(1.0, SPECK / side) * (quads - middles)
        outlines = PolyCollection(
            quads[near], facecolors=(*mpl.colors.to_rgb(colours[split]), 0.3), edgecolors=colours[split],
            linewidths=float(np.clip(side / 15, 0.15, 1.0)), rasterized=rasterise,
        )  # fmt: skip
        axes.add_collection(outlines, autolim=False)
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(max(2, int(size[0] / 1.3))))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(max(2, int(size[1] / 0.6))))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.spines[:].set_visible(True)
    return scale


def _scale_bar(axes: Axes, ground: Ground, scale: float, size: tuple[float, float]) -> None:
    """A bar of a round length above the map at its right end, where it hides nothing."""
    if ground.metres is None:
        return
    most = min(1.6, 0.35 * size[0]) * scale
    power = 10 ** math.floor(math.log10(most))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= most)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    wide, low, tall = length / scale / size[0], 1 + 0.07 / size[1], 0.045 / size[1]
    bar = Rectangle((1 - wide, low), wide, tall, transform=axes.transAxes, facecolor=INK, edgecolor="none", clip_on=False)
    axes.add_patch(bar)
    left = 1 - wide - 0.06 / size[0]
    axes.text(left, low + tall / 2, text, transform=axes.transAxes, ha="right", va="center_baseline", fontsize=8)


def _box(corners: np.ndarray) -> np.ndarray:
    """Left, bottom, right, top of corners [..., 2]."""
    flat = corners.reshape(-1, 2)
    return np.concatenate([flat.min(0), flat.max(0)])


def _places(ground: Ground, most: int = 4, cells: int = 300) -> list[np.ndarray]:
    """Boxes of the places with most tiles, in the order of reading; none where all tiles lie in one place.

    Tiles belong to one place when less than a fiftieth of the map lies between them.
    """
    corners = ground.corners
    low, high = corners.min((0, 1)), corners.max((0, 1))
    across = max(ground.metres_across(np.concatenate([low, high])))
    units = np.array(ground.metres or (1.0, 1.0))
    cell = np.floor((corners.mean(1) - low) * units / across * (cells - 1)).astype(int)
    taken = np.zeros((cells, cells), bool)
    taken[cell[:, 0], cell[:, 1]] = True
    near = ndimage.binary_dilation(taken, np.ones((3, 3), bool), iterations=cells // 100)
    regions, count = ndimage.label(near, np.ones((3, 3), int))
    if count < 2:
        return []
    region = regions[cell[:, 0], cell[:, 1]]
    largest = np.argsort(-np.bincount(region)[1:], kind="stable")[:most] + 1
    boxes = [_box(corners[region == value]) for value in largest]
    return sorted(boxes, key=lambda box: (-box[3], box[0]))


def _lines(extents: Sequence[np.ndarray], width: float, tall: float = 2.0) -> list[list[tuple[int, float, float, float]]]:
    """Panels in lines of at most ``width`` inches: index, left, width and height of each, as their extents on the ground ask for."""
    lines: list[list[tuple[int, float, float, float]]] = []
    for index, (across, up) in enumerate(np.maximum(extents, 1e-9)):
        wide = float(np.clip(tall * across / up, 1.6, width))
        high = float(np.clip(wide * up / across, 0.45, tall))
        left = lines[-1][-1][1] + lines[-1][-1][2] + 0.2 if lines else math.inf
        if left + wide > width:
            lines.append([])
            left = 0.0
        lines[-1].append((index, left, wide, high))
    return lines
