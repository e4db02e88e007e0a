"""Figures of the report: each is drawn once and saved as PNG and SVG under one name."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from crfm_core.data.rasters import IGNORED
from crfm_core.reporting.tables import mean_sd

INK, FAINT, GRID = "#26313b", "#6b7783", "#dde2e7"
GREYS = ("#aab4bd", "#66727e", "#878f97")  #: recipes of real tiles only
FIGURE_WIDTH = 8.6  #: of a figure in inches: a page shows it at about the size its letters are meant for
BARS_PER_LINE, CLASSES_PER_LINE = 48, 9
COLOURS = ("#4a86b5", "#d98c3f", "#4f9a7b", "#9a6fb0", "#bf5b5b", "#8a8b3a", "#5fb0c4", "#b07a5a")  #: recipes with synthetic tiles

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names come from the configuration; a $ in one is a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "crfm",  # the same figure gives the same file
}


def save(figure: Figure, folder: Path, name: str, dpi: int = 130) -> str:
    """Write the figure as PNG and SVG of one name; ``dpi`` is also that of pictures within the SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", dpi=dpi, bbox_inches="tight", metadata={"Date": None})
    return name


def _whiskers(values: Sequence[float]) -> np.ndarray:
    return np.nan_to_num(np.asarray(values, float))


def difference_plot(rows: pd.DataFrame, baseline: str, colours: dict[str, str], folder: Path, name: str) -> str:
    """Difference in mIoU of every recipe to the baseline of its dataset and segmentor: each seed a tick, the mean a dot, its 95 % interval
    a band. Rows of several datasets or segmentors stand under the name of theirs."""
    groups = {key: group for key, group in rows.groupby(["dataset", "segmentor"], sort=False) if (group.recipe == baseline).any()}
    several = len(groups) > 1
    places = sum(len(group) - 1 + several for group in groups.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 0.9 + (0.36 if several else 0.5) * places), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1.2)
        labels: list[str] = []
        for key, group in groups.items():
            if several:
                labels.append(", ".join(key))
            base = group[group.recipe == baseline].iloc[0]
            for _, row in group[group.recipe != baseline].iterrows():
                _difference(axes, len(labels), row, base, colours[row.recipe])
                labels.append(row.recipe)
        axes.set_yticks(range(places), labels)
        for label in axes.get_yticklabels() if several else ():
            if ", " in label.get_text():
                label.set_fontweight("bold")
        axes.set_ylim(places - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"mIoU minus that of {baseline}, in points")
        axes.spines["left"].set_visible(False)
        reach = 1.1 * max(abs(edge) for edge in (*axes.get_xlim(), 0.5))
        axes.set_xlim(-reach, reach)
        return save(figure, folder, name)


def _difference(axes: Axes, place: int, row: pd.Series, base: pd.Series, colour: str) -> None:
    if math.isnan(row.mIoU_difference):
        axes.text(0, place, " undefined", va="center", color=FAINT, fontsize=9)
        return
    if not math.isnan(row.mIoU_low):
        axes.plot([row.mIoU_low, row.mIoU_high], [place, place], color=colour, linewidth=7, alpha=0.35, solid_capstyle="round")
    axes.plot(row.mIoU_difference, place, "o", color=colour, markersize=10)
    seeds = [f"mIoU_seed{seed}" for seed in row.seeds.split()]
    axes.plot([row[s] - base[s] for s in seeds], [place] * len(seeds), "|", color=INK, markersize=13, markeredgewidth=1.4)


def class_bars(
    bars: dict[str, tuple[Sequence[float], Sequence[float] | None]],
    classes: Sequence[str],
    colours: dict[str, str],
    label: str,
    folder: Path,
    name: str,
) -> str:
    """Percentages per class, one bar per series beside each other, classes in as many lines as legible bars need.

    ``bars`` maps a series to its heights and, or None, the whiskers' half lengths; NaN is shown as a dash.
    """
    most = max(2, min(CLASSES_PER_LINE, BARS_PER_LINE // len(bars)))
    lines = math.ceil(len(classes) / most)
    across = math.ceil(len(classes) / lines)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 0.6 + (2.9 if lines == 1 else 2.3 * lines)), layout="constrained")
        panels = figure.subplots(lines, 1, squeeze=False)[:, 0]
        width = 0.82 / len(bars)
        for line, axes in enumerate(panels):
            shown = range(line * across, min((line + 1) * across, len(classes)))
            for index, (series, (heights, errors)) in enumerate(bars.items()):
                places = np.arange(len(shown)) + (index - (len(bars) - 1) / 2) * width
                tall = np.array([heights[c] for c in shown], float)
                whiskers = None if errors is None else np.where(np.isnan(tall), 0, _whiskers([errors[c] for c in shown]))
                axes.bar(
                    places, np.nan_to_num(tall), 0.9 * width, color=colours[series],
                    yerr=whiskers if whiskers is not None and whiskers.any() else None, error_kw={"ecolor": INK, "elinewidth": 0.9},
                )  # fmt: skip
                for place in places[np.isnan(tall)]:
                    axes.text(place, 1, "–", ha="center", fontsize=8, color=FAINT)
            names = ["\n".join(textwrap.wrap(classes[c], max(8, 100 // across))) for c in shown]
            axes.set_xticks(range(len(shown)), names)
            axes.set_xlim(-0.55, across - 0.45)
            axes.set_ylabel(label)
            axes.set_ylim(0, 100)
            axes.grid(axis="x", visible=False)
        handles = [Patch(color=colours[series], label=series) for series in bars]
        figure.legend(handles=handles, loc="outside upper left", ncols=_columns(list(bars)), columnspacing=1.4, handlelength=1.1)
        return save(figure, folder, name)


def _columns(labels: Sequence[str]) -> int:
    """So many columns of a legend fit the width of a figure."""
    return max(1, min(len(labels), int(FIGURE_WIDTH / (0.55 + 0.085 * max(map(len, labels))))))


def agreement_bars(bars: list[dict], score: str, folder: Path, name: str) -> str:
    """Agreement of images with their masks, judge beside critic.

    ``bars`` lists {label, colour, judge: [values], critic: [values]}, percent; several values are copies, whose sd is a whisker.
    """
    titles = {"judge": "independent judge: evidence", "critic": "guiding critic: optimised against"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 1.1 + 0.42 * len(bars)), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (who, title) in zip(panels, titles.items(), strict=True):
            for place, bar in enumerate(bars):
                mean, sd = mean_sd(bar[who])
                faded = 1.0 if who == "judge" else 0.45
                axes.barh(place, mean, 0.62, color=bar["colour"], alpha=faded)
                if not math.isnan(sd):
                    axes.plot([mean - sd, mean + sd], [place, place], color=INK, linewidth=1.2)
                if not math.isnan(mean):
                    axes.text(mean + np.nan_to_num(sd) + 2, place, f"{mean:.1f}", va="center", fontsize=9)
            axes.set_title(title)
            axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars])
            axes.set_ylim(len(bars) - 0.5, -0.5)
            axes.set_xlim(0, 105)
            axes.set_xlabel(f"{score} in percent")
            axes.grid(axis="y", visible=False)
        return save(figure, folder, name)


def class_legend(classes: Sequence[str], palette: Sequence[tuple[int, int, int]], folder: Path, name: str) -> str:
    """The classes and their colours, with the colour of ignored pixels."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 0.3))
        figure.legend(handles=_swatches(classes, palette), loc="center", ncols=8)
        return save(figure, folder, name)


def _swatches(classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> list[Patch]:
    named = [*zip(classes, palette, strict=True), ("ignored", IGNORED)]
    return [Patch(facecolor=np.array(rgb) / 255, edgecolor=FAINT, linewidth=0.5, label=label) for label, rgb in named]


@dataclass(frozen=True)
class Sheet:
    """A grid of pictures: titles of the columns, a name and the pictures uint8 [H,W,3] (None: left out) of each row."""

    columns: list[str]
    rows: list[tuple[str, list[np.ndarray | None]]]


def sample_sheet(sheet: Sheet, classes: Sequence[str], palette: Sequence[tuple[int, int, int]], folder: Path, name: str) -> str:
    """The sheet as one picture, with the legend of the classes, if any are given, below; pixels are shown as they are, not smoothed."""
    across, down, cell, gap = len(sheet.columns), len(sheet.rows), 1.45, 0.05
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(cell * across, cell * down))
        axes = figure.add_axes((0, 0, 1, 1))  # one for all: an axes for each picture takes far longer
        axes.set_axis_off()
        for column, title in enumerate(sheet.columns):
            above = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(title.replace(", ", ",\n"), (column + (1 - gap) / 2, 0), (0, 3), **above, fontsize=9)
        for line, (_, pictures) in enumerate(sheet.rows):
            for column, picture in enumerate(pictures):
                if picture is not None:
                    axes.imshow(picture, interpolation="nearest", extent=_place(picture, column, line, 1 - gap))
        axes.set_xlim(0, across - gap)
        axes.set_ylim(down - gap, 0)
        if classes:
            handles = _swatches(classes, palette)
            lines = math.ceil(len(handles) / max(3, across))
            columns = math.ceil(len(handles) / lines)
            figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=columns, fontsize=9)
        return save(figure, folder, name)


def _place(picture: np.ndarray, column: int, line: int, side: float) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a picture in the middle of its cell, as large as it fits."""
    height, width = (side * length / max(picture.shape[:2]) for length in picture.shape[:2])
    left, top = column + (side - width) / 2, line + (side - height) / 2
    return left, left + width, top + height, top


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
    free, apart, chosen = np.ones(len(table), bool), np.ones(len(table), bool), []
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


def correction_curves(curves: dict[str, pd.DataFrame], colours: dict[str, str], folder: Path, name: str) -> str:
    """What the correction did, per corrected step: the critic's loss before and after, and the length of the changes of the velocity.

    ``curves`` maps a sampler to columns step, loss_before, loss_after (NaN where it was not measured), gradient_ratio, clamp_ratio,
    means over the images that were corrected at that step.
    """
    before, solid = {"linestyle": "--", "linewidth": 1.3}, {"linewidth": 2, "marker": "o", "markersize": 3.5}
    clamp = {"linestyle": ":", "linewidth": 1.8}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for sampler, curve in curves.items():
            colour, steps = colours[sampler], curve.step + 1
            left.plot(steps, curve.loss_before, **before, color=colour)
            if curve.loss_after.notna().any():  # it may not have been measured
                left.plot(steps, curve.loss_after, **solid, color=colour)
            right.plot(steps, curve.gradient_ratio, **solid, color=colour)
            if (curve.clamp_ratio > 0).any():
                right.plot(steps, curve.clamp_ratio, **clamp, color=colour)
        left.set_title("critic's loss")
        left.set_ylabel("mean cross-entropy per pixel")
        right.set_title("size of the change")
        right.set_ylabel("length relative to the velocity")
        for axes in (left, right):
            axes.set_xlabel("corrected step")
            axes.set_ylim(bottom=0, top=1.15 * _top(axes))
            axes.xaxis.get_major_locator().set_params(integer=True)
        samplers = [Line2D([], [], color=colours[sampler], linewidth=2, label=sampler) for sampler in curves]
        styles = {"before": before, "after; by gradient": solid, "by clamp": clamp}
        if not any((curve.clamp_ratio > 0).any() for curve in curves.values()):
            del styles["by clamp"]
        lines = [Line2D([], [], color=FAINT, label=label, **style) for label, style in styles.items()]
        labels = [*curves, *styles]
        figure.legend(handles=[*samplers, *lines], loc="outside upper left", ncols=_columns(labels), columnspacing=1.6, handlelength=2.4)
        return save(figure, folder, name)


#: Markers beside the colours, for those who see colours alike.
MARKERS = "osD^vP"


def levels_by_steps(levels: dict[str, pd.DataFrame], score: str, folder: Path, name: str) -> str:
    """A score over the number of corrected steps for each form of the correction, judge beside critic.

    ``levels`` maps a form to columns steps, judge, judge_sd, critic, critic_sd (percent, NaN for no sd); the row of 0 steps is plain
    sampling and the same for all.
    """
    counts = sorted({steps for frame in levels.values() for steps in frame.steps})
    titles = {"judge": "independent judge: evidence", "critic": "guiding critic: optimised against"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH, 3.5), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, (who, title) in zip(panels, titles.items(), strict=True):
            axes.axhline(next(iter(levels.values()))[who].iloc[0], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            hues, marks = repeated(COLOURS, len(levels)), repeated(MARKERS, len(levels))
            for index, (form, frame) in enumerate(levels.items()):
                aside = 0.09 * (index - (len(levels) - 1) / 2)  # whiskers beside each other
                axes.errorbar(
                    [counts.index(steps) + (aside if steps else 0) for steps in frame.steps], frame[who], _whiskers(frame[f"{who}_sd"]),
                    color=hues[index], marker=marks[index], markersize=5.5, linewidth=1.8, elinewidth=1, label=form,
                )  # fmt: skip
            axes.set_title(title)
            axes.set_xticks(range(len(counts)), [str(steps or "none") for steps in counts])
            axes.set_xlabel("corrected steps")
            axes.grid(axis="x", visible=False)
        panels[0].set_ylabel(f"{score} in percent")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, columnspacing=1.6)
        return save(figure, folder, name)


def corrections_by_step(curves: dict[str, pd.DataFrame], folder: Path, name: str) -> str:
    """Small multiples, one column per form: above the critic's loss before and after each correction, below the changes of the velocity.

    ``curves`` maps a form to columns step, loss_before, loss_after, gradient_ratio, clamp_ratio, means over its samples.
    """
    across = len(curves)
    before, solid, clamp = {"color": INK, "linewidth": 1.2, "linestyle": "--"}, {"linewidth": 2.0}, {"linewidth": 2.2, "linestyle": ":"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, 2.15 * across), 4.6), layout="constrained")
        losses, changes = figure.subplots(2, across, sharex=True, sharey="row", squeeze=False)
        for upper, lower, colour, (form, curve) in zip(losses, changes, repeated(COLOURS, across), curves.items(), strict=True):
            steps = curve.step + 1
            upper.plot(steps, curve.loss_after, **solid, color=colour)
            upper.plot(steps, curve.loss_before, **before)  # on top: a correction that does nothing hides neither
            upper.set_title(form)
            for column, style in (("gradient_ratio", solid), ("clamp_ratio", clamp)):
                changed = curve[column] > 0  # a change of none has no place on a logarithmic axis
                lower.plot(steps[changed], 100 * curve[column][changed], **style, color=colour)
            lower.set_yscale("log")
            lower.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            lower.set_xlabel("corrected step")
            lower.xaxis.get_major_locator().set_params(integer=True)
        losses[0].set_ylabel("critic's loss")
        losses[0].set_ylim(bottom=0)
        changes[0].set_ylabel("change in % of the velocity")
        styles = {"loss before": before, "loss after; change by gradient": solid, "change by clamp": clamp}
        lines = [Line2D([], [], label=label, **({"color": FAINT} | style)) for label, style in styles.items()]
        figure.legend(handles=lines, loc="outside upper left", ncols=4, columnspacing=1.6, handlelength=2.6)
        return save(figure, folder, name)


def repeated(things: Sequence[str], count: int) -> list[str]:
    """The first ``count`` of ``things``, from the start again when they run out."""
    return [things[index % len(things)] for index in range(count)]


def _top(axes: Axes) -> float:
    highest = [np.nanmax(line.get_ydata()) for line in axes.lines if np.isfinite(line.get_ydata()).any()]
    return max([*highest, 1e-6])
