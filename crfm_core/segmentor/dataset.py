"""What a segmentor is trained on: which tiles are drawn, how each is augmented, and the weights of the classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from crfm_core import ConfigError, DataError, ResourceError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.files import seed_of, write_bytes
from crfm_core.manifest import paths_of

#: Tiles are kept in memory when all of them together are smaller than this.
CACHE_BYTES = 2 << 30


class Draw(NamedTuple):
    """The ``number``-th sample of a training run and the manifest row it shows."""

    number: int
    row: int


class WeightedDraws(torch.utils.data.Sampler):
    """An endless sequence of draws that depends on the seed and the weights only; ``start`` skips what was drawn already.

    In rounds of N = ceil(Σw / min w): each row comes up floor or ceil of N·w/Σw times per round (systematic sampling), in random
    order. With equal weights a round is a shuffled epoch. Where several processes share batches of ``batch_size``, each gets the draws
    at its ``positions`` in them.
    """

    def __init__(self, weights: np.ndarray, seed: int, start: int = 0, batch_size: int = 1, positions: range = range(1)):
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise DataError("weights in the manifest must be finite, not negative, and not all zero; build the mix again")
        self.edges = np.cumsum(weights / weights.sum())
        self.round = math.ceil(round(weights.sum() / weights[weights > 0].min(), 6))
        self.seed, self.start = seed, start
        self.batch_size, self.positions = batch_size, positions

    def __len__(self) -> int:
        return self.round  # mmengine reads the length of an epoch when it builds schedules

    def __iter__(self) -> Iterator[Draw]:
        for number in itertools.count(self.start):
            rounds, position = divmod(number, self.round)
            if position == 0 or number == self.start:
                order = self._order(rounds)
            if number % self.batch_size in self.positions:
                yield Draw(number, int(order[position]))

    def _order(self, rounds: int) -> np.ndarray:
        """The rows [N] of the round that follows ``rounds`` others, in the order of their draws."""
        rng = np.random.default_rng(seed_of("draws", self.seed, rounds))
        points = (np.arange(self.round) + rng.random()) / self.round
        # A point on the far side of the last edge by rounding belongs to the last row that has any weight.
        rows = np.minimum(np.searchsorted(self.edges, points, side="right"), np.searchsorted(self.edges, self.edges[-1]))
        return rng.permutation(rows)


class Tiles(torch.utils.data.Dataset):
    """Tiles of a manifest, augmented by their draw: {"image": float [3,H,W] in 0...255, "label": int64 [H,W]}.

    Args:
        manifest, table: the manifest's file and its rows.
        root: folder that all images lie in.
        copies: folder on a near disk. Tiles that memory does not hold are copied there when they are first drawn, and read there from then
            on; when its disk is full the others are read where they are.

    Raises DataError for a tile that cannot be read or does not fit the classes.
    """

    metainfo: dict[str, Any]  #: classes and palette, as mmengine's datasets have it

    def __init__(
        self, manifest: Path | str, table: pd.DataFrame, root: Path | str, num_classes: int, seed: int, copies: Path | None = None
    ):
        self.images, self.labels = (paths_of(manifest, table, column, root) for column in ("image", "label"))
        self.num_classes, self.seed, self.copies = num_classes, seed, copies
        self.cached = 4 * int((table.width * table.height).sum()) <= CACHE_BYTES
        self.cache = [self._read(row) for row in range(len(table))] if self.cached else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> dict:
        image, label = augment(*self.pixels(draw.row), np.random.default_rng(seed_of("augment", self.seed, draw.number)))
        return {"image": torch.from_numpy(image).permute(2, 0, 1), "label": torch.from_numpy(label).long()}

    def pixels(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H,W,3] and label uint8 [H,W] as they are. Raises DataError when they do not fit each other or the classes."""
        return self.cache[row] if self.cached else self._read(row)

    def _read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = read_rgb(self._copy_of(self.images[row])), read_label(self._copy_of(self.labels[row]))
        if image.shape[:2] != label.shape:
            raise DataError(f"{self.labels[row]}: size {label.shape} differs from that of its image {image.shape[:2]}")
        highest = int(label[label != 255].max(initial=0))
        if highest >= self.num_classes:
            raise DataError(f"{self.labels[row]}: class id {highest}; the dataset has the ids 0...{self.num_classes - 1} (255 = ignored)")
        return image, label

    def _copy_of(self, path: Path) -> Path:
        if self.cached or self.copies is None:
            return path
        copy = self.copies / f"{seed_of(str(path)):x}{path.suffix}"
        if not copy.exists():
            try:
                write_bytes(copy, path.read_bytes())
            except ResourceError as error:
                print(f"{error}; the tiles that were not copied yet are read from where they are", flush=True)
                self.copies = None
                return path
            except FileNotFoundError:
                return path  # reading it names what is missing
        return copy


def augment(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random quarter turn and flip of image uint8 [H,W,3] and label [H,W], and slightly other light: float32 image in 0...255.

    Seen from above there is no up: all eight orientations are alike. Square tiles keep their size; others turn by halves only.
    """
    turns = rng.integers(4) if label.shape[0] == label.shape[1] else 2 * rng.integers(2)
    image, label = np.rot90(image, int(turns)), np.rot90(label, int(turns))
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    contrast = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    brightness = rng.uniform(-15, 15)
    lit = (image.astype(np.float32) - 128) * contrast.astype(np.float32) + np.float32(128 + brightness)
    return np.clip(lit, 0, 255), np.ascontiguousarray(label)


def class_weights(table: pd.DataFrame, setting: str | list[float] | None, num_classes: int) -> list[float] | None:
    """Weights of the classes in the loss, [K], or None for the setting None.

    Frequencies are those of a manifest's column ``pixels``, each row counted as often as its ``weight`` has it drawn. "median_frequency"
    is the median of the frequencies divided by the class's own (Eigen and Fergus, ICCV 2015, without its restriction to images that
    show the class). A class that no pixel shows gets 0 and is left out of the median: nothing is known of it, and no pixel would use
    its weight. Weights are scaled so that those of all pixels have the mean 1, which keeps the learning rate's meaning; of a list
    only the ratios count.

    Raises DataError when the manifest counts other classes or no pixel, ConfigError when all that it shows weigh 0.
    """
    if setting is None:
        return None
    if any(len(row) != num_classes for row in table.pixels):
        raise DataError(f"class_weights: the column `pixels` of the manifest does not count {num_classes} classes; build the mix again")
    counts = table.weight.to_numpy(float) @ np.array(table.pixels.tolist(), dtype=float)
    if not counts.sum():
        raise DataError("class_weights: no tile that is trained on has a labelled pixel")
    frequency = counts / counts.sum()
    if setting == "median_frequency":
        weights = np.divide(np.median(frequency[frequency > 0]), frequency, out=np.zeros(num_classes), where=frequency > 0)
    elif len(setting) == num_classes:
        weights = np.array(setting, dtype=float)
    else:
        raise ConfigError(f"class_weights: {len(setting)} numbers for {num_classes} classes; give one per class")
    if not (mean := float(weights @ frequency)):
        raise ConfigError("class_weights: are 0 for every class that the tiles show; give one of them a weight")
    return (weights / mean).tolist()
