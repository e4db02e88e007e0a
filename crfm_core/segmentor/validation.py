"""Choosing a segmentor's best weights while it trains, by its mIoU on the tiles of another split."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crfm_core import DataError, WeightsError
from crfm_core.distributed import ProcessGroup
from crfm_core.files import atomic_path
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.dataset import Tiles
from crfm_core.segmentor.evaluation import as_input, batches_of_one_size
from crfm_core.segmentor.mmseg.weights import read_mmseg_checkpoint
from crfm_core.segmentor.preparation import Preparation

#: Iteration and mIoU in percent of each validation, in order.
History = list[list[float]]


def best_of(history: History) -> int:
    """The iteration with the highest mIoU, the earliest of equals."""
    return int(max(history, key=lambda entry: (entry[1], -entry[0]))[0])


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest readable training checkpoint of a work folder and the iterations done by then.

    Damaged ones are skipped, and those whose best weights until then are gone or damaged.
    """
    for iteration, path in sorted(_checkpoints(folder).items(), reverse=True):
        try:
            if history := read_mmseg_checkpoint(path).get("message_hub", {}).get("runtime_info", {}).get("validation"):
                read_mmseg_checkpoint(_best_path(folder, best_of(history)))
        except WeightsError as error:
            print(f"{error}; continuing from an older one", flush=True)
        else:
            print(f"continuing after iteration {iteration}", flush=True)
            return path, iteration
    return None


@dataclass
class Measurement:
    """The mIoU of a network in training on tiles that it does not learn from; each process measures its part of them."""

    tiles: Tiles
    iterations: int  #: of the whole training
    batch_size: int  #: tiles that this process predicts together
    preparation: Preparation  #: how the network sees images when it is not trained
    group: ProcessGroup

    @torch.no_grad()
    def measure(self, network: torch.nn.Module) -> float | None:
        """mIoU in percent of the network as it is now, by the critic that :func:`crfm_core.segmentor.critic.load_critic` would give; None
        where no pixel is labelled."""
        classes = [str(index) for index in range(self.tiles.num_classes)]
        critic = Critic(copy.deepcopy(network), classes, self.preparation).to(self.group.device)  # a copy, for a critic freezes its network
        confusion = ConfusionMatrix(self.tiles.num_classes)
        own = (self.tiles.pixels(row) for row in range(self.group.rank, len(self.tiles), self.group.size))
        for labels, images in batches_of_one_size(((label, image) for image, label in own), self.batch_size):
            confusion.update(critic(as_input(images, self.group.device)).argmax(dim=1), np.stack(labels))
        confusion.matrix = self.group.sum(confusion.matrix)
        return confusion.scores()["mIoU"]


@dataclass
class Convergence(Measurement):
    """Measures the mIoU on held-out tiles when a quarter of the iterations is left, and at the end. It chooses nothing.

    What was measured is part of the training checkpoints.
    """

    def __call__(self, number: int, network: torch.nn.Module, history: History) -> History:
        """Measure the network after iteration ``number`` if it is time; returns the history with what was measured."""
        if number not in (three_quarters(self.iterations), self.iterations):
            return history
        score = self.measure(network)
        return history if score is None else [*history, [number, score]]


def three_quarters(iterations: int) -> int:
    """The iteration after which a quarter of them is left."""
    return iterations - iterations // 4


def gain_of_last_quarter(checkpoint: Path) -> float | None:
    """What the last quarter of a training's iterations gained on held-out tiles, in points of mIoU; None where it was not measured.

    Raises WeightsError for a checkpoint that cannot be read.
    """
    meta = {} if checkpoint.is_dir() else read_mmseg_checkpoint(checkpoint).get("meta")
    history = meta.get("held_out") if isinstance(meta, dict) else None
    return history[-1][1] - history[0][1] if history and len(history) == 2 else None


@dataclass
class Validator(Measurement):
    """Measures the mIoU on validation tiles every so often and at the end, and keeps the best weights in the work folder.

    What was measured is part of the training checkpoints, so a training that continues knows what the one that it continues knew.
    """

    folder: Path  #: the training's work folder
    every: int  #: iterations between two validations

    def __call__(self, number: int, network: torch.nn.Module, history: History) -> History:
        """Measure the network after iteration ``number`` if it is time; returns the history with what was measured."""
        if number % self.every and number != self.iterations:
            return history
        if (score := self.measure(network)) is None:
            raise DataError("val: the tiles of this split have no labelled pixel, so nothing can be chosen by them; name another split")
        history = [*history, [number, score]]
        if self.group.is_main:
            print(f"iteration {number}/{self.iterations}  mIoU {history[-1][1]:.2f} % on the validation tiles", flush=True)
            if best_of(history) == number:
                with atomic_path(_best_path(self.folder, number)) as temporary:
                    torch.save({"state_dict": network.state_dict()}, temporary)
            self._remove_unneeded(history)
        return history

    def best_weights(self, history: History) -> dict[str, torch.Tensor]:
        """The kept weights that ``history`` says are best."""
        return read_mmseg_checkpoint(_best_path(self.folder, best_of(history)))["state_dict"]

    def _remove_unneeded(self, history: History) -> None:
        """Remove weights that are best neither now nor for any training checkpoint that a stopped run may continue from."""
        until = [[entry for entry in history if entry[0] <= start] for start in _checkpoints(self.folder)]
        needed = {_best_path(self.folder, best_of(entries)) for entries in [history, *until] if entries}
        for path in self.folder.glob("best_*.pth"):
            if path not in needed:
                path.unlink()


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The training checkpoints of a work folder by their iterations."""
    return {int(match[1]): path for path in folder.glob("iter_*.pth") if (match := re.fullmatch(r"iter_(\d+)\.pth", path.name))}


def _best_path(folder: Path, iteration: int) -> Path:
    """The file of weights that were the best when they were measured."""
    return folder / f"best_{iteration}.pth"
