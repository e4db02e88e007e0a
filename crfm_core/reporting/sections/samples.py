"""Samples to look at: chosen for their classes, whatever they look like."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.manifest import paths_of
from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults, Pair
from crfm_core.reporting.page import Report
from crfm_core.settings import TRAINING

TITLE = "Samples"
ROWS = 6  #: tiles of a sheet
COLUMNS = 6  #: pictures of a tile side by side, beside the mask and the real tile

Column = tuple[str, list[np.ndarray | None]]  #: its title, and a picture for each tile


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """Real tiles chosen by their classes, each with the first sample of every sampler and its label after a pixel filter; likewise new
    layouts, which have no real tile; how many of those there are; and the notes that samples carry.

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
        by_masks: dict[str, list[Pair]] = {TRAINING: []}
        for pair in pairs:
            by_masks.setdefault(results.settings.samplers[pair[1]].layouts, []).append(pair)
        for masks, drawn in by_masks.items():
            chosen, beside = (ids, real) if masks == TRAINING else _new_layouts(results, drawn[0])
            columns = [column for pair in drawn for column in _columns(results, pair, chosen)]
            for start in range(0, max(len(columns), int(leading and pairs == drawn)), COLUMNS):
                figure = _sheet(report, results, [*beside, *columns[start : start + COLUMNS]], len(sheets))
                sheets.append({"figure": figure, "tiles": chosen, "leading": leading, "layouts": masks != TRAINING and masks})
    notes = [
        f"{results.name_of(pair)}: {count} of {len(table)} samples: {note}"
        for pair, table in results.synthetic.items()
        for note, count in table.note[table.note.astype(bool)].value_counts().items()
    ]
    return {"sheets": sheets, "notes": notes, "layouts": _layouts_drawn(results)}


def _new_layouts(results: DatasetResults, pair: Pair) -> tuple[list[str], list[Column]]:
    """New layouts chosen by their classes among those of the first copy, and their masks."""
    table = results.synthetic[pair]
    table = table[table["copy"] == table["copy"].min()].reset_index(drop=True)
    shown = table.iloc[draw.choose_tiles(table, ROWS)]
    labels = paths_of(results.files["synthetic"][pair], shown, "label", results.root)
    return list(shown.mask_of), [("mask", [paint(read_label(label), results.dataset.palette) for label in labels])]


def _layouts_drawn(results: DatasetResults) -> list[dict]:
    """For each sampler that draws new layouts how many, of which kind and made from how many tiles; the share of each class among the
    labelled pixels beside that of the training tiles, which come first."""
    tables = {pair: table for pair, table in results.synthetic.items() if "layouts" in table}
    rows = [
        {
            "sampler": results.name_of(pair),
            "name": (name := results.settings.samplers[pair[1]].layouts),
            "what": f"{table.layouts.iloc[0]}: {results.settings.layouts[name].describe()}",
            "masks": len(table),
            "tiles": table.layout_of.nunique(),
            "pieces": int(table.pieces.sum()),
            "shares": _shares(table),
        }
        for pair, table in tables.items()
    ]
    real = {"sampler": "", "name": "training", "what": "the training tiles", "masks": len(results.tiles), "tiles": len(results.tiles)}
    return [real | {"pieces": 0, "shares": _shares(results.tiles)}, *rows] if rows else []


def _shares(table: pd.DataFrame) -> list[float]:
    """Shares of the classes among all labelled pixels."""
    counts = np.sum(list(table.pixels), axis=0)
    return (counts / max(1, counts.sum())).tolist()


def _sheet(report: Report, results: DatasetResults, columns: list[Column], index: int) -> dict:
    dataset, titles = results.dataset, [title for title, _ in columns]
    pictures = [list(row) for row in zip(*(column for _, column in columns), strict=True)]
    name = f"{dataset.name}-samples" + (f"-{index + 1}" if index else "")
    draw.sample_sheet(titles, pictures, dataset.classes, dataset.palette, report.pictures.folder, name)
    shown = "Masks, real tiles and samples, one tile per row" if "real tile" in titles else "New layouts and samples, one per row"
    return report.pictures(name, f"{shown}; columns: {', '.join(titles)}", "png")


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
