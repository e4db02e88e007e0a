"""What a dataset is made of, counted from its tile manifests alone, and what of it a person should know before training on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import shapely
from pydantic import BaseModel
from rasterio.crs import CRS
from rasterio.errors import CRSError

from crfm_core import DataError
from crfm_core.reporting.findings import listed
from crfm_core.reporting.rendering import percent

RARE = 0.001  #: a class with a smaller share of the labelled pixels is pointed out
UNLIKE = 0.2  #: total-variation distance from which two splits are called of different composition
SPARSE = 0.1  #: tiles with a smaller share of labelled pixels are pointed out


class SplitNumbers(BaseModel):
    """One split in numbers; shares are 0...1, pixels in overlaps count once per tile."""

    tiles: int
    scenes: int
    width: tuple[int, int]  #: least and most, of tiles in pixels
    height: tuple[int, int]
    pixels: list[int]  #: labelled pixels per class
    shares: list[float]  #: of the labelled pixels
    shown: list[int]  #: tiles that show the class
    labelled: float  #: of all pixels
    sparse: int  #: tiles of which less than SPARSE is labelled
    covered: float  #: of the area of the scenes that have tiles, what lies in a tile
    repeated: float  #: of the area of the tiles, what another tile of the split has already
    ground_distance: tuple[float, float] | None  #: least and most metres per pixel, None without a georeference


class Distance(BaseModel):
    """How differently two splits are composed: the share of labelled pixels that would have to be of another class."""

    splits: tuple[str, str]
    total_variation: float
    largest: str  #: the class that differs most


class Note(BaseModel):
    """Something a person should know; ``kind`` is for programs."""

    kind: Literal["missing", "rare", "unlike", "sparse", "no tile", "same picture"]
    text: str


def check_table(manifest: Path, table: pd.DataFrame, num_classes: int) -> None:
    """Raise DataError, naming the row, unless every tile counts each class and no more pixels than it has."""
    for tile_id, counts, area in zip(table.tile_id, table.pixels, table.width.astype(int) * table.height, strict=True):
        fault = f"counts {len(counts)} classes, the dataset has {num_classes}" if len(counts) != num_classes else ""
        if fault or sum(counts) > area:
            raise DataError(f"{manifest}: row {tile_id}: {fault or f'counts {sum(counts)} pixels of {area}'}; cut the tiles again")


def pixels_of(table: pd.DataFrame) -> np.ndarray:
    """Labelled pixels per tile and class, int64 [n,K]."""
    return np.stack([np.asarray(counts, np.int64) for counts in table.pixels])


def _area(table: pd.DataFrame) -> np.ndarray:
    return (table.width.astype(np.int64) * table.height).to_numpy()


def scene_sizes(tables: Sequence[pd.DataFrame]) -> dict[str, tuple[int, int]]:
    """Width and height of every scene in pixels of the tiles."""
    whole = pd.concat(tables).drop_duplicates("scene")
    return {row.scene: (int(row.scene_width), int(row.scene_height)) for row in whole.itertuples()}


def count_split(table: pd.DataFrame, sizes: dict[str, tuple[int, int]]) -> SplitNumbers:
    """The numbers of one split; ``sizes`` is that of :func:`scene_sizes`."""
    per_tile, area = pixels_of(table), _area(table)
    pixels, labelled = per_tile.sum(axis=0), per_tile.sum(axis=1)
    covered, cut = _covered(table, sizes)
    whole = sum(sizes[scene][0] * sizes[scene][1] for scene in table.scene.unique())
    distances = ground_distances(table)
    return SplitNumbers(
        tiles=len(table),
        scenes=table.scene.nunique(),
        width=(table.width.min(), table.width.max()),
        height=(table.height.min(), table.height.max()),
        pixels=pixels.tolist(),
        shares=(pixels / max(1, pixels.sum())).tolist(),
        shown=(per_tile > 0).sum(axis=0).tolist(),
        labelled=float(labelled.sum() / area.sum()),
        sparse=int((labelled < SPARSE * area).sum()),
        covered=covered / whole,
        repeated=1 - covered / cut,
        ground_distance=(float(distances.min()), float(distances.max())) if len(distances) else None,
    )


def _covered(table: pd.DataFrame, sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Pixels of the scenes that lie in at least one tile, and the same with each tile counted for itself; padding is no pixel."""
    scenes = [shapely.box(0, 0, *sizes[scene]) for scene in table.scene]
    boxes = shapely.intersection(shapely.box(table.col, table.row, table.col + table.width, table.row + table.height), scenes)
    union = sum(shapely.union_all(boxes[rows]).area for rows in table.groupby("scene").indices.values())
    return round(union), round(shapely.area(boxes).sum())


def ground_distances(table: pd.DataFrame) -> np.ndarray:
    """Metres per pixel of every georeferenced tile whose system has known units."""
    found = []
    for crs, tiles in table[table.crs != ""].groupby("crs"):
        a, b, _, d, e, f = np.stack([np.asarray(transform, float) for transform in tiles["transform"]]).T
        if metres := metres_per_unit(crs, float(np.median(f))):
            across, up = np.hypot(a * metres[0], d * metres[1]), np.hypot(b * metres[0], e * metres[1])
            found.append(np.sqrt(across * up))
    return np.concatenate(found) if found else np.zeros(0)


def parse_crs(text: str) -> CRS:
    """A coordinate system from a manifest. Raises DataError when its text means nothing."""
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise DataError(f"{text[:60]!r} is no coordinate system ({error}); cut the tiles again") from None


def metres_per_unit(crs: str, latitude: float) -> tuple[float, float] | None:
    """Length of a unit across and up; of a degree at a latitude, good to a percent. None where the units are not known."""
    parsed = parse_crs(crs)
    if parsed.is_geographic:
        return 111_320 * float(np.cos(np.radians(np.clip(latitude, -89, 89)))), 110_574.0
    try:
        _, factor = parsed.linear_units_factor
    except CRSError:
        return None
    return factor, factor


def compare(splits: dict[str, SplitNumbers], classes: Sequence[str]) -> list[Distance]:
    """Total-variation distance of every two splits: half the sum of the differences of their class shares."""
    found = []
    for (one, a), (other, b) in combinations(splits.items(), 2):
        gaps = np.abs(np.array(a.shares) - b.shares)
        found.append(Distance(splits=(one, other), total_variation=float(gaps.sum() / 2), largest=classes[int(gaps.argmax())]))
    return found


def notes_on(splits: dict[str, SplitNumbers], distances: list[Distance], classes: Sequence[str], train: str, test: str) -> list[Note]:
    """What stands out in the numbers of the splits."""
    notes = []
    for split, so in ((train, "nothing can learn such a class from these tiles"), (test, "scores of such a class are undefined")):
        if split in splits and (missing := [name for name, count in zip(classes, splits[split].pixels, strict=True) if not count]):
            notes.append(Note(kind="missing", text=f"Classes without a pixel in {split}: {listed(missing)}; {so}."))
    for index, name in enumerate(classes):
        rare = {split: numbers for split, numbers in splits.items() if 0 < numbers.shares[index] < RARE}
        if rare:
            parts = [f"{percent(numbers.shares[index])} of {split} ({_tiles(numbers.shown[index])})" for split, numbers in rare.items()]
            notes.append(Note(kind="rare", text=f"{name} is rare: {listed(parts)} of what is labelled."))
    for distance in distances:
        if distance.total_variation > UNLIKE:
            one, other = distance.splits
            at = classes.index(distance.largest)
            text = (
                f"{one} and {other} are of different composition: {percent(distance.total_variation)} of the labelled pixels would have to "
                f"be of another class to make them alike. Most of it is {distance.largest}: {percent(splits[one].shares[at])} of {one}, "
                f"{percent(splits[other].shares[at])} of {other}."
            )
            notes.append(Note(kind="unlike", text=text))
    for split, numbers in splits.items():
        if numbers.sparse:
            text = f"{numbers.sparse} of {_tiles(numbers.tiles)} of {split}: less than {100 * SPARSE:g} % of the pixels are labelled."
            notes.append(Note(kind="sparse", text=text))
    return notes


def _tiles(count: int) -> str:
    return f"{count} tile{'' if count == 1 else 's'}"
