"""Training a segmentor on a manifest of tiles with mmengine's Runner, so that a stopped run continues as if it had not stopped.

Everything random in iteration i follows from (seed, i): which tiles are drawn, how each is augmented, what dropout drops.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.structures import BaseDataElement, PixelData

from crfm_core import ConfigError, DataError, WeightsError, __version__
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.files import atomic_path, hash_of, seed_of, work_folder
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.segmentor.openmmlab import build_model, load_backbone, read_checkpoint

if TYPE_CHECKING:
    from crfm_core.settings import Segmentor

#: Tiles are kept in memory when all of them together are smaller than this.
CACHE_BYTES = 2 << 30


def train_segmentor(
    manifest: Path | str,
    root: Path | str,
    out: Path | str,
    work: Path | str,
    segmentor: Segmentor,
    classes: list[str],
    palette: list[tuple[int, int, int]],
    iterations: int,
    seed: int,
    device: str = "cpu",
) -> None:
    """Train on the tiles of ``manifest`` and write the checkpoint ``out`` (readable by ``load_critic``) atomically.

    Paths in the manifest stay below ``root``. Its column ``weight``, if there is one, says how often a row is drawn relative to
    the others. ``work`` holds the state a stopped run continues from; it is removed at the end.

    Raises ConfigError when the loss is no longer finite or the settings contradict each other, DataError for a tile that does not
    fit the classes, WeightsError for unreadable pretrained weights.
    """
    if segmentor.batch_size < 2:
        raise ConfigError("segmentor batch_size: 1 is too few for batch normalisation; allowed: 2 or more")
    if segmentor.warmup >= iterations:
        raise ConfigError(f"segmentor warmup: {segmentor.warmup} leaves nothing of {iterations} iterations; it must be shorter")
    table = read_manifest(manifest)
    if "weight" not in table:
        table["weight"] = 1.0
    settings = segmentor.model_dump(mode="json")
    content = table[["tile_id", "digest", "weight"]].to_dict("list")
    with work_folder(work, hash_of(settings, classes, iterations, seed, device, content)) as folder:
        resume = newest_checkpoint(folder)
        tiles = Tiles(table, paths_of(manifest, table, "image", root), paths_of(manifest, table, "label", root), len(classes), seed)
        tiles.metainfo = {"classes": list(classes), "palette": [list(colour) for colour in palette]}
        sampler = WeightedDraws(table.weight.to_numpy(float), seed, start=resume[1] * segmentor.batch_size if resume else 0)
        workers = 0 if tiles.cached else 4
        loader = torch.utils.data.DataLoader(
            tiles, segmentor.batch_size, sampler=sampler, num_workers=workers, collate_fn=_collate, persistent_workers=workers > 0
        )
        torch.manual_seed(seed)
        network = build_model(segmentor.architecture, len(classes))
        runner = _Runner(
            model=network,
            work_dir=str(folder),
            train_dataloader=loader,
            train_cfg={"type": _Loop, "max_iters": iterations},
            optim_wrapper=_optimisation(segmentor),
            param_scheduler=_schedule(segmentor, iterations),
            default_hooks=_hooks(segmentor.checkpoint_every),
            custom_hooks=[_Watch(seed, iterations)],
            randomness={"seed": seed},
            log_level="ERROR",  # below it are warnings about what the library does itself
            default_scope="mmseg",
            experiment_name=uuid.uuid4().hex,  # mmengine keeps process-wide state by this name
        )
        runner.start_from(device, resume[0] if resume else None, segmentor.pretrained)
        runner.train()
        meta = {
            "segmentor": settings,
            "classes": list(classes),
            "palette": [list(colour) for colour in palette],
            "iterations": iterations,
            "seed": seed,
            "tiles": len(table),
            "versions": _versions(),
        }
        weights = {name: tensor.detach().cpu().clone() for name, tensor in runner.model.state_dict().items()}
        with atomic_path(out) as aside:
            torch.save({"state_dict": weights, "meta": meta}, aside)


def newest_checkpoint(folder: Path | str) -> tuple[Path, int] | None:
    """The newest readable training checkpoint of a work folder and the iterations it has seen; damaged ones are skipped."""
    numbered = [(int(match[1]), path) for path in Path(folder).glob("iter_*.pth") if (match := re.fullmatch(r"iter_(\d+)\.pth", path.name))]
    for iteration, path in sorted(numbered, reverse=True):
        try:
            read_checkpoint(path)
        except WeightsError as error:
            print(f"{error}; continuing from an older one", flush=True)
        else:
            print(f"continuing after iteration {iteration}", flush=True)
            return path, iteration
    return None


# ---------------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Draw:
    """The ``number``-th sample of a training run and the manifest row it shows."""

    number: int
    row: int


class WeightedDraws(torch.utils.data.Sampler):
    """An endless sequence of draws that depends on the seed and the weights only; ``start`` skips what was seen already.

    In rounds of N = ceil(Σw / min w): each row comes up floor or ceil of N·w/Σw times per round (systematic sampling), in random
    order. With equal weights a round is a shuffled epoch.
    """

    def __init__(self, weights: np.ndarray, seed: int, start: int = 0):
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise DataError("weights in the manifest must be finite, not negative, and not all zero; build the mix again")
        self.edges = np.cumsum(weights / weights.sum())
        self.round = math.ceil(round(weights.sum() / weights[weights > 0].min(), 6))
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.round  # mmengine asks for the length of an epoch when it builds schedules

    def __iter__(self) -> Iterator[Draw]:
        for number in itertools.count(self.start):
            turn, place = divmod(number, self.round)
            if place == 0 or number == self.start:
                order = self._order(turn)
            yield Draw(number, int(order[place]))

    def _order(self, turn: int) -> np.ndarray:
        rng = np.random.default_rng(seed_of("draws", self.seed, turn))
        points = (np.arange(self.round) + rng.random()) / self.round
        # A point on the far side of the last edge by rounding belongs to the last row that has any weight.
        rows = np.minimum(np.searchsorted(self.edges, points, side="right"), np.searchsorted(self.edges, self.edges[-1]))
        return rng.permutation(rows)


class Tiles(torch.utils.data.Dataset):
    """Tiles of a manifest, augmented by their draw: {"inputs": uint8-valued float [3,H,W], "data_samples": its label}."""

    def __init__(self, table: pd.DataFrame, images: list[Path], labels: list[Path], num_classes: int, seed: int):
        self.images, self.labels = images, labels
        self.num_classes = num_classes
        self.seed = seed
        self.cached = 4 * int((table.width * table.height).sum()) <= CACHE_BYTES
        self.cache = [self._read(row) for row in range(len(table))] if self.cached else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> dict:
        image, label = self.cache[draw.row] if self.cached else self._read(draw.row)
        image, label = augment(image, label, np.random.default_rng(seed_of("augment", self.seed, draw.number)))
        sample = BaseDataElement(gt_sem_seg=PixelData(data=torch.from_numpy(label).long()[None]))
        return {"inputs": torch.from_numpy(image).permute(2, 0, 1), "data_samples": sample}

    def _read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = read_rgb(self.images[row]), read_label(self.labels[row])
        if image.shape[:2] != label.shape:
            raise DataError(f"{self.labels[row]}: size {label.shape} differs from that of its image {image.shape[:2]}")
        highest = int(label[label != 255].max(initial=0))
        if highest >= self.num_classes:
            raise DataError(f"{self.labels[row]}: class id {highest}; the dataset has the ids 0...{self.num_classes - 1} (255 = ignored)")
        return image, label


def augment(image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random quarter turn and flip of image uint8 [H,W,3] and label [H,W], and slightly other light: float32 image in 0...255.

    Seen from above there is no up: all eight orientations are alike. Square tiles keep their size; others turn by halves only.
    """
    turns = rng.integers(4) if label.shape[0] == label.shape[1] else 2 * rng.integers(2)
    image, label = np.rot90(image, turns), np.rot90(label, turns)
    if rng.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    contrast = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    brightness = rng.uniform(-15, 15)
    lit = (image.astype(np.float32) - 128) * contrast.astype(np.float32) + np.float32(128 + brightness)
    return np.clip(lit, 0, 255), np.ascontiguousarray(label)


def _collate(samples: list[dict]) -> dict:
    """Lists, as mmsegmentation's preprocessor wants them: it pads and stacks."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}


# -------------------------------------------------------------------------------------------------------- optimisation


def _optimisation(segmentor: Segmentor) -> dict:
    optimiser = {"type": segmentor.optimiser, "lr": segmentor.learning_rate, "weight_decay": segmentor.weight_decay}
    if segmentor.optimiser == "SGD":
        return {"type": "OptimWrapper", "optimizer": {**optimiser, "momentum": 0.9}}
    rules = {"norm": {"decay_mult": 0.0}}
    if segmentor.pretrained:  # a fresh head on a trained backbone, as in SegFormer's recipe
        rules["head"] = {"lr_mult": 10.0}
    return {"type": "OptimWrapper", "optimizer": optimiser, "paramwise_cfg": {"custom_keys": rules}}


def _schedule(segmentor: Segmentor, iterations: int) -> list[dict]:
    warmup = segmentor.warmup
    poly = {"type": "PolyLR", "power": segmentor.poly_power, "eta_min": 0.0, "begin": warmup, "end": iterations, "by_epoch": False}
    linear = {"type": "LinearLR", "start_factor": 1e-3, "begin": 0, "end": warmup, "by_epoch": False}
    return [linear, poly] if warmup else [poly]


def _hooks(checkpoint_every: int) -> dict:
    checkpoint = {"type": "CheckpointHook", "interval": checkpoint_every, "by_epoch": False, "max_keep_ckpts": 2, "save_last": False}
    # None switches a default hook off: their log histories cost time and would be pickled into the checkpoints.
    return {"checkpoint": checkpoint, "runtime_info": None, "timer": None, "sampler_seed": None, "logger": None}


class _Loop(IterBasedTrainLoop):
    """mmengine's loop without its replay of the batches before a resumed iteration: the sampler starts at the right one."""

    def run(self) -> torch.nn.Module:
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        while self._iter < self._max_iters:
            self.run_iter(next(self.dataloader_iterator))
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model


class _Watch(Hook):
    """Seeds what is random in an iteration, stops a run whose loss is no number, and says how far it is."""

    def __init__(self, seed: int, iterations: int, every: int = 50):
        self.seed, self.iterations, self.every = seed, iterations, every

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        torch.manual_seed(seed_of("iteration", self.seed, batch_idx))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None) -> None:
        loss, number = outputs["loss"].item(), batch_idx + 1
        if not math.isfinite(loss):
            raise ConfigError(f"training diverged: loss is {loss} at iteration {number}; lower learning_rate or lengthen warmup")
        if number % self.every == 0 or number == self.iterations:
            rate = runner.optim_wrapper.get_lr()["lr"][0]
            print(f"iteration {number}/{self.iterations}  loss {loss:.4f}  learning rate {rate:.2e}", flush=True)


class _Runner(Runner):
    """mmengine's Runner on a chosen device, with atomic checkpoints that are read without running code, and a quiet start."""

    def start_from(self, device: str, checkpoint: Path | None, pretrained: str | None) -> None:
        """Choose the device and what :meth:`train` starts from: a training checkpoint, or else pretrained backbone weights."""
        self.model.to(device, memory_format=torch.channels_last)  # convolutions are a seventh faster so
        self._start = (checkpoint, pretrained)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        return model  # mmengine would move it to any GPU it sees

    def load_or_resume(self) -> None:
        checkpoint, pretrained = self._start
        if checkpoint:
            self.resume(str(checkpoint), map_location="cpu")
        elif pretrained:
            load_backbone(self.model, pretrained)

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        checkpoint = read_checkpoint(filename)
        self.model.load_state_dict(checkpoint["state_dict"])
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        with atomic_path(Path(out_dir) / filename) as aside:
            super().save_checkpoint(str(aside.parent), aside.name, *args, **kwargs)

    def _log_env(self, env_cfg: dict) -> None:
        """Nothing: it would start compilers to ask for their versions."""


def _versions() -> dict[str, str]:
    import mmengine
    import mmseg

    return {
        "crfm_core": __version__,
        "torch": str(torch.__version__),
        "mmengine": mmengine.__version__,
        "mmsegmentation": mmseg.__version__,
    }
