"""Choosing a segmentor's best weights while it trains, by its mIoU on the tiles of another split."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from crfm_core import DataError
from crfm_core.distributed import ProcessGroup
from crfm_core.files import atomic_path
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.draws import Tiles
from crfm_core.segmentor.evaluation import as_input, batches_of_one_size
from crfm_core.segmentor.libraries import lean_imports
from crfm_core.segmentor.openmmlab import Preparation, read_checkpoint

with lean_imports():
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

#: Iteration and mIoU in percent of each look, in order.
History = list[list[float]]


def best_of(history: History) -> int:
    """The iteration with the highest mIoU, the earliest of equals."""
    return int(max(history, key=lambda look: (look[1], -look[0]))[0])


def best_path(folder: Path | str, iteration: int) -> Path:
    """Where a work folder holds the weights of an iteration that was the best when it was looked at."""
    return Path(folder) / f"best_{iteration}.pth"


class Validation(Hook):
    """Measures the mIoU on validation tiles every so many iterations and at the end, and keeps the best weights in the work folder.

    What was measured is part of the training checkpoints, so a training that continues knows what the one that it continues knew.
    Each process looks at its part of the tiles.
    """

    def __init__(self, tiles: Tiles, folder: Path, every: int, iterations: int, batch_size: int, images: Preparation, group: ProcessGroup):
        self.tiles, self.folder = tiles, folder
        self.every, self.iterations = every, iterations
        self.batch_size = batch_size
        self.images, self.group = images, group

    @staticmethod
    def history(runner: Runner) -> History:
        """What was measured so far."""
        return runner.message_hub.runtime_info.get("validation", [])

    def best_weights(self, history: History) -> dict[str, torch.Tensor]:
        """The kept weights that ``history`` says are best."""
        return read_checkpoint(self._path(best_of(history)))["state_dict"]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None) -> None:
        number = batch_idx + 1
        if number % self.every and number != self.iterations:
            return
        network = runner.network
        history = [*self.history(runner), [number, self.measure(network)]]
        runner.message_hub.update_info("validation", history)
        if self.group.is_main:
            print(f"iteration {number}/{self.iterations}  mIoU {history[-1][1]:.2f} % on the validation tiles", flush=True)
            if best_of(history) == number:
                with atomic_path(self._path(number)) as aside:
                    torch.save({"state_dict": network.state_dict()}, aside)
            self._tidy(history)

    @torch.no_grad()
    def measure(self, network: torch.nn.Module) -> float:
        """mIoU in percent of the network as it is now, seen as :func:`crfm_core.segmentor.critic.load_critic` would show it."""
        classes = [str(index) for index in range(self.tiles.num_classes)]
        critic = Critic(copy.deepcopy(network), classes, self.images).to(self.group.device)  # a copy, for a critic freezes its network
        counted = ConfusionMatrix(self.tiles.num_classes)
        for images, labels in self._batches():
            counted.update(critic(as_input(images, self.group.device)).argmax(dim=1), labels)
        counted.matrix = self.group.sum(counted.matrix)
        score = counted.scores()["mIoU"]
        if score is None:
            raise DataError("val: the tiles of this split have no labelled pixel, so nothing can be chosen by them; name another split")
        return score

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This process's tiles in batches of one size of tile."""
        own = (self.tiles.pixels(row) for row in range(self.group.rank, len(self.tiles), self.group.size))
        for labels, images in batches_of_one_size(((label, image) for image, label in own), self.batch_size):
            yield images, np.stack(labels)

    def _tidy(self, history: History) -> None:
        """Remove weights that are best neither now nor for any training checkpoint that a stopped run may continue from."""
        starts = [int(match[1]) for path in self.folder.glob("iter_*.pth") if (match := re.fullmatch(r"iter_(\d+)\.pth", path.name))]
        before = [[look for look in history if look[0] <= start] for start in starts]
        needed = {best_of(looks) for looks in [history, *before] if looks}
        for path in self.folder.glob("best_*.pth"):
            if path not in map(self._path, needed):
                path.unlink()

    def _path(self, iteration: int) -> Path:
        return best_path(self.folder, iteration)
