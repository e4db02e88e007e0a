"""Splits that share no ground: what is scored must not have been trained on."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.manifest import read_manifest


def check_disjoint(manifests: list[Path | str]) -> None:
    """Raise DataError, naming both tiles, when two tile manifests share a tile.

    Tiles are shared when they have the same id and scene, the same files (digest), or overlapping footprints in the same CRS;
    touching edges are allowed.
    """
    tables = [read_manifest(path) for path in manifests]
    for (path_a, a), (path_b, b) in combinations(zip(manifests, tables, strict=True), 2):
        found = _same(a, b, ["tile_id", "scene"], "the same tile") or _same(a, b, ["digest"], "identical files") or _overlap(a, b)
        if found:
            how, one, other = found
            raise DataError(
                f"{path_a}: tile {one} and {path_b}: tile {other} are {how}; splits must not share ground:"
                " move the scene to one split or leave it out"
            )


def _same(a: pd.DataFrame, b: pd.DataFrame, columns: list[str], how: str) -> tuple[str, str, str] | None:
    keys_a, keys_b = pd.MultiIndex.from_frame(a[columns]), pd.MultiIndex.from_frame(b[columns])
    shared = np.nonzero(keys_b.isin(keys_a))[0]
    if not len(shared):
        return None
    first = np.nonzero(keys_a == keys_b[shared[0]])[0][0]
    return how, a.tile_id.iloc[first], b.tile_id.iloc[shared[0]]


def _overlap(a: pd.DataFrame, b: pd.DataFrame) -> tuple[str, str, str] | None:
    for crs in sorted(set(a.crs) & set(b.crs) - {""}):
        ours, theirs = a[a.crs == crs], b[b.crs == crs]
        corners_a, corners_b = _corners(ours), _corners(theirs)
        low, high = corners_a.min(1), corners_a.max(1)
        for index, quad in enumerate(corners_b):
            near = np.nonzero(((low < quad.max(0)) & (high > quad.min(0))).all(1))[0]
            for other in near:
                if _intersect(corners_a[other], quad):
                    return "overlapping on the ground", ours.tile_id.iloc[other], theirs.tile_id.iloc[index]
    return None


def _corners(table: pd.DataFrame) -> np.ndarray:
    """Ground corners of tiles in turn, [n, 4, 2]."""
    a, b, c, d, e, f = np.stack([np.asarray(t, float) for t in table["transform"]]).T[..., None]
    col = table.width.to_numpy()[:, None] * np.array([0, 1, 1, 0])
    row = table.height.to_numpy()[:, None] * np.array([0, 0, 1, 1])
    return np.stack([a * col + b * row + c, d * col + e * row + f], -1)


def _intersect(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two parallelograms [4,2] share more than a rounding error: no side of either separates them."""
    for quad in (one, other):
        for side in (quad[1] - quad[0], quad[3] - quad[0]):
            normal = np.array([-side[1], side[0]]) / np.hypot(*side)
            p, q = one @ normal, other @ normal
            tolerance = 1e-4 * np.hypot(*side)  # a hundredth of a pixel or so
            if p.max() <= q.min() + tolerance or q.max() <= p.min() + tolerance:
                return False
    return True
