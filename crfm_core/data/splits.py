"""Splits that share no ground: how scenes, groups and blocks are assigned to splits, and the check that no tile is in two."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from rasterio.warp import transform as reproject

from crfm_core import DataError
from crfm_core.data.grid import Grid, grid_of
from crfm_core.data.rasters import GDAL_FAULTS, open_raster
from crfm_core.files import hash_of
from crfm_core.manifest import read_manifest
from crfm_core.settings import UNLABELLED, BlockSplit, Dataset

Region = tuple[int, int, int, int]  #: row, column, height, width in pixels of a scene's grid


def assign(sizes: dict, shares: dict[str, float], seed: int) -> dict:
    """Assign each key of ``sizes`` to a split: in an order drawn by the seed, each to the split that lacks most of its share of the sum.

    No split stays empty. Raises DataError when there are fewer keys than splits.
    """
    if len(sizes) < len(shares):
        raise DataError(f"split: {len(sizes)} groups or blocks for {len(shares)} splits; make them smaller, or name the splits' files")
    lacking = {split: share / sum(shares.values()) * sum(sizes.values()) for split, share in shares.items()}
    order = sorted(sizes, key=lambda key: hash_of(seed, key))
    assigned: dict = {}
    for index, key in enumerate(order):
        empty = [split for split in shares if split not in assigned.values()]
        candidates = empty if len(order) - index == len(empty) else list(shares)
        assigned[key] = max(candidates, key=lambda split: lacking[split])
        lacking[assigned[key]] -= sizes[key]
    return assigned


def regions_of(scenes: pd.DataFrame, dataset: Dataset, split: str) -> dict[str, list[Region] | None]:
    """The scenes of a split, each with the regions of it that belong to the split; None: all of it."""
    if split == UNLABELLED or not isinstance(dataset.split, BlockSplit):
        return dict.fromkeys(scenes.scene[scenes.split == split])
    grids = {}
    for row in scenes[scenes.split != UNLABELLED].itertuples():
        with open_raster(row.image) as picture:
            grids[row.scene] = grid_of(picture, dataset.tile.ground_distance)
    return {scene: regions for scene, regions in block_regions(grids, dataset.split, split).items() if regions}


def block_regions(grids: dict[str, Grid], settings: BlockSplit, split: str) -> dict[str, list[Region]]:
    """The regions of each scene that lie in blocks of ``split``, without the buffer beside blocks of other splits.

    Georeferenced scenes of one CRS share their blocks, so that ground which two of them show is in one split; any other scene has its
    own. The ground that scenes span is cut into equal blocks of at least ``settings.block`` a side, in pixels of the first scene.
    Raises DataError for a scene whose rows do not run east.
    """
    regions: dict[str, list[Region]] = {scene: [] for scene in grids}
    lattices = _lattices(grids, settings.block)
    sizes: dict[tuple, float] = defaultdict(float)
    meets: dict[tuple, list[str]] = defaultdict(list)
    for key, (rows, cols, members) in lattices.items():
        for scene, member in members.items():
            for i, j, area in _shares_of(member, rows, cols):
                sizes[key, i, j] += area
                meets[key, i, j].append(scene)
    assigned = assign(sizes, settings.shares, settings.seed)
    half = settings.buffer / 2
    for (key, i, j), owner in assigned.items():
        if owner != split:
            continue
        rows, cols, members = lattices[key]
        foreign = np.array([[assigned.get((key, p, q), split) != split for q in (j - 1, j, j + 1)] for p in (i - 1, i, i + 1)])
        low = rows[i] + half * foreign[0].any(), cols[j] + half * foreign[:, 0].any()
        high = rows[i + 1] - half * foreign[2].any(), cols[j + 1] - half * foreign[:, 2].any()
        for scene in meets[key, i, j]:
            top, left, scale, grid = members[scene]
            # inwards to whole pixels, up to rounding errors
            r0, c0 = (max(0, int(np.ceil((edge - start) / scale - 1e-6))) for edge, start in zip(low, (top, left), strict=True))
            r1, c1 = (int(np.floor((edge - start) / scale + 1e-6)) for edge, start in zip(high, (top, left), strict=True))
            r1, c1 = min(grid.height, r1), min(grid.width, c1)
            if r1 > r0 and c1 > c0:
                regions[scene].append((r0, c0, r1 - r0, c1 - c0))
    return regions


def _shares_of(member: tuple, rows: np.ndarray, cols: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The blocks that a scene has ground in, by row and column, and its area there."""
    top, left, scale, grid = member
    sides = []
    for edges, low, length in ((rows, top, grid.height), (cols, left, grid.width)):
        high = low + length * scale
        first = max(0, int(np.searchsorted(edges, low, "right")) - 1)
        last = min(len(edges) - 1, int(np.searchsorted(edges, high, "left")))
        sides.append([(index, max(0.0, min(edges[index + 1], high) - max(edges[index], low))) for index in range(first, last)])
    for (i, height), (j, width) in product(*sides):
        yield i, j, float(height * width)


def _lattices(grids: dict[str, Grid], block: int) -> dict[str, tuple[np.ndarray, np.ndarray, dict]]:
    """Per CRS, or per scene without one: row and column edges of the blocks, and each member's (top, left, pixel side, grid).

    All are in pixels of the first member, from the corner of the ground that the members span.
    """
    together: dict[str, dict[str, Grid]] = defaultdict(dict)
    for scene, grid in grids.items():
        if not grid.is_north_up:
            raise DataError(
                f"scene {scene}: its grid is turned or mirrored, and blocks need rows that run east and columns that run south; "
                "warp it (gdalwarp), or split by group"
            )
        together[grid.crs or f"scene {scene}"][scene] = grid
    lattices = {}
    for key, found in together.items():
        first = next(iter(found.values())).transform
        west, north = min(grid.transform.c for grid in found.values()), max(grid.transform.f for grid in found.values())
        members = {}
        for scene, grid in found.items():
            t = grid.transform
            if not np.isclose(t.a / first.a, t.e / first.e, rtol=1e-6):
                raise DataError(f"scene {scene}: its pixels have other proportions than those of the first scene; set tile.ground_distance")
            members[scene] = ((t.f - north) / first.e, (t.c - west) / first.a, t.a / first.a, grid)
        height = max(top + grid.height * scale for top, _, scale, grid in members.values())
        width = max(left + grid.width * scale for _, left, scale, grid in members.values())
        rows, cols = (np.round(np.linspace(0, side, max(1, int(side // block)) + 1)) for side in (height, width))
        lattices[key] = rows, cols, members
    return lattices


def check_disjoint(manifests: list[Path | str], train: str | None = None) -> None:
    """Raise DataError, naming both tiles, when two tile manifests share a tile.

    Tiles are shared when they have the same id and scene, the same files (digest) or pixels (image_digest), or overlapping footprints
    on the ground, in whatever CRS; touching edges are allowed. Unlabelled tiles may be shared with the split ``train``: scenes that are
    labelled in part are often listed as both.
    """
    tables = [read_manifest(path, labelled=False) for path in manifests]
    for (path_a, a), (path_b, b) in combinations(zip(manifests, tables, strict=True), 2):
        if {*a.split, *b.split} == {train, UNLABELLED}:
            continue
        # Tiles of one colour, such as water that scaling makes black, look the same anywhere.
        shown_a, shown_b = (table[~table.get("uniform", pd.Series(False, table.index)).astype(bool)] for table in (a, b))
        found = (
            _same(a, b, ["tile_id", "scene"], "the same tile")
            or _same(shown_a, shown_b, ["digest"], "identical files")
            or ({"image_digest"} <= set(a) & set(b) and _same(shown_a, shown_b, ["image_digest"], "identical images"))
            or _overlapping(a, b)
        )
        if found:
            how, one, other = found
            raise DataError(
                f"{path_a}: tile {one} and {path_b}: tile {other} are {how}; splits must not share ground:"
                " move the scene to one split or leave it out, or split by blocks"
            )


def _same(a: pd.DataFrame, b: pd.DataFrame, columns: list[str], how: str) -> tuple[str, str, str] | None:
    keys_a, keys_b = pd.MultiIndex.from_frame(a[columns]), pd.MultiIndex.from_frame(b[columns])
    shared = np.nonzero(keys_b.isin(keys_a))[0]
    if not len(shared):
        return None
    first = np.nonzero(keys_a == keys_b[shared[0]])[0][0]
    return how, a.tile_id.iloc[first], b.tile_id.iloc[shared[0]]


def _overlapping(a: pd.DataFrame, b: pd.DataFrame) -> tuple[str, str, str] | None:
    """The first pair of tiles whose footprints overlap by more than a rounding error."""
    a, b = a[a.crs != ""], b[b.crs != ""]
    if a.empty or b.empty:
        return None
    for ours, theirs in _in_common_crs(a, b):
        one, other = shapely.STRtree(ours.footprint.to_numpy()).query(theirs.footprint.to_numpy(), predicate="intersects")[::-1]
        if len(one):
            first = np.lexsort((one, other))[0]
            return "overlapping on the ground", ours.tile_id.iloc[one[first]], theirs.tile_id.iloc[other[first]]
    return None


def _in_common_crs(a: pd.DataFrame, b: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Footprints of both tables: in the first one's CRS, or CRS by CRS if PROJ does not know one, such as a local engineering CRS."""
    target, corners = a.crs.iloc[0], [ground_corners(table) for table in (a, b)]
    try:
        for table, quads in zip((a, b), corners, strict=True):
            for crs in set(table.crs) - {target}:
                chosen = (table.crs == crs).to_numpy()
                xs, ys = reproject(crs, target, *quads[chosen].reshape(-1, 2).T)
                quads[chosen] = np.stack([xs, ys], -1).reshape(-1, 4, 2)
    except GDAL_FAULTS:
        for crs in sorted(set(a.crs) & set(b.crs)):
            yield tuple(_footprints(table[table.crs == crs], ground_corners(table[table.crs == crs])) for table in (a, b))
        return
    yield tuple(_footprints(table, quads) for table, quads in zip((a, b), corners, strict=True))


def _footprints(table: pd.DataFrame, quads: np.ndarray) -> pd.DataFrame:
    """The table's tiles with their polygons, slightly shrunk so that neighbours do not touch; without those that the CRS cannot hold."""
    near = np.isfinite(quads).all(axis=(1, 2))
    quads, middle = quads[near], quads[near].mean(axis=1, keepdims=True)
    return table[near].assign(footprint=shapely.polygons(middle + (quads - middle) * (1 - 2e-4)))


def ground_corners(table: pd.DataFrame) -> np.ndarray:
    """Ground corners of the tiles without padding, in turn, [n, 4, 2]."""
    a, b, c, d, e, f = np.stack([np.asarray(t, float) for t in table["transform"]]).T[..., None]
    col = table.get("inner_width", table.width).to_numpy()[:, None] * np.array([0, 1, 1, 0])
    row = table.get("inner_height", table.height).to_numpy()[:, None] * np.array([0, 0, 1, 1])
    return np.stack([a * col + b * row + c, d * col + e * row + f], -1)
