"""Figures of the report: each is drawn once and saved as PNG and SVG under one name."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from matplotlib.typing import RcKeyType

from crfm_core.data.rasters import IGNORED
from crfm_core.reporting.tables import mean_sd

INK, FAINT, GRID = "#26313b", "#6b7783", "#dde2e7"
GREYS = ("#aab4bd", "#66727e", "#878f97")  #: recipes of real tiles only
FIGURE_WIDTH = 8.6  #: of a figure in inches: a page shows it at about the size its letters are meant for
COLOURS = ("#4a86b5", "#d98c3f", "#4f9a7b", "#9a6fb0", "#bf5b5b", "#8a8b3a", "#5fb0c4", "#b07a5a")  #: recipes with synthetic tiles
MARKERS = "osD^vP"  #: beside the colours, for those who see colours alike
JUDGED_BY = {"judge": "independent judge: evidence", "critic": "guiding critic: optimised against"}
BARS_PER_LINE, CLASSES_PER_LINE = 48, 9

STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,  # names come from the configuration; a $ in one is a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "crfm",  # the same figure gives the same file
}


def save(figure: Figure, folder: Path, name: str, dpi: int = 130) -> str:
    """Write the figure as PNG and SVG of one name; ``dpi`` is also that of pictures within the SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", dpi=dpi, bbox_inches="tight", metadata={"Date": None})
    return name


def legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend over the figure, in as many columns as its width holds."""
    columns = _legend_columns([str(handle.get_label()) for handle in handles])
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.6)


def _legend_columns(labels: Sequence[str]) -> int:
    return max(1, int(FIGURE_WIDTH / (0.6 + 0.085 * max(map(len, labels)))))


def repeated(things: Sequence[str], count: int) -> list[str]:
    """The first ``count`` of ``things``, from the start again when they run out."""
    return list(islice(cycle(things), count))


def shortened(text: str, most: int) -> str:
    """A text with its middle left out where it has more than ``most`` letters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


@mpl.rc_context(STYLE)
def difference_plot(rows: pd.DataFrame, baseline: str, colours: dict[str, str], folder: Path, name: str) -> str:
    """Difference in mIoU of every recipe to the baseline of its dataset and segmentor: each seed a tick, the mean a dot, its 95 % interval
    a band."""
    groups = {key: group for key, group in rows.groupby(["dataset", "segmentor"], sort=False) if (group.recipe == baseline).any()}
    labels: list[str] = []
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=1.2)
    for (dataset, segmentor), group in groups.items():
        base = group[group.recipe == baseline].iloc[0]
        for _, row in group[group.recipe != baseline].iterrows():
            _draw_difference(axes, len(labels), row, base, colours[row.recipe])
            labels.append(row.recipe if len(groups) == 1 else f"{row.recipe}, {dataset}, {segmentor}")
    figure.set_size_inches(FIGURE_WIDTH, 0.9 + 0.45 * len(labels))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"mIoU minus that of {baseline}, in points")
    axes.spines["left"].set_visible(False)
    reach = 1.1 * max(*np.abs(axes.get_xlim()), 0.5)
    axes.set_xlim(-reach, reach)
    return save(figure, folder, name)


def _draw_difference(axes: Axes, place: int, row: pd.Series, base: pd.Series, colour: str) -> None:
    if math.isnan(row.mIoU_difference):
        axes.text(0, place, " undefined", va="center", color=FAINT, fontsize=9)
        return
    axes.plot([row.mIoU_low, row.mIoU_high], [place, place], color=colour, linewidth=7, alpha=0.35, solid_capstyle="round")
    axes.plot(row.mIoU_difference, place, "o", color=colour, markersize=10)
    seeds = [f"mIoU_seed{seed}" for seed in row.seeds.split()]
    axes.plot([row[s] - base[s] for s in seeds], [place] * len(seeds), "|", color=INK, markersize=13, markeredgewidth=1.4)


@mpl.rc_context(STYLE)
def class_bars(
    bars: Mapping[str, tuple[Sequence[float], Sequence[float] | None]],
    classes: Sequence[str],
    colours: dict[str, str],
    label: str,
    folder: Path,
    name: str,
) -> str:
    """Percentages per class, one bar per series beside each other, classes in as many lines as legible bars need.

    ``bars`` maps a series to its heights and, or None, the whiskers' half lengths; NaN is shown as a dash.
    """
    lines = math.ceil(len(classes) / max(2, min(CLASSES_PER_LINE, BARS_PER_LINE // len(bars))))
    across, width = math.ceil(len(classes) / lines), 0.82 / len(bars)
    figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + 2.4 * lines), layout="constrained")
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        shown = slice(line * across, (line + 1) * across)
        names = ["\n".join(textwrap.wrap(one, max(8, 100 // across))) for one in classes[shown]]
        for index, (series, (heights, errors)) in enumerate(bars.items()):
            tall = np.array(heights[shown], float)
            places = np.arange(len(tall)) + (index - (len(bars) - 1) / 2) * width
            axes.bar(places, tall, 0.9 * width, color=colours[series])
            if errors is not None:
                axes.errorbar(places, tall, np.array(errors[shown], float), fmt="none", ecolor=INK, elinewidth=0.9)
            for place in places[np.isnan(tall)]:
                axes.text(place, 1, "–", ha="center", fontsize=8, color=FAINT)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.55, across - 0.45)
        axes.set_ylabel(label)
        axes.set_ylim(0, 100)
        axes.grid(axis="x", visible=False)
    legend_above(figure, [Patch(color=colours[series], label=series) for series in bars])
    return save(figure, folder, name)


@mpl.rc_context(STYLE)
def agreement_bars(bars: list[dict], score: str, folder: Path, name: str) -> str:
    """Agreement of images with their masks, judge beside critic.

    ``bars`` lists {label, colour, judge: [values], critic: [values]}, percent; several values are copies, whose sd is a whisker.
    """
    figure = Figure(figsize=(FIGURE_WIDTH, 1.1 + 0.42 * len(bars)), layout="constrained")
    for axes, (who, title) in zip(figure.subplots(1, 2, sharex=True, sharey=True), JUDGED_BY.items(), strict=True):
        means, sds = np.transpose([mean_sd(bar[who]) for bar in bars])
        drawn = axes.barh(
            range(len(bars)), means, 0.62, color=[bar["colour"] for bar in bars], alpha=1.0 if who == "judge" else 0.45,
            xerr=np.nan_to_num(sds), ecolor=INK,
        )  # fmt: skip
        axes.bar_label(drawn, fmt="%.1f", padding=4, fontsize=9)
        axes.set_title(title)
        axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 105)
        axes.set_xlabel(f"{score} in percent")
        axes.grid(axis="y", visible=False)
    return save(figure, folder, name)


@mpl.rc_context(STYLE)
def sample_sheet(
    titles: Sequence[str],
    rows: Sequence[Sequence[np.ndarray | None]],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    folder: Path,
    name: str,
    captions: Mapping[tuple[int, int], str] | None = None,
    dpi: int = 130,
) -> str:
    """A grid of pictures uint8 [H,W,3] (None: left out) below the titles of its columns, the legend of the classes below.

    ``captions`` are texts below the pictures at (row, column). Pixels are shown as they are, not smoothed.
    """
    cell, pitch = 0.95, 1.26 if captions else 1.0  # a picture's side and the distance of rows, of the distance of columns
    across, side = len(titles), FIGURE_WIDTH / 6  # inches
    figure = Figure(figsize=(side * across, side * pitch * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: an axes for each picture takes far longer
    axes.set_axis_off()
    for column, title in enumerate(titles):
        wrapped = title.replace(", ", ",\n")
        axes.annotate(wrapped, (column + cell / 2, 0), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=9)
    for line, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            if picture is not None:
                height, width = (cell * length / max(picture.shape[:2]) for length in picture.shape[:2])
                left, top = column + (cell - width) / 2, pitch * line + (cell - height) / 2
                axes.imshow(picture, interpolation="nearest", extent=(left, left + width, top + height, top))
    for (line, column), text in (captions or {}).items():
        axes.annotate(text, (column, pitch * line + cell), (0, -3), textcoords="offset points", va="top", fontsize=7.5)
    axes.set_xlim(0, across - 1 + cell)
    axes.set_ylim(pitch * len(rows) - 1 + cell, 0)
    handles = [
        Patch(facecolor=np.divide(rgb, 255).tolist(), edgecolor=FAINT, linewidth=0.5, label=label)
        for label, rgb in [*zip(classes, palette, strict=True), ("ignored", IGNORED)]
    ]
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=_legend_columns([*classes, "ignored"]), fontsize=9
    )
    return save(figure, folder, name, dpi)


def choose_tiles(table: pd.DataFrame, count: int, least: float = 0.03) -> list[int]:
    """Rows of a tile manifest that show many classes: each next tile adds most classes not shown yet (a class counts from a share
    ``least`` of the pixels), then is of a scene shown least, then is the most mixed one, then comes first by name. A tile that overlaps
    a chosen one comes only when no other is left. Nothing is drawn at random or by quality."""
    pixels = np.stack([np.asarray(counts, float) for counts in table.pixels])
    shares = pixels / np.maximum(1, pixels.sum(axis=1, keepdims=True))
    mixed = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1)
    scenes, corners = pd.factorize(table.scene)[0], table[["row", "col"]].to_numpy()
    sides, names = table[["height", "width"]].to_numpy(), table.tile_id.to_numpy()
    shown, seen = np.zeros(shares.shape[1], int), np.zeros(scenes.max() + 1, int)
    free, apart = np.ones(len(table), bool), np.ones(len(table), bool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(table)):
        among = np.flatnonzero(free & apart if (free & apart).any() else free)
        for merit in (((shares >= least) & (shown == shown.min())).sum(axis=1), -seen[scenes], mixed):
            among = among[merit[among] == merit[among].max()]
        best = int(min(among, key=lambda row: names[row]))
        chosen.append(best)
        shown += shares[best] >= least
        seen[scenes[best]] += 1
        free[best] = False
        apart &= ~((scenes == scenes[best]) & (np.abs(corners - corners[best]) < np.minimum(sides, sides[best])).all(axis=1))
    return chosen


@mpl.rc_context(STYLE)
def levels_by_steps(levels: dict[str, pd.DataFrame], score: str, folder: Path, name: str) -> str:
    """A score over the number of corrected steps for each form of the correction, judge beside critic.

    ``levels`` maps a form to columns steps, judge, judge_sd, critic, critic_sd (percent, NaN for no sd); the row of 0 steps is plain
    sampling and the same for all.
    """
    counts = sorted({steps for frame in levels.values() for steps in frame.steps})
    colours, markers = repeated(COLOURS, len(levels)), repeated(MARKERS, len(levels))
    figure = Figure(figsize=(FIGURE_WIDTH, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (who, title) in zip(panels, JUDGED_BY.items(), strict=True):
        axes.axhline(next(iter(levels.values()))[who].iloc[0], color=FAINT, linewidth=1, linestyle="--")
        for index, (form, frame) in enumerate(levels.items()):
            aside = 0.09 * (index - (len(levels) - 1) / 2)  # whiskers beside each other
            axes.errorbar(
                [counts.index(steps) + (aside if steps else 0) for steps in frame.steps], frame[who], frame[f"{who}_sd"],
                color=colours[index], marker=markers[index], markersize=5.5, linewidth=1.8, elinewidth=1, label=form,
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xticks(range(len(counts)), [str(steps or "none") for steps in counts])
        axes.set_xlabel("corrected steps")
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel(f"{score} in percent")
    legend_above(figure, panels[0].get_legend_handles_labels()[0])
    return save(figure, folder, name)


@mpl.rc_context(STYLE)
def correction_curves(curves: dict[str, pd.DataFrame], colours: dict[str, str], folder: Path, name: str) -> str:
    """What the correction did, a column per sampler or form: above the critic's loss before and after each corrected step, below the
    length of the changes of the velocity.

    ``curves`` maps a sampler or form to columns step, loss_before, loss_after (NaN where it was not measured), gradient_ratio,
    clamp_ratio, means over the images that were corrected at that step.
    """
    across = min(4, len(curves))
    lines = math.ceil(len(curves) / across)
    figure = Figure(figsize=(FIGURE_WIDTH, 0.4 + 4.2 * lines), layout="constrained")
    panels = figure.subplots(2 * lines, across, sharex=True, sharey="row", squeeze=False)
    for index, (title, curve) in enumerate(curves.items()):
        losses, changes = panels[2 * (index // across) :, index % across][:2]
        steps, colour = curve.step + 1, colours[title]
        losses.plot(steps, curve.loss_after, linewidth=2, color=colour)
        losses.plot(steps, curve.loss_before, linewidth=1.2, linestyle="--", color=INK)  # on top: a correction without effect hides neither
        losses.set_title("\n".join(textwrap.wrap(title, 22)))
        losses.set_ylim(bottom=0)
        changes.plot(steps, 100 * curve.gradient_ratio.where(curve.gradient_ratio > 0), linewidth=2, color=colour)
        changes.plot(steps, 100 * curve.clamp_ratio.where(curve.clamp_ratio > 0), linewidth=2.2, linestyle=":", color=colour)
        changes.set_yscale("log")  # a change of none has no place on it
        changes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        changes.yaxis.set_minor_formatter(NullFormatter())
        changes.set_xlabel("corrected step")
        changes.tick_params(labelbottom=True)
        changes.xaxis.get_major_locator().set_params(integer=True)
    for above, below in zip(panels[::2, 0], panels[1::2, 0], strict=True):
        above.set_ylabel("critic's loss")
        below.set_ylabel("change in % of the velocity")
        low, high = np.log10(below.get_ylim())
        below.set_ylim(10.0 ** math.floor(low), 10.0 ** math.ceil(high))  # so that two numbers stand on the axis
    for axes in panels[2 * (lines - 1) :, len(curves) - (lines - 1) * across :].flat:
        axes.set_axis_off()
    before = Line2D([], [], color=INK, linewidth=1.2, linestyle="--", label="before")
    after = Line2D([], [], color=FAINT, linewidth=2, label="after; by gradient")
    clamp = Line2D([], [], color=FAINT, linewidth=2.2, linestyle=":", label="by clamp")
    legend_above(figure, [before, after, clamp])
    return save(figure, folder, name)
