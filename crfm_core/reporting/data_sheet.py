"""A dataset looked at before anything is trained on it: contact sheets, class shares, maps of the tiles, and one page that shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import BaseModel

from crfm_core import DataError
from crfm_core.data.rasters import bands_of, is_palette, open_raster, palette_of, read_label, read_rgb, scaled
from crfm_core.data.scenes import read_scenes
from crfm_core.data.splits import ground_corners
from crfm_core.files import atomic_path, write_json, write_text
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.reporting import composition
from crfm_core.reporting import data_figures as draw
from crfm_core.reporting.composition import Distance, Note, SplitNumbers
from crfm_core.reporting.figures import choose_tiles
from crfm_core.reporting.findings import listed
from crfm_core.reporting.measurements import read_model
from crfm_core.reporting.rendering import embed, environment
from crfm_core.settings import UNLABELLED, Dataset, Scale

CONTACTS = 8  #: tiles of a contact sheet
VIEWS = 12  #: scenes of the tile map
SYSTEMS = 6  #: coordinate systems of the ground map


class PictureFile(BaseModel):
    """A picture of the sheet: its files, of which the first is the one to show."""

    kind: Literal["contact", "shares", "scenes", "ground"]
    split: str | None = None
    files: list[str]
    alt: str
    caption: str


class UnlabelledNumbers(BaseModel):
    """The scenes without labels."""

    scenes: int
    tiles: int | None  #: None where they are not cut, as nothing uses them


class DataSheet(BaseModel):
    """What ``data_sheet.json`` holds."""

    dataset: str
    about: str
    licence: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    train: str
    test: str
    splits: dict[str, SplitNumbers]
    distances: list[Distance]
    notes: list[Note]
    pictures: list[PictureFile]
    unlabelled: UnlabelledNumbers | None = None

    def of_kind(self, kind: str, split: str | None = None) -> PictureFile | None:
        """The first picture of a kind, of one split if it is given."""
        return next((picture for picture in self.pictures if picture.kind == kind and split in (None, picture.split)), None)


def draw_data_sheet(dataset: Dataset, scenes: Path, tiles: dict[str, Path], root: Path, out: Path) -> DataSheet:
    """Write the folder ``out``: index.html, data_sheet.json, class_shares.csv and the pictures that the page shows.

    Args:
        scenes: the dataset's scene manifest.
        tiles: split name to its tile manifest, in the order in which splits are shown. Tiles of the split ``unlabelled`` are counted and
            placed; nothing is said of their classes.
        root: the dataset's results folder, which no path of a manifest may leave.

    Raises DataError naming the file, and the row or scene in it, that is missing, damaged or contradicts another.
    """
    tables = {split: read_manifest(path, labelled=split != UNLABELLED) for split, path in tiles.items()}
    for split, table in tables.items():
        composition.check_table(tiles[split], table, len(dataset.classes))
    scene_table, sizes = read_scenes(scenes, needed=()), composition.scene_sizes(list(tables.values()))
    _check_scenes(scenes, scene_table, tiles, tables)
    labelled = {split: table for split, table in tables.items() if split != UNLABELLED}
    splits = {split: composition.count_split(table, sizes) for split, table in labelled.items()}
    distances = composition.compare(splits, dataset.classes)
    notes = composition.notes_on(splits, distances, dataset.classes, dataset.train, dataset.test)
    notes += [*_without_tiles(scene_table, tables), *_same_pictures(tables)]
    with atomic_path(out) as folder:
        folder.mkdir()
        pictures = [_contact(dataset, split, tiles[split], table, root, folder) for split, table in labelled.items()]
        pictures += [_shares(dataset, splits, folder), _scene_map(dataset, scene_table, tables, sizes, folder)]
        pictures += _ground_map(tables, folder)
        sheet = DataSheet(
            dataset=dataset.name, about=dataset.about, licence=dataset.licence, classes=dataset.classes, palette=dataset.palette,
            train=dataset.train, test=dataset.test, splits=splits, distances=distances, notes=notes, pictures=pictures,
            unlabelled=_count_unlabelled(scene_table, tables.get(UNLABELLED)),
        )  # fmt: skip
        _class_shares(sheet).to_csv(folder / "class_shares.csv", index=False)
        write_json(folder / "data_sheet.json", sheet.model_dump(mode="json", exclude=None if sheet.unlabelled else {"unlabelled"}))
        shown = [{"kind": picture.kind, **shown_picture(folder, picture, out)} for picture in pictures]
        page = environment().get_template("data_sheet.html")
        files = [str(path) for path in (scenes, *tiles.values())]
        write_text(folder / "index.html", page.render(sheet=sheet, pictures=shown, folder=out, files=files))
    return sheet


def read_data_sheet(folder: Path) -> DataSheet:
    """The numbers and pictures of a folder of :func:`draw_data_sheet`. Raises DataError naming the file and what is wrong in it."""
    return read_model(Path(folder) / "data_sheet.json", DataSheet, remedy="delete the folder")


def shown_picture(folder: Path, picture: PictureFile, final: Path | None = None) -> dict:
    """A picture as the pages hold it, with its caption; ``final`` is where the folder will lie."""
    name = picture.files[0]
    return embed(folder / name, picture.alt, (final or folder) / name) | {"caption": picture.caption, "split": picture.split}


def _check_scenes(scenes: Path, scene_table: pd.DataFrame, tiles: dict[str, Path], tables: dict[str, pd.DataFrame]) -> None:
    if (again := scene_table.scene[scene_table.scene.duplicated()]).size:
        raise DataError(f"{scenes}: scene {again.iloc[0]!r} is listed twice; delete it and run the workflow again")
    known = set(scene_table.scene)
    for split, table in tables.items():
        if unknown := sorted(set(table.scene) - known):
            raise DataError(f"{tiles[split]}: scene {unknown[0]!r} is not in {scenes}; delete both and run the workflow again")


def _count_unlabelled(scene_table: pd.DataFrame, table: pd.DataFrame | None) -> UnlabelledNumbers | None:
    scenes = int((scene_table.split == UNLABELLED).sum())
    return UnlabelledNumbers(scenes=scenes, tiles=None if table is None else len(table)) if scenes else None


def _class_shares(sheet: DataSheet) -> pd.DataFrame:
    rows = []
    for split, numbers in sheet.splits.items():
        columns = zip(sheet.classes, numbers.pixels, numbers.shares, numbers.shown, strict=True)
        rows += [{"split": split, "class": name, "pixels": p, "share_of_labelled": s, "tiles": n} for name, p, s, n in columns]
    return pd.DataFrame(rows)


def _without_tiles(scene_table: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> list[Note]:
    """Scenes of the shown splits that no tile was cut from; a scene without a split belongs to all."""
    used = set().union(*(table.scene for table in tables.values()))
    left = sorted(set(scene_table.scene[scene_table.split.isin(["", *tables])]) - used)
    text = f"Scenes without a tile, because labels are missing or the selection left them out: {listed(left, 3)}."
    return [Note(kind="no tile", text=text)] if left else []


def _same_pictures(tables: dict[str, pd.DataFrame]) -> list[Note]:
    """Tiles of one split whose images are the same file, where the manifest tells."""
    notes = []
    for split, table in tables.items():
        if "image_digest" in table and (again := table[table.image_digest.duplicated()]).size:
            text = f"Tiles of {split} with the same pixels as another tile of it: {listed(list(again.tile_id), 3)}."
            notes.append(Note(kind="same picture", text=text))
    return notes


def _contact(dataset: Dataset, split: str, manifest: Path, table: pd.DataFrame, root: Path, folder: Path) -> PictureFile:
    chosen = table.iloc[choose_tiles(table, CONTACTS)]
    images, labels = (paths_of(manifest, chosen, column, root) for column in ("image", "label"))
    files = zip(chosen.tile_id, images, labels, strict=True)
    tiles = [draw.ContactTile(name, read_rgb(image), read_label(label)) for name, image, label in files]
    for tile, label in zip(tiles, labels, strict=True):
        if tile.image.shape[:2] != tile.label.shape:
            raise DataError(f"{label}: {tile.label.shape[1]}x{tile.label.shape[0]} pixels, its image has another size; cut the tiles again")
    every = f"All {len(table)} tiles of {split}" if len(table) > 1 else f"The tile of {split}"
    some = f"{len(tiles)} of {len(table)} tiles of {split}, chosen for the classes they show, none by chance or quality"
    name = draw.contact_sheet(tiles, dataset.classes, dataset.palette, folder, f"contact-{split}")
    return PictureFile(
        kind="contact",
        split=split,
        files=[f"{name}.png", f"{name}.svg"],
        alt=f"{len(tiles)} tiles of the split {split}, each as image, mask and mask laid over the image: {', '.join(chosen.tile_id)}",
        caption=f"{some if len(tiles) < len(table) else every}. The line below tells what covers a tile. In the overlay each class is "
        "rimmed in its colour.",
    )


def _shares(dataset: Dataset, splits: dict[str, SplitNumbers], folder: Path) -> PictureFile:
    name = draw.share_bars(splits, dataset.classes, folder, "class_shares")
    return PictureFile(
        kind="shares",
        files=[f"{name}.svg", f"{name}.png"],
        alt=f"Bars of the share of each class in {', '.join(splits)}; the numbers stand in the table of classes",
        caption="Share of each class in the labelled pixels of each split, and of ignored pixels in all. The axis is of square roots, so "
        "that rare classes can be seen.",
    )


def choose_scenes(per_split: Sequence[Sequence[str]], most: int) -> list[str]:
    """At most so many scenes, as evenly from the splits as they have them and evenly spaced within each; a scene belongs to the first
    split that has it."""
    lists: list[list[str]] = []
    seen: set[str] = set()
    for names in per_split:
        lists.append(sorted(set(names) - seen, key=_natural))
        seen |= set(names)
    counts = [0] * len(lists)
    for _ in range(min(most, len(seen))):
        open_ = [index for index, names in enumerate(lists) if counts[index] < len(names)]
        counts[min(open_, key=counts.__getitem__)] += 1
    return [
        names[place]
        for names, count in zip(lists, counts, strict=True)
        for place in np.linspace(0, len(names) - 1, count).round().astype(int)
    ]


def _natural(name: str) -> list:
    """What sorts scene 9 before scene 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _scene_map(
    dataset: Dataset, scene_table: pd.DataFrame, tables: dict[str, pd.DataFrame], sizes: dict[str, tuple[int, int]], folder: Path
) -> PictureFile:
    chosen = choose_scenes([list(table.scene) for table in tables.values()], VIEWS)
    rows, views = scene_table.set_index("scene"), []
    for scene in chosen:
        tiles = {
            split: table.loc[table.scene == scene, ["row", "col", "height", "width"]].to_numpy(int)
            for split, table in tables.items()
            if (table.scene == scene).any()
        }
        row = rows.loc[scene]
        limits = (row.low, row.high) if len(row.low) else None
        picture = thumbnail(Path(row.image), 1600 // min(4, len(chosen)), dataset.tile.bands, limits)
        views.append(draw.SceneView(scene, picture, *sizes[scene], tiles))
    some = len(chosen) < len(sizes)
    title = f"{len(chosen)} of {len(sizes)} scenes" if some else f"All {len(sizes)} scenes" if len(sizes) > 1 else "The scene"
    name = draw.scene_map(views, list(tables), folder, "tile_map")
    return PictureFile(
        kind="scenes",
        files=[f"{name}.png", f"{name}.svg"],
        alt=f"{title} with the outlines of their tiles, coloured by split: {', '.join(chosen)}",
        caption=f"{title}{', spread evenly over the splits and their lists' if some else ''}. Tiles are outlined in the colour of their "
        "split; what lies in no tile is grey. Scenes are not to one scale.",
    )


def thumbnail(
    path: Path, side: int, bands: Sequence[int] | None = None, limits: tuple[Sequence[float], Sequence[float]] | None = None
) -> np.ndarray:
    """A raster of any size, depth and number of bands as uint8 [h,w,3], its longer side at most ``side`` pixels.

    It is read at twice that size at most, so a large file is never read whole. ``limits`` are the values per band that become 0 and
    255; without them depths other than uint8 are stretched between two percentiles of what was read. Pixels without a value are
    white. Raises DataError for an unreadable file or a band that is not there.
    """
    with open_raster(path) as source:
        chosen = bands_of(source, bands)
        shrink = max(1.0, max(source.shape) / (2 * side))
        shape = tuple(max(1, round(length / shrink)) for length in source.shape)
        pixels = source.read(chosen, out_shape=(len(chosen), *shape))
        valid = (source.dataset_mask(out_shape=shape) > 0) & np.isfinite(pixels).all(axis=0)
        colours = palette_of(source) if is_palette(source) and len(chosen) == 1 and limits is None else None
    if colours is not None:
        pixels = np.moveaxis(colours[pixels[0], :3], -1, 0)
    elif limits is not None or pixels.dtype != np.uint8:
        pixels = scaled(pixels, *(limits or _percentiles(pixels[:, valid])))
    filled = np.broadcast_to(np.where(valid, pixels, 255).astype(np.uint8), (3, *shape))
    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(filled, 0, -1)))
    picture.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(picture)


def _percentiles(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two percentiles of each band of pixels [bands, n]; zeros where there is no pixel."""
    scale = Scale()
    low, high = np.percentile(pixels.astype(float), (scale.low, scale.high), axis=1) if pixels.size else np.zeros((2, len(pixels)))
    return low, high


def _ground_map(tables: dict[str, pd.DataFrame], folder: Path) -> list[PictureFile]:
    """The map of footprints, if any tile has a georeference; the coordinate systems with most tiles."""
    counts = pd.concat([table.crs for table in tables.values()]).value_counts().drop("", errors="ignore")
    if counts.empty:
        return []
    grounds = [_ground(crs, tables) for crs in counts.index[:SYSTEMS]]
    name = draw.ground_map(grounds, list(tables), folder, "ground_map")
    left = f" {len(counts) - SYSTEMS} more systems are not drawn." if len(counts) > SYSTEMS else ""
    return [
        PictureFile(
            kind="ground",
            files=[f"{name}.png", f"{name}.svg"],
            alt=f"Map of the footprints of {counts.sum()} tiles on the ground, coloured by split, in {', '.join(g.name for g in grounds)}",
            caption="Where the tiles lie on the ground, in the coordinates of their files. Tiles that would be specks are drawn "
            f"larger than they are.{left}",
        )
    ]


def _ground(crs: str, tables: dict[str, pd.DataFrame]) -> draw.Ground:
    quads = {split: ground_corners(table[table.crs == crs]) for split, table in tables.items() if (table.crs == crs).any()}
    parsed = composition.parse_crs(crs)
    metres = composition.metres_per_unit(crs, float(np.median(np.concatenate(list(quads.values()))[..., 1])))
    unit = "degrees" if parsed.is_geographic else parsed.linear_units if metres else "unknown unit"
    axes = ("longitude", "latitude") if parsed.is_geographic else ("easting", "northing")
    name, code = parsed.to_wkt().split('"')[1], parsed.to_epsg()  # WGS 84 / UTM zone 31N, 32631
    return draw.Ground(f"{name} (EPSG:{code})" if code else name, (f"{axes[0]} ({unit})", f"{axes[1]} ({unit})"), metres, quads)
