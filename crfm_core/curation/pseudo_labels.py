"""The critic's labels of unlabelled tiles, of each class the surest (class-balanced self-training, Zou et al., ECCV 2018,
arXiv 1810.07911)."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from crfm_core import DataError
from crfm_core.data.rasters import IGNORE, read_rgb
from crfm_core.files import exclusive, hash_of, inside, remove, require_disk, sha256_of, work_folder, write_bytes
from crfm_core.manifest import in_subfolder, paths_of, read_manifest, write_manifest
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.evaluation import batches_of_one_size, predict_with_doubt, read_ahead
from crfm_core.segmentor.prediction import is_whole, predicted_row, write_prediction
from crfm_core.settings import PSEUDO, Evaluation

#: Steps of a confidence, which fit in uint16, and the doubt from which on all are as sure: 2^-40. Steps are even in the logarithm of the
#: doubt, the probability of all other classes, so that the pixels of a critic that is sure of most can still be told apart.
LEVELS, BITS = 1 << 16, 40

#: Class and confidence of each pixel of a tile: uint8 [H,W], 255 beyond its scene, and uint16 [H,W], in :data:`LEVELS` steps.
Guess = tuple[np.ndarray, np.ndarray]


def levels_of(doubt: np.ndarray) -> np.ndarray:
    """Confidences in :data:`LEVELS` steps, uint16, from the probabilities that a pixel is of another class than the most likely one."""
    bits = -np.log2(np.clip(doubt.astype(np.float64), 2.0**-BITS, 1))
    return np.round(bits / BITS * (LEVELS - 1)).astype(np.uint16)


def confidence_of(levels: np.ndarray) -> np.ndarray:
    """The probabilities of the most likely class that these steps stand for."""
    return 1 - 2.0 ** (-BITS * np.asarray(levels, np.float64) / (LEVELS - 1))


def thresholds_of(histogram: np.ndarray, keep: float) -> np.ndarray:
    """The lowest confidence per class that is kept, int64 [K], so that at least the share ``keep`` of its pixels is.

    ``histogram`` [K,L] counts the pixels predicted as each class by confidence, in L steps from unsure to sure. Pixels as sure as the
    threshold are all kept; ``keep`` 1 keeps every pixel. A class that is predicted nowhere has the threshold L.
    """
    levels, surer = histogram.shape[1], histogram[:, ::-1].cumsum(axis=1)  # pixels at least as sure, from the surest step on
    wanted = [math.ceil(Fraction(str(keep)) * int(row[-1])) for row in surer]  # exact: as floats, 0.07 · 100 is more than 7
    steps = [int(np.searchsorted(row, count)) if count else -1 for row, count in zip(surer, wanted, strict=True)]
    return levels - 1 - np.array(steps, np.int64)


def surest(guess: Guess, thresholds: np.ndarray) -> np.ndarray:
    """The classes of a guess, uint8 [H,W], with 255 where the confidence is below the class's threshold."""
    predicted, confidence = guess
    limits = np.full(IGNORE + 1, LEVELS, np.int64)
    limits[: len(thresholds)] = thresholds
    return np.where(confidence >= limits[predicted], predicted, IGNORE).astype(np.uint8)


def label_tiles(
    checkpoint: Path | str,
    manifest: Path | str,
    root: Path | str,
    out: Path | str,
    work: Path | str,
    keep: float,
    classes: Sequence[str],
    evaluation: Evaluation | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Label the tiles of ``manifest``, which have no labels, by the critic ``checkpoint``: of each class the pixels that it is surest of.

    A pixel's confidence is the probability of its class. Per class, over all tiles, the share ``keep`` of its pixels with the highest
    keeps the label (:func:`thresholds_of`); all others, and what a tile shows beyond its scene, become 255. Labels are rasters like those
    of tiling, in the folder beside ``out`` that has its name; the manifest ``out`` is written last.

    Classes and confidences of all tiles first go to the folder ``work``, three bytes per pixel before compression; then the labels are
    written. Memory holds a histogram and a batch, however many tiles there are. A stopped run continues in either pass.

    Returns the manifest: the tiles' rows with these labels, with ``source`` "pseudo" and ``labelled_by``, the start of the checkpoint's
    hash. Tiles without a labelled pixel are left out. Raises DataError when none is left, or a tile cannot be read, WeightsError for a
    checkpoint that cannot, or is for other classes than ``classes``, ResourceError when the disk is full.
    """
    evaluation, out = evaluation or Evaluation(), Path(out)
    table, folder = read_manifest(manifest, labelled=False), out.with_suffix("")
    images, weights = paths_of(manifest, table, "image", root), sha256_of(checkpoint)
    inside(root, str(out.resolve()))
    names = [in_subfolder(f"{tile_id}{image.suffix}") for tile_id, image in zip(table.tile_id, images, strict=True)]
    paths = [inside(folder, name) for name in names]
    guessed_by = hash_of(weights, evaluation.result_keys(), list(classes), [*zip(table.tile_id, table.digest, strict=True)])
    made_by = hash_of(guessed_by, keep)
    require_disk(folder, 4 * int((table.width.astype(np.int64) * table.height).sum()))
    rows = []
    with work_folder(work, guessed_by) as held:
        guesses = [inside(held, in_subfolder(f"{tile_id}.npz")) for tile_id in table.tile_id]
        _guess_all(checkpoint, table, images, guesses, evaluation, device, classes)
        histogram = _count(guesses, len(classes))
        thresholds = thresholds_of(histogram, keep)
        _print_kept(histogram, thresholds, classes)
        with exclusive(folder):
            _remove_others(folder, {*names, ".lock"})
            for number, path in enumerate(tqdm(paths, desc="labels", unit="tile", disable=None)):
                row = table.iloc[number]
                if not is_whole(path, made_by):
                    label = surest(_read(guesses[number]), thresholds)
                    if (label == IGNORE).all():
                        remove(path)
                        continue
                    write_prediction(path, label, row, {"made_by": made_by, "checkpoint": weights[:12]})
                entry = predicted_row(row, images[number], path, manifest, out)
                rows.append(entry | {"source": PSEUDO, "labelled_by": weights[:12]})
            if not rows:
                raise DataError(
                    f"{out}: no pixel of the {len(table)} tiles of {manifest} has a label; give unlabelled scenes with a picture"
                )
            print(f"{len(rows)} of {len(table)} tiles have a labelled pixel", flush=True)
            return write_manifest(out, rows)


def _guess_all(
    checkpoint: Path | str,
    table: pd.DataFrame,
    images: Sequence[Path],
    guesses: Sequence[Path],
    evaluation: Evaluation,
    device: str,
    classes: Sequence[str],
) -> None:
    """Write the guess of every tile that an earlier try has not left."""
    missing = [number for number, path in enumerate(guesses) if not _is_readable(path)]
    print(f"{len(table)} tiles, {len(table) - len(missing)} of them predicted already", flush=True)
    if not missing:
        return
    critic = load_critic(checkpoint, device, classes)
    batches = read_ahead(batches_of_one_size(((number, read_rgb(images[number])) for number in missing), evaluation.batch_size))
    with tqdm(total=len(missing), desc="tiles", unit="tile", disable=None) as progress:
        for numbers, pictures in batches:
            for number, predicted, doubt in zip(numbers, *predict_with_doubt(critic, pictures, evaluation), strict=True):
                row = table.iloc[number]
                predicted[int(row.get("inner_height", len(predicted))) :] = IGNORE
                predicted[:, int(row.get("inner_width", predicted.shape[1])) :] = IGNORE
                if row.get("nodata", 0):  # tiling leaves black what has no picture
                    predicted[(pictures[numbers.index(number)] == 0).all(axis=-1)] = IGNORE
                _write(guesses[number], (predicted, levels_of(doubt)))
            progress.update(len(numbers))


def _write(path: Path, guess: Guess) -> None:
    np.savez_compressed(buffer := io.BytesIO(), predicted=guess[0], confidence=guess[1])
    write_bytes(path, buffer.getvalue())


def _read(path: Path) -> Guess:
    with np.load(path) as arrays:
        return arrays["predicted"], arrays["confidence"]


def _is_readable(path: Path) -> bool:
    """Whether an earlier try left a whole guess: a machine that stops may leave an empty file."""
    try:
        return path.is_file() and bool(_read(path))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return False


def _count(guesses: Sequence[Path], num_classes: int) -> np.ndarray:
    """The histogram [K, LEVELS] of all guesses."""
    histogram = np.zeros(num_classes * LEVELS, np.int64)
    for path in guesses:
        predicted, confidence = _read(path)
        shown = predicted != IGNORE
        codes, counts = np.unique(predicted[shown].astype(np.int64) * LEVELS + confidence[shown], return_counts=True)
        histogram[codes] += counts
    return histogram.reshape(num_classes, LEVELS)


def _print_kept(histogram: np.ndarray, thresholds: np.ndarray, classes: Sequence[str]) -> None:
    """Print for each class how many pixels were predicted, the threshold, and how many keep their label."""
    predicted = histogram.sum(axis=1)
    kept = np.array([row[threshold:].sum() for row, threshold in zip(histogram, thresholds, strict=True)])
    shown = np.where(predicted > 0, confidence_of(thresholds), np.nan)
    counts = pd.DataFrame({"class": list(classes), "pixels": predicted, "threshold": shown, "kept": kept})
    print(counts.to_string(index=False, na_rep="–", float_format="%.4f"), flush=True)


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """Remove labels of tiles that are gone, and fragments that a killed run left."""
    for path in folder.rglob("*"):
        if not path.is_dir() and str(path.relative_to(folder)) not in wanted:
            remove(path)
