"""Training a segmentor on a manifest of tiles with mmengine's Runner, so that a stopped run continues as if it had not stopped.

Everything random in iteration i follows from (seed, i): which tiles are drawn, how each is augmented, what dropout drops (with several
processes, in the first of them).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from crfm_core import ConfigError, ResourceError, WeightsError
from crfm_core.distributed import ParallelJob, ProcessGroup, process_group
from crfm_core.files import atomic_path, hash_of, sha256_of
from crfm_core.manifest import read_manifest
from crfm_core.segmentor.dataset import Tiles, WeightedDraws, class_weights
from crfm_core.segmentor.mmseg.descriptions import config_of, describe_file, preparation_of, text_of, weigh_classes
from crfm_core.segmentor.mmseg.networks import build_described, collate, describe_architecture, try_out
from crfm_core.segmentor.mmseg.running import TrainingRunner, versions
from crfm_core.segmentor.validation import Convergence, Validator, best_of, newest_checkpoint
from crfm_core.settings import Download, Segmentor

#: What a training checkpoint holds and how; one of another form cannot be continued from. 2: few groups of parameters.
STATE = 2


class SegmentorTraining(ParallelJob):
    """One training: what it reads, what it writes, and how."""

    manifest: Path  #: the tiles; its column ``weight``, if there is one, says how often a row is drawn relative to the others
    root: Path  #: folder that all images lie in
    out: Path  #: the checkpoint; with ``val`` the best weights, and then ``last.pth`` beside it the last, if they are others
    segmentor: Segmentor
    classes: list[str]
    palette: list[tuple[int, int, int]]
    iterations: int
    seed: int
    device: str = "cpu"
    #: Manifest of the tiles whose mIoU chooses the best weights, measured every ``validate_every`` iterations and at the end.
    val: Path | None = None
    #: Manifest of tiles on whose mIoU the last quarter of the training is measured; it chooses nothing.
    held_out: Path | None = None
    pretrained: Path | None = None  #: backbone weights; None: what ``segmentor.pretrained`` names, if it is a file
    #: Folder on this machine's own disk for copies of tiles that memory does not hold; they are removed at the end.
    scratch: Path | None = None

    @property
    def processes(self) -> int:
        return self.segmentor.processes

    def run(self) -> None:
        train_segmentor(self)


def train_segmentor(job: SegmentorTraining) -> None:
    """Train on the job's tiles and write its checkpoint (readable by ``load_critic``) atomically. Every process of the job calls this.

    The checkpoint's meta holds ``segmentor`` (the settings), ``classes``, ``palette``, ``iterations``, ``seed``, ``tiles`` and
    ``versions``; with ``val`` also ``validation``, a list of [iteration, mIoU in percent], and ``chosen``, the iteration of ``out``; with
    ``held_out`` such a list of what was measured there, before the last quarter of the iterations and after it; with class weights
    ``class_weights``, as they were used; with a configuration file ``cfg``, the network as mmsegmentation writes it.

    Raises ConfigError when the loss is no longer finite, the settings contradict each other or the configuration file cannot be used,
    DataError for a tile that does not fit the classes, WeightsError for unreadable pretrained weights, ResourceError when ``scratch``
    may not be written.
    """
    segmentor, num_classes = job.segmentor, len(job.classes)
    backbone = _pretrained(job)
    _check(job)
    with process_group(job.processes, job.device) as group:
        table, others = read_manifest(job.manifest), {path: read_manifest(path) for path in (job.val, job.held_out) if path}
        if "weight" not in table:
            table["weight"] = 1.0
        weights = class_weights(table, segmentor.class_weights, num_classes)
        if segmentor.config:
            description = describe_file(segmentor.config, num_classes)
        else:
            description = describe_architecture(str(segmentor.architecture), num_classes)
        if weights:
            weigh_classes(description, weights)
        content = table[["tile_id", "digest", "weight"]].to_dict("list"), [one.digest.tolist() for one in others.values()]
        inputs = text_of(description), backbone and sha256_of(backbone), content
        fingerprint = hash_of(STATE, segmentor.result_keys(), job.classes, job.iterations, job.seed, job.device, inputs)
        with group.work_folder(job.work, fingerprint) as folder, _copies(group, job.scratch) as copies:
            checkpoint, done = group.broadcast(newest_checkpoint(folder) if group.is_main else None) or (None, 0)

            tiles = Tiles(job.manifest, table, job.root, num_classes, job.seed, copies)
            tiles.metainfo = {"classes": job.classes, "palette": [list(colour) for colour in job.palette]}
            own = group.share(segmentor.batch_size)
            draws = WeightedDraws(table.weight.to_numpy(float), job.seed, done * segmentor.batch_size, segmentor.batch_size, own)
            workers = 0 if tiles.cached and job.device == "cpu" else 4  # a GPU would wait for the augmentation
            loader = DataLoader(tiles, len(own), sampler=draws, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)

            shared: dict[str, Any] = {"iterations": job.iterations, "batch_size": max(1, len(own)), "group": group}
            shared["preparation"] = preparation_of(config_of(description))
            measured = {path: Tiles(path, one, job.root, num_classes, job.seed) for path, one in others.items()}
            every = segmentor.validate_every or -(-job.iterations // 10)
            validation = Validator(tiles=measured[job.val], folder=folder, every=every, **shared) if job.val else None
            convergence = Convergence(tiles=measured[job.held_out], **shared) if job.held_out else None

            torch.manual_seed(job.seed)  # the weights follow from the seed alone
            network = build_described(description, str(segmentor.config or segmentor.architecture), ConfigError)
            if segmentor.config:
                try_out(network, (int(table.height.max()), int(table.width.max())), segmentor.config)
            runner = TrainingRunner(
                network, loader, segmentor, job.iterations, job.seed, folder, group, validation, convergence, checkpoint, backbone
            )
            runner.train()

            if group.is_main:
                meta = {"segmentor": segmentor.model_dump(mode="json"), **tiles.metainfo, "iterations": job.iterations, "seed": job.seed}
                meta |= {"tiles": len(table), "versions": versions()} | ({"class_weights": weights} if weights else {})
                meta |= {"held_out": runner.history("held_out")} if convergence else {}
                if segmentor.config:
                    meta |= {"cfg": text_of(description), "dataset_meta": tiles.metainfo}
                _write(job.out, runner, meta, validation)


def _pretrained(job: SegmentorTraining) -> Path | None:
    """The file of pretrained backbone weights, if any."""
    file = job.pretrained or job.segmentor.pretrained
    if isinstance(file, Download):
        raise ConfigError(f"segmentor pretrained: fetch {file.url} first and pass the file as `pretrained`")
    if file and not Path(file).is_file():
        raise WeightsError(f"{file}: there is no such file of pretrained weights; fetch it, or correct `pretrained` of the segmentor")
    return Path(file) if file else None


def _check(job: SegmentorTraining) -> None:
    batch_size, least = job.segmentor.batch_size, 2 * (1 if job.device == "cuda" else job.processes)  # GPUs normalise a batch together
    if batch_size < least:
        raise ConfigError(f"segmentor batch_size: {batch_size} is too few for batch normalisation; allowed: {least} or more")
    if job.segmentor.warmup >= job.iterations:
        raise ConfigError(f"segmentor warmup: {job.segmentor.warmup} leaves nothing of {job.iterations} iterations; it must be shorter")


@contextlib.contextmanager
def _copies(group: ProcessGroup, scratch: Path | None) -> Iterator[Path | None]:
    """A folder in ``scratch`` that all processes share, until the first of them is done with it; None without ``scratch``."""
    if scratch is None or not group.is_main:
        yield group.broadcast(None)
        return
    try:
        holder = tempfile.TemporaryDirectory(prefix="crfm-tiles-", dir=scratch)
    except OSError as error:
        raise ResourceError(
            f"scratch: {scratch} cannot hold copies of tiles ({error.strerror}); name a folder of this machine's own disk"
        ) from None
    with holder as folder:
        yield group.broadcast(Path(folder))


def _write(out: Path, runner: TrainingRunner, meta: dict[str, Any], validation: Validator | None) -> None:
    """Write the last weights, or with validation the best ones, and beside them the last ones if they are others."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in runner.network.state_dict().items()}
    last = out.with_name("last.pth")
    if validation:
        meta |= {"validation": runner.history("validation"), "chosen": best_of(runner.history("validation"))}
        if meta["chosen"] != meta["iterations"]:
            _save(last, weights, meta)
            _save(out, validation.best_weights(runner.history("validation")), meta)
            return
    _save(out, weights, meta)
    last.unlink(missing_ok=True)  # of an earlier training


def _save(path: Path, weights: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save({"state_dict": weights, "meta": meta}, temporary)
