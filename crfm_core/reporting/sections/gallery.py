"""Samples to look at: chosen for their classes whatever they look like, and those that show their masks worst."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.manifest import paths_of
from crfm_core.reporting import figures as draw
from crfm_core.reporting.findings import number
from crfm_core.reporting.material import Key, Material
from crfm_core.reporting.rendering import Pictures
from crfm_core.settings import Settings

ROWS = 6  #: tiles of a sheet
COLUMNS = 8  #: pictures of a tile side by side, the mask among them
FAILURES = 6  #: failures per sampler


@dataclass(frozen=True)
class Column:
    """A column of the sheet: its title, the file for each mask's tile, and how it is read."""

    title: str
    files: dict[str, Path]
    read: Callable[[Path], np.ndarray]


def show_sheets(material: Material, settings: Settings, show: Pictures) -> list[dict]:
    """Real tiles chosen by their classes, each with the first sample of every sampler and its label after a pixel filter.

    The leading recipes' samples come first; sheets are as many as their columns need.
    """
    tiles, wide = material.tiles, COLUMNS - 2
    images, labels = (paths_of(material.files["tiles"], tiles, column, material.root) for column in ("image", "label"))
    rows = draw.choose_tiles(tiles, ROWS)
    leading, others = (_columns(material, keys, settings) for keys in (material.leading_keys(settings), material.other_keys(settings)))
    parts = [(True, leading[start : start + wide]) for start in range(0, max(1, len(leading)), wide)]
    parts += [(False, others[start : start + wide]) for start in range(0, len(others), wide)]
    return [
        _sheet(material, [(row, labels[row], images[row]) for row in rows], columns, index, show) | {"leading": first}
        for index, (first, columns) in enumerate(parts)
    ]


def _sheet(material: Material, rows: list[tuple[int, Path, Path]], columns: list[Column], index: int, show: Pictures) -> dict:
    dataset, pictures = material.dataset, []
    for row, label, image in rows:
        tile_id = material.tiles.tile_id.iloc[row]
        line = [paint(read_label(label), dataset.palette), read_rgb(image)]
        line += [column.read(column.files[tile_id]) if tile_id in column.files else None for column in columns]
        pictures.append((tile_id, line))
    titles = ["mask", "real tile", *(column.title for column in columns)]
    name = f"{dataset.name}-samples" + (f"-{index + 1}" if index else "")
    draw.sample_sheet(draw.Sheet(titles, pictures), dataset.classes, dataset.palette, show.folder, name)
    alt = f"Masks, real tiles and samples, one tile per row; columns: {', '.join(titles)}"
    return {"figure": show(name, alt, "png"), "tiles": [tile_id for tile_id, _ in pictures]}


def _columns(material: Material, keys: list[Key], settings: Settings) -> list[Column]:
    """Samples of every sampler, each with what its pixel filters leave of the mask."""
    columns, palette, root = [], material.dataset.palette, material.root
    for key in keys:
        table = material.synthetic[key]
        first = table["copy"].min()
        columns.append(Column(material.name_of(key), _files(material.files["synthetic"][key], table, "image", first, root), read_rgb))
        filters = [name for *of, name in material.filtered if tuple(of) == key and not settings.filters[name].DROPS_IMAGES]
        for name in filters:
            title = f"{material.name_of(key)}, {'filtered' if len(filters) == 1 else name}"
            files = _files(material.files["filtered"][(*key, name)], material.filtered[(*key, name)], "label", first, root)
            columns.append(Column(title, files, lambda path: paint(read_label(path), palette)))
    return columns


def _files(manifest: Path, table: pd.DataFrame, column: str, copy: int, root: Path) -> dict[str, Path]:
    """The file of one copy made for each mask."""
    rows = table[table["copy"] == copy]
    return dict(zip(rows.mask_of, paths_of(manifest, rows, column, root), strict=True))


def show_failures(material: Material, settings: Settings, show: Pictures) -> list[dict]:
    """For every sampler the samples with the lowest mIoU by the judge, each below its mask; those of the leading recipes first."""
    found = []
    for key in (*material.leading_keys(settings), *material.other_keys(settings)):
        if key in material.agreement and (lowest := material.agreement[key].lowest[:FAILURES]):
            found.append(_failures(material, key, lowest, show) | {"leading": key in material.leading_keys(settings)})
    return found


def _failures(material: Material, key: Key, lowest: list, show: Pictures) -> dict:
    dataset, manifest = material.dataset, material.files["synthetic"][key]
    masks, samples = [], []
    for tile in lowest:
        row = material.row_of(key, tile.tile_id, material.files["agreement"][key])
        (image,), (label,) = (paths_of(manifest, row, column, material.root) for column in ("image", "label"))
        masks.append(paint(read_label(label), dataset.palette))
        samples.append(read_rgb(image))
    titles = [number(tile.judge) for tile in lowest]
    name = "-".join((dataset.name, "failures", *key))
    draw.sample_sheet(draw.Sheet(titles, [("mask", masks), ("sample", samples)]), [], [], show.folder, name)
    alt = f"The {len(lowest)} samples of {material.name_of(key)} that show their masks worst: masks above, samples below"
    return {
        "sampler": material.name_of(key),
        "figure": show(name, alt, "png"),
        "tiles": [{"tile_id": tile.tile_id, "judge": tile.judge, "critic": tile.critic} for tile in lowest],
        "of": material.agreement[key].tiles,
    }
