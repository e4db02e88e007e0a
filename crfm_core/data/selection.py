"""A subset of a split's tiles: stratified, few-shot, or a list of the user's; it depends on the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.files import seed_of
from crfm_core.settings import Selection


def select_tiles(tiles: pd.DataFrame, selection: Selection, key: str, classes: list[str]) -> set[str]:
    """The ids of the tiles that ``selection`` keeps of ``tiles`` (columns tile_id and classes, the ids present).

    ``tiles`` and ``fraction`` take the first of an order in which tiles of every set of present classes follow each other at even
    distances, so that the first n show each set in its share, whatever n, and fewer are a part of more. ``n_shot`` goes through the
    classes from the rarest and takes the next tiles in that order that show it until it has n (all, where there are fewer).

    Raises DataError, naming ``key`` of the configuration, when there are fewer tiles than selected, or listed ones are unknown.
    """
    if selection.ids is not None:
        return _listed(tiles, Path(selection.ids), f"{key}.ids")
    order = stratified_order(tiles, selection.seed)
    if selection.n_shot is not None:
        return _n_shot(tiles, order, selection.n_shot, classes)
    count = selection.tiles or max(1, round((selection.fraction or 0) * len(tiles)))
    if count > len(tiles):
        raise DataError(f"{key}.tiles: {count} tiles of {len(tiles)}; select fewer, or leave the selection out to take all")
    return set(tiles.tile_id.iloc[order[:count]])


def rest_of(tiles: pd.DataFrame, taken: set[str], size: int) -> pd.DataFrame:
    """The tiles (columns tile_id, scene, row, col) of ``size`` pixels a side that share no pixel with one whose id is ``taken``."""
    kept = pd.Series(True, tiles.index)
    for _, group in tiles.groupby("scene"):
        places = group[["row", "col"]].to_numpy()
        chosen = places[group.tile_id.isin(taken)]
        kept[group.index] = ~(np.abs(places[:, None] - chosen) < size).all(axis=-1).any(axis=1)
    return tiles[kept].reset_index(drop=True)


def stratified_order(tiles: pd.DataFrame, seed: int) -> np.ndarray:
    """Row numbers of ``tiles`` in the order of :func:`select_tiles`; it depends on ids, classes and seed, not on the rows' order."""
    draws = pd.Series([seed_of(seed, tile_id) for tile_id in tiles.tile_id])
    present = pd.Series([" ".join(map(str, found)) for found in tiles.classes])
    groups = draws.groupby(present.values)
    offset = present.map({text: seed_of(seed, "offset", text) / 2**63 for text in present.unique()})
    place = (groups.rank(method="first") - 1 + offset) / groups.transform("size")
    return pd.DataFrame({"place": place, "draw": draws}).sort_values(["place", "draw"]).index.to_numpy()


def _n_shot(tiles: pd.DataFrame, order: np.ndarray, count: int, classes: list[str]) -> set[str]:
    present = np.zeros((len(tiles), len(classes)), bool)
    for row, found in enumerate(tiles.classes):
        present[row, found] = True
    present = present[order]
    taken = np.zeros(len(tiles), bool)
    for index in np.argsort(present.sum(axis=0), kind="stable"):
        showing = np.nonzero(present[:, index])[0]
        if 0 < len(showing) < count:
            print(f"n_shot: only {len(showing)} tiles show {classes[index]}, fewer than {count}; taking all of them", flush=True)
        lacking = count - int(taken[showing].sum())
        taken[showing[~taken[showing]][: max(0, lacking)]] = True
    return set(tiles.tile_id.iloc[order[taken]])


def _listed(tiles: pd.DataFrame, path: Path, key: str) -> set[str]:
    try:
        listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{key}: there is no {path} (in {Path.cwd()}); give a file with one tile id per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: {path} cannot be read ({error}); give a text file with one tile id per line") from None
    unknown = sorted(set(listed) - set(tiles.tile_id))
    if unknown or not listed:
        some = f"{len(unknown)} of {len(listed)} ids name no labelled tile, such as {', '.join(unknown[:3])}" if listed else "no ids"
        raise DataError(f"{path}: {some}; ids are like {tiles.tile_id.iloc[0]} (scene, row and column of the tile in pixels)")
    return set(listed)
