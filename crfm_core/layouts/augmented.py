"""Training masks turned, zoomed, and with connected pieces of other masks pasted in, so that class shares approach a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from crfm_core.data.rasters import IGNORE, read_label
from crfm_core.files import hash_of, seed_of
from crfm_core.layouts.sources import LabelledTiles, LayoutSources, count_pixels, mask_row
from crfm_core.settings import AugmentedLayouts

#: Masks that are kept in memory.
MASKS_HELD = 256
#: Zooms, masks with a piece of a class and places for it that are tried, at most.
TRIES = 8


def draw(settings: AugmentedLayouts, sources: LayoutSources, out: Path, count: int) -> Iterator[dict]:
    """Rows of the manifest ``out``; their masks are written to the folder beside it that has its name.

    With ``shares`` a training mask is drawn by how much of the classes it shows that are still too rare, and so is the class of each
    piece; otherwise every mask is taken once before any is taken again. A mask is no real place: it has no coordinates.
    """
    tiles, target = LabelledTiles.read(sources.tiles, sources, sources.remedy(settings)), None
    if settings.shares is not None:
        target = target_shares(settings.shares, sources.classes, tiles.pixels.sum(axis=0))
    masks = lru_cache(MASKS_HELD)(lambda tile: read_label(tiles.labels[tile]))
    counts = np.zeros(len(sources.classes), dtype=np.int64)
    bases, used = _every_tile_in_turn(list(tiles.table.tile_id), settings.seed), [0] * len(tiles)
    for index in range(count):
        rng = np.random.default_rng(seed_of("layout", settings.seed, sources.name, index))
        missing = None if target is None else deficits(target, counts)
        base = next(bases) if missing is None else _base_for(missing, tiles.pixels, rng)
        mask, pieces = _changed(settings, masks(base), missing, rng), 0
        for _ in range(int(rng.integers(settings.paste + 1)) if target is None else settings.paste):
            if target is not None:
                missing = deficits(target, counts + count_pixels(mask, len(counts)))
            piece = _piece(settings, missing, tiles.pixels, base, masks, rng)
            pieces += piece is not None and paste(mask, *piece, rng, missing)
        counts += count_pixels(mask, len(counts))
        yield mask_row(tiles, base, used[base], mask, sources, out, pieces=pieces)
        used[base] += 1


def _changed(settings: AugmentedLayouts, mask: np.ndarray, missing: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """A copy of a mask, zoomed and turned; not zoomed where no labelled pixel would be left.

    Where pixels of classes are ``missing``, [K], it is of some zooms the one that shows most of those.
    """
    values = np.zeros(256)
    values[: IGNORE if missing is None else len(missing)] = 1 if missing is None else missing
    most = 0.0
    best = mask
    for _ in range(TRIES):
        changed = zoomed(mask, rng.uniform(*np.log(settings.scale)), rng)
        if (shown := values[changed].mean()) > most:
            best, most = changed, shown
            if missing is None:
                break
    return (turned(best, rng) if settings.turn else best).copy()


def target_shares(shares: str | dict[str, float], classes: Sequence[str], pixels: np.ndarray) -> np.ndarray:
    """Wanted shares, float [K], adding up to 1, of classes with so many ``pixels`` [K] in the training tiles.

    Classes that no tile shows are wanted nowhere; those that ``shares`` does not name share the rest as they do in the training tiles.
    """
    shown = pixels > 0
    if isinstance(shares, str):
        return shown / shown.sum()
    named = np.array([shares.get(name, 0.0) for name in classes]) * shown
    others = np.where(named > 0, 0, pixels)
    wanted = named + (max(0.0, 1 - named.sum()) * others / others.sum() if others.sum() else 0)
    return wanted / wanted.sum()


def deficits(target: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pixels of each class, float [K], that are missing from its share of all pixels there are; 0 where there are enough."""
    return np.maximum(0, target * counts.sum() - counts)


def zoomed(mask: np.ndarray, logarithm: float, rng: np.random.Generator) -> np.ndarray:
    """A mask [H,W] enlarged exp(``logarithm``) times by nearest neighbours, in its old size at a random place: a larger one is cropped, a
    smaller one goes on mirrored at its borders."""
    zoom = float(np.exp(logarithm))
    if zoom == 1:
        return mask
    places = []
    for side in mask.shape:
        length = max(1, round(side * zoom))
        first = int(rng.integers(abs(length - side) + 1)) * (1 if length > side else -1)
        within = np.arange(first, first + side) % (2 * length)
        mirrored = np.where(within < length, within, 2 * length - 1 - within)
        places.append(np.minimum(((mirrored + 0.5) * side / length).astype(int), side - 1))
    return mask[np.ix_(*places)]


def turned(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An array [H,W] in one of its eight positions; in one of four that keep its shape where it is no square."""
    quarters = int(rng.integers(4)) if array.shape[0] == array.shape[1] else 2 * int(rng.integers(2))
    array = np.rot90(array, quarters)
    return np.fliplr(array) if rng.integers(2) else array


def pieces_of(mask: np.ndarray, wanted: int, least: int) -> list[np.ndarray]:
    """The connected pieces of a class in a mask, bool [h,w] each, of at least ``least`` pixels."""
    labelled, _ = ndimage.label(mask == wanted)
    sizes = np.bincount(labelled.ravel())
    boxes = ndimage.find_objects(labelled)
    return [labelled[box] == number for number, box in enumerate(boxes, start=1) if sizes[number] >= least]


def paste(mask: np.ndarray, piece: np.ndarray, wanted: int, rng: np.random.Generator, missing: np.ndarray | None = None) -> bool:
    """Write a class into a mask [H,W] where a piece [h,w] of it lies at a random place, but for ignored pixels.

    Where pixels of classes are ``missing``, [K], it is of some random places the one that hides least of those. A piece that is larger than
    the mask is cropped. Returns whether any pixel was written.
    """
    piece = piece[: mask.shape[0], : mask.shape[1]]
    values = np.zeros(256)
    if missing is not None:
        values[: len(missing)] = missing
        values[IGNORE] = missing[wanted]  # as little is gained there as on the class itself
    best, least = mask[:0, :0], np.inf
    for _ in range(1 if missing is None else TRIES):
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(mask.shape, piece.shape, strict=True))
        window = mask[top : top + piece.shape[0], left : left + piece.shape[1]]
        if (hidden := values[window[piece]].sum()) < least:
            best, least = window, hidden
    where = piece & (best != IGNORE)
    best[where] = wanted
    return bool(where.any())


def _every_tile_in_turn(ids: list[str], seed: int) -> Iterator[int]:
    """All tiles in an order drawn from the seed, then all of them in another one, without end."""
    turn = 0
    while True:
        yield from sorted(range(len(ids)), key=lambda tile: hash_of("layout", seed, turn, ids[tile]))
        turn += 1


def _base_for(missing: np.ndarray, pixels: np.ndarray, rng: np.random.Generator) -> int:
    """A tile drawn by the share of its pixels [N,K] that are of classes of which pixels are ``missing``, [K]; any where none are."""
    base = _drawn(pixels @ missing / pixels.sum(axis=1), rng)
    return int(rng.integers(len(pixels))) if base is None else base


def _piece(
    settings: AugmentedLayouts,
    missing: np.ndarray | None,
    pixels: np.ndarray,
    base: int,
    masks: Callable[[int], np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, int] | None:
    """A piece, bool [h,w], of another mask than the ``base``'s, and its class; None where those that were looked at have none.

    Where pixels of classes are ``missing``, [K], the class is drawn by them, mask and piece by their pixels of it: large ones are likelier.
    Otherwise all masks, their classes and pieces are equally likely.
    """
    large = np.where(pixels >= settings.min_piece, pixels, 0)
    large[base] = 0
    for _ in range(TRIES):
        if missing is None:
            donor = _drawn(large.any(axis=1).astype(int), rng)
            wanted = None if donor is None else _drawn((large[donor] > 0).astype(int), rng)
        else:
            wanted = _drawn(large.any(axis=0) * missing, rng)
            donor = None if wanted is None else _drawn(large[:, wanted], rng)
        if donor is None or wanted is None:
            return None
        found = pieces_of(masks(donor), wanted, settings.min_piece)
        chosen = _drawn(np.array([1 if missing is None else piece.sum() for piece in found]), rng)
        if chosen is not None:
            piece = found[chosen]
            return (_any_position(piece, rng) if settings.turn else piece), wanted
        large[donor, wanted] = 0  # it has only smaller pieces
    return None


def _drawn(weights: np.ndarray, rng: np.random.Generator) -> int | None:
    """An index drawn by these weights; None where all are 0."""
    return int(rng.choice(len(weights), p=weights / weights.sum())) if weights.any() else None


def _any_position(piece: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    piece = np.rot90(piece, int(rng.integers(4)))
    return np.fliplr(piece) if rng.integers(2) else piece
