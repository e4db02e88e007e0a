"""Samples to look at: chosen for their classes, whatever they look like."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.manifest import paths_of
from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults, Pair
from crfm_core.reporting.page import Report

TITLE = "Samples"
ROWS = 6  #: tiles of a sheet
COLUMNS = 6  #: pictures of a tile side by side, beside the mask and the real tile

Column = tuple[str, list[np.ndarray | None]]  #: its title, and a picture for each tile


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """Real tiles chosen by their classes, each with the first sample of every sampler and its label after a pixel filter; and the notes
    that samples carry.

    The leading recipes' samples come first; sheets are as many as their columns need.
    """
    tiles, manifest = results.tiles, results.files["tiles"][results.dataset.train]
    rows = draw.choose_tiles(tiles, ROWS)
    images, labels = (paths_of(manifest, tiles, column, results.root) for column in ("image", "label"))
    ids = list(tiles.tile_id.iloc[rows])
    real: list[Column] = [
        ("mask", [paint(read_label(labels[row]), results.dataset.palette) for row in rows]),
        ("real tile", [read_rgb(images[row]) for row in rows]),
    ]
    sheets: list[dict] = []
    for leading, pairs in ((True, results.leading_pairs), (False, results.other_pairs)):
        columns = [column for pair in pairs for column in _columns(results, pair, ids)]
        for start in range(0, max(len(columns), int(leading)), COLUMNS):
            figure = _sheet(report, results, [*real, *columns[start : start + COLUMNS]], len(sheets))
            sheets.append({"figure": figure, "tiles": ids, "leading": leading})
    notes = [
        f"{results.name_of(pair)}: {count} of {len(table)} samples: {note}"
        for pair, table in results.synthetic.items()
        for note, count in table.note[table.note.astype(bool)].value_counts().items()
    ]
    return {"sheets": sheets, "notes": notes}


def _sheet(report: Report, results: DatasetResults, columns: list[Column], index: int) -> dict:
    dataset, titles = results.dataset, [title for title, _ in columns]
    pictures = [list(row) for row in zip(*(column for _, column in columns), strict=True)]
    name = f"{dataset.name}-samples" + (f"-{index + 1}" if index else "")
    draw.sample_sheet(titles, pictures, dataset.classes, dataset.palette, report.pictures.folder, name)
    return report.pictures(name, f"Masks, real tiles and samples, one tile per row; columns: {', '.join(titles)}", "png")


def _columns(results: DatasetResults, pair: Pair, ids: list[str]) -> list[Column]:
    """The samples of a sampler, and what each of its pixel filters leaves of their masks."""
    table, palette = results.synthetic[pair], results.dataset.palette
    first = table["copy"].min()

    def files_of(kind: str, key: tuple[str, ...], table: pd.DataFrame, column: str) -> list:
        """The file of the first copy for each mask; None where it was dropped."""
        rows = table[table["copy"] == first]
        files = dict(zip(rows.mask_of, paths_of(results.files[kind][key], rows, column, results.root), strict=True))
        return [files.get(tile_id) for tile_id in ids]

    name, filters = results.name_of(pair), [key for key in results.filtered if key[:2] == pair]
    filters = [key for key in filters if not results.settings.filters[key[2]].DROPS_IMAGES]
    columns: list[Column] = [(name, [path and read_rgb(path) for path in files_of("synthetic", pair, table, "image")])]
    for key in filters:
        files = files_of("filtered", key, results.filtered[key], "label")
        title = f"{name}, {'filtered' if len(filters) == 1 else key[2]}"
        columns.append((title, [path and paint(read_label(path), palette) for path in files]))
    return columns
