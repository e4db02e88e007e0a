"""Samples to look at: chosen for their classes, whatever they look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.manifest import paths_of
from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults, Pair
from crfm_core.reporting.page import Report
from crfm_core.reporting.sections.corrections import notes_on_samples

TITLE = "Samples"
ROWS = 6  #: tiles of a sheet
COLUMNS = 8  #: pictures of a tile side by side, the mask among them


@dataclass(frozen=True)
class Column:
    """A column of the sheet: its title, the file for each mask's tile, and how it is read."""

    title: str
    files: dict[str, Path]
    read: Callable[[Path], np.ndarray]


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """The sheets, and the notes that samples carry."""
    return {"sheets": sheets_of(report, results), "notes": notes_on_samples(results)}


def sheets_of(report: Report, results: DatasetResults) -> list[dict]:
    """Real tiles chosen by their classes, each with the first sample of every sampler and its label after a pixel filter.

    The leading recipes' samples come first; sheets are as many as their columns need.
    """
    tiles, wide = results.tiles, COLUMNS - 2
    images, labels = (paths_of(results.files["tiles"][results.dataset.train], tiles, column, results.root) for column in ("image", "label"))
    rows = draw.choose_tiles(tiles, ROWS)
    leading, others = (_columns(results, pairs) for pairs in (results.leading_pairs, results.other_pairs))
    parts = [(True, leading[start : start + wide]) for start in range(0, max(1, len(leading)), wide)]
    parts += [(False, others[start : start + wide]) for start in range(0, len(others), wide)]
    return [
        _sheet(report, results, [(row, labels[row], images[row]) for row in rows], columns, index) | {"leading": first}
        for index, (first, columns) in enumerate(parts)
    ]


def _sheet(report: Report, results: DatasetResults, rows: list[tuple[int, Path, Path]], columns: list[Column], index: int) -> dict:
    dataset = results.dataset
    pictures: list[list[np.ndarray | None]] = []
    for row, label, image in rows:
        tile_id = results.tiles.tile_id.iloc[row]
        samples = [column.read(column.files[tile_id]) if tile_id in column.files else None for column in columns]
        pictures.append([paint(read_label(label), dataset.palette), read_rgb(image), *samples])
    titles = ["mask", "real tile", *(column.title for column in columns)]
    name = f"{dataset.name}-samples" + (f"-{index + 1}" if index else "")
    draw.sample_sheet(titles, pictures, dataset.classes, dataset.palette, report.pictures.folder, name)
    alt = f"Masks, real tiles and samples, one tile per row; columns: {', '.join(titles)}"
    return {"figure": report.pictures(name, alt, "png"), "tiles": [results.tiles.tile_id.iloc[row] for row, *_ in rows]}


def _columns(results: DatasetResults, pairs: list[Pair]) -> list[Column]:
    """Samples of every sampler, each with what its pixel filters leave of the mask."""
    columns, palette, root = [], results.dataset.palette, results.root
    for key in pairs:
        table = results.synthetic[key]
        first = table["copy"].min()
        columns.append(Column(results.name_of(key), _files(results.files["synthetic"][key], table, "image", first, root), read_rgb))
        filters = [name for *of, name in results.filtered if tuple(of) == key and not results.settings.filters[name].DROPS_IMAGES]
        for name in filters:
            title = f"{results.name_of(key)}, {'filtered' if len(filters) == 1 else name}"
            files = _files(results.files["filtered"][(*key, name)], results.filtered[(*key, name)], "label", first, root)
            columns.append(Column(title, files, lambda path: paint(read_label(path), palette)))
    return columns


def _files(manifest: Path, table: pd.DataFrame, column: str, copy: int, root: Path) -> dict[str, Path]:
    """The file of one copy made for each mask."""
    rows = table[table["copy"] == copy]
    return dict(zip(rows.mask_of, paths_of(manifest, rows, column, root), strict=True))
