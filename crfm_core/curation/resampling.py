"""Which synthetic tiles are used how often: more versions of hard masks (FreeMask), or those that show rare classes (TISynth)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.curation.selection import keep_rows
from crfm_core.files import hash_of
from crfm_core.manifest import check_paths, read_manifest
from crfm_core.settings import AnyResampling, RareResampling


def resample(
    manifest: Path | str,
    tiles: Path | str,
    class_losses: Sequence[float | None],
    settings: AnyResampling,
    classes: Sequence[str],
    out: Path | str,
    root: Path | str | None = None,
) -> pd.DataFrame:
    """Write the manifest ``out`` with those rows of a manifest of synthetic tiles that ``settings`` keep.

    Images and labels stay where they are and, with ``root``, must be there, below it; the column ``corrections``, most of a manifest's
    size, is left out. By hardness, the new column ``hardness`` is that of the tile's mask, before any filter (NaN where it has none).

    Args:
        manifest: synthetic tiles, filtered or not.
        tiles: the manifest of the tiles whose masks were used (column ``mask_of``), with their pixels before any filter.
        class_losses: the critic's mean loss per class on real tiles, None for a class that they lack.
        root: where it is given, files of rows must be there and below it.

    Raises DataError when no tile is kept, or when there is nothing to choose by.
    """
    if len(class_losses) != len(classes):
        raise DataError(f"{len(class_losses)} class losses for {len(classes)} classes; compute them with a critic of these classes")
    table = read_manifest(manifest, without="corrections")
    if root is not None:
        check_paths(manifest, table, root)
    if settings.kind == "hardness":
        table["hardness"] = _hardness_of_masks(table, manifest, tiles, class_losses)
        chosen, remedy = by_hardness(table, settings.seed), "use another re-sampling"
        _print_versions(table, chosen)
    else:
        rare = _rare_classes(class_losses, settings, classes)
        print(f"poorly segmented: {', '.join(classes[c] for c in rare)}", flush=True)
        if "kept" not in table:
            raise DataError(
                f"{manifest}: no pixel filter went before (there is no column kept), so a re-sampling of kind rare would keep every image; "
                "give the recipe a filter of kind pixel, or one after such a filter"
            )
        chosen = by_rare_class(table, rare, settings.min_pixels, settings.survival)
        remedy = "lower the re-sampling's min_pixels or survival, or raise the margin of the filter"
    return keep_rows(manifest, table, chosen, out, classes, remedy)


def hardness_of(pixels: Sequence[int], class_losses: Sequence[float | None]) -> float:
    """Mean of the class losses over a mask's pixels; classes without a loss do not count. NaN when no other is there."""
    known = [(count, loss) for count, loss in zip(pixels, class_losses, strict=True) if loss is not None]
    total = sum(count for count, _ in known)
    return sum(count * loss for count, loss in known) / total if total else math.nan


def versions_kept(rank: int, masks: int, most: int) -> int:
    """How many of at most ``most`` versions the mask of this rank keeps, the easiest of all ``masks`` having rank 0 (FreeMask)."""
    return min(1 + round(Fraction((rank + 1) * most, masks)), most)


def by_hardness(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Which rows stay, bool [N]: the harder a mask among all, the more of its versions, drawn by ``seed`` and id, wherever they stand.

    Columns ``mask_of`` and ``hardness``; masks without hardness rank as the easiest, equally hard ones in an order drawn by ``seed``.
    """
    versions: dict[str, list[int]] = {}
    drawn, masks = [hash_of("version", seed, tile_id) for tile_id in table.tile_id], list(table.mask_of)
    for row in sorted(range(len(table)), key=drawn.__getitem__):
        versions.setdefault(masks[row], []).append(row)
    hardness = dict(zip(table.mask_of, table.hardness.fillna(-math.inf), strict=True))
    ranked = sorted(versions, key=lambda mask: (hardness[mask], hash_of("mask", seed, mask)))
    most = max(map(len, versions.values()))
    chosen = np.zeros(len(table), dtype=bool)
    for rank, mask in enumerate(ranked):
        chosen[versions[mask][: versions_kept(rank, len(ranked), most)]] = True
    return chosen


def by_rare_class(table: pd.DataFrame, rare: Sequence[int], min_pixels: int, survival: float) -> np.ndarray:
    """Which rows stay, bool [N]: those with at least ``min_pixels`` pixels of one of the ``rare`` classes, or of whose labelled pixels
    more than the share ``survival`` went through the filter (column ``kept``). Tiles without any labelled pixel do not."""
    pixels = np.array(list(table.pixels))
    shows = (pixels[:, list(rare)] >= min_pixels).any(axis=1)
    survived = (table.kept.to_numpy() > survival) & (pixels.sum(axis=1) > 0)
    only = int((survived & ~shows).sum())
    print(f"{int(shows.sum())} tiles show a poorly segmented class, {only} others came through the filter", flush=True)
    return shows | survived


def _hardness_of_masks(table: pd.DataFrame, manifest: Path | str, tiles: Path | str, class_losses: Sequence[float | None]) -> list[float]:
    """The hardness of each row's mask."""
    if "mask_of" not in table:
        raise DataError(f"{manifest}: no column mask_of, which names the tile whose mask was used; give synthetic tiles")
    masks = read_manifest(tiles)
    known = {tile_id: hardness_of(pixels, class_losses) for tile_id, pixels in zip(masks.tile_id, masks.pixels, strict=True)}
    if foreign := sorted(set(table.mask_of) - known.keys()):
        raise DataError(f"{manifest}: mask_of names {foreign[0]}, which is no tile of {tiles}; give the tiles whose masks were used")
    hardness = [known[mask] for mask in table.mask_of]
    if unknown := sorted({mask for mask, value in zip(table.mask_of, hardness, strict=True) if math.isnan(value)}):
        print(f"{len(unknown)} masks have no class with a mean loss and rank as the easiest, first {unknown[0]}", flush=True)
    if all(map(math.isnan, hardness)):
        raise DataError(f"{tiles}: no mask has a class with a mean loss on real tiles; measure the losses on a split that has the classes")
    return hardness


def _rare_classes(class_losses: Sequence[float | None], settings: RareResampling, classes: Sequence[str]) -> list[int]:
    """Ids of the classes that count as poorly segmented: the named ones, or the worst by their loss."""
    if settings.classes:
        return [list(classes).index(name) for name in settings.classes]
    known = [c for c, loss in enumerate(class_losses) if loss is not None]
    if not known:
        raise DataError("no class has a mean loss on real tiles, so none is the worst; name some: classes of the re-sampling")
    return sorted(known, key=lambda c: (-class_losses[c], c))[: settings.worst]


def _print_versions(table: pd.DataFrame, chosen: np.ndarray) -> None:
    masks = Counter(table.mask_of[chosen].value_counts())
    for versions, count in sorted(masks.items()):
        print(f"{count} masks keep {versions} of their versions", flush=True)
