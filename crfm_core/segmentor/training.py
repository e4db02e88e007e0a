"""Training a segmentor on a manifest of tiles with mmengine's Runner, so that a stopped run continues as if it had not stopped.

Everything random in iteration i follows from (seed, i): which tiles are drawn, how each is augmented, what dropout drops (with several
processes, in the first of them).
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from crfm_core import ConfigError, ResourceError, WeightsError
from crfm_core.distributed import ParallelJob, ProcessGroup, process_group
from crfm_core.files import atomic_path, hash_of, sha256_of
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.segmentor.descriptions import build_described, model_of_file, text_of_model, try_out, weigh_classes
from crfm_core.segmentor.draws import Tiles, WeightedDraws, class_weights, collate
from crfm_core.segmentor.openmmlab import DIVISOR, Preparation, model_config, read_checkpoint
from crfm_core.segmentor.running import TrainingRunner, TrainLoop, Watch, hooks, optimisation, schedule, versions
from crfm_core.segmentor.validation import Validation, best_of, best_path
from crfm_core.settings import Segmentor


class SegmentorTraining(ParallelJob):
    """The arguments of :func:`train_segmentor`."""

    manifest: Path
    root: Path
    out: Path
    segmentor: Segmentor
    classes: list[str]
    palette: list[tuple[int, int, int]]
    iterations: int
    seed: int
    device: str = "cpu"
    val: Path | None = None
    pretrained: Path | None = None
    scratch: Path | None = None

    @property
    def processes(self) -> int:
        return self.segmentor.processes

    def run(self) -> None:
        train_segmentor(**{name: getattr(self, name) for name in type(self).model_fields})


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
    val: Path | str | None = None,
    pretrained: Path | str | None = None,
    scratch: Path | str | None = None,
) -> None:
    """Train on the tiles of ``manifest`` and write the checkpoint ``out`` (readable by ``load_critic``) atomically.

    Args:
        manifest: the tiles; paths in it stay below ``root``. Its column ``weight``, if there is one, says how often a row is drawn
            relative to the others.
        root: folder that all images lie in.
        out: the checkpoint: the last weights, or with ``val`` the best, and then ``last.pth`` beside it the last, if they are others.
        work: folder of the state that a stopped run continues from; it is removed at the end.
        segmentor: the architecture, or the configuration file of one, and how it is trained. With ``processes`` above 1 every process calls
            this (:func:`crfm_core.distributed.launch` starts them).
        device: "cpu" or "cuda".
        val: manifest of the tiles whose mIoU chooses the best weights, looked at every ``validate_every`` iterations and at the end.
        pretrained: file of backbone weights; None: what ``segmentor.pretrained`` names, if it is a file.
        scratch: folder on this machine's own disk for copies of tiles that memory does not hold; they are removed at the end.

    The checkpoint's meta holds ``segmentor`` (the settings), ``classes``, ``palette``, ``iterations``, ``seed``, ``tiles`` and
    ``versions``; with ``val`` also ``validation``, a list of [iteration, mIoU in percent], and ``chosen``, the iteration of ``out``; with
    class weights ``class_weights``, as they were used; with a configuration file ``cfg``, the network as mmsegmentation writes it.

    Raises ConfigError when the loss is no longer finite, the settings contradict each other or the configuration file cannot be used,
    DataError for a tile that does not fit the classes, WeightsError for unreadable pretrained weights, ResourceError when ``scratch``
    may not be written.
    """
    start = _start(segmentor, pretrained)
    _check(segmentor, iterations, device)
    with process_group(segmentor.processes, device) as group:
        table, looked_at = read_manifest(manifest), None if val is None else read_manifest(val)
        if "weight" not in table:
            table["weight"] = 1.0
        weights = class_weights(table, segmentor.class_weights, len(classes))
        described = _described(segmentor, len(classes), weights)
        content = table[["tile_id", "digest", "weight"]].to_dict("list"), [] if looked_at is None else looked_at.digest.tolist()
        inputs = text_of_model(described), start and sha256_of(start), content
        identity = hash_of(segmentor.result_keys(), classes, iterations, seed, device, inputs)
        with group.work_folder(work, identity) as folder, _near(group, scratch) as near:
            resume = group.broadcast(newest_checkpoint(folder) if group.is_main else None)
            validation = None
            if looked_at is not None:
                tiles = _tiles(val, looked_at, root, len(classes), seed)
                every, batch_size = segmentor.validate_every or -(-iterations // 10), max(1, segmentor.batch_size // group.size)
                validation = Validation(tiles, folder, every, iterations, batch_size, _seen(described), group)
            tiles = _tiles(manifest, table, root, len(classes), seed, near)
            tiles.metainfo = {"classes": list(classes), "palette": [list(colour) for colour in palette]}
            places = group.share(segmentor.batch_size)
            done = resume[1] * segmentor.batch_size if resume else 0
            draws = WeightedDraws(table.weight.to_numpy(float), seed, done, segmentor.batch_size, places)
            workers = 0 if tiles.cached and device == "cpu" else 4  # a GPU would wait for the augmentation
            torch.manual_seed(seed)
            network = build_described(described, segmentor.config or segmentor.architecture, ConfigError)
            if segmentor.config:
                try_out(network, (int(table.height.max()), int(table.width.max())), segmentor.config)
            runner = TrainingRunner(
                model=network,
                work_dir=str(folder),
                train_dataloader=torch.utils.data.DataLoader(
                    tiles, len(places), sampler=draws, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
                ),
                train_cfg={"type": TrainLoop, "max_iters": iterations},
                optim_wrapper=optimisation(segmentor, device, start is not None),
                param_scheduler=schedule(segmentor, iterations),
                default_hooks=hooks(segmentor.checkpoint_every),
                custom_hooks=[Watch(seed, iterations, group), *filter(None, [validation])],
                randomness={"seed": seed},
                log_level="ERROR",  # below it are warnings about what the library does itself
                default_scope="mmseg",
                experiment_name=uuid.uuid4().hex,  # mmengine keeps process-wide state by this name
            )
            runner.start_from(group, resume and resume[0], start, find_unused=segmentor.config is not None)
            runner.train()
            meta = {"segmentor": segmentor.model_dump(mode="json"), **tiles.metainfo, "iterations": iterations, "seed": seed}
            meta |= {"tiles": len(table), "versions": versions()} | ({"class_weights": weights} if weights else {})
            if segmentor.config:
                meta |= {"cfg": text_of_model(described), "dataset_meta": tiles.metainfo}
            if group.is_main:
                _write(Path(out), runner, meta, validation)


def _start(segmentor: Segmentor, pretrained: Path | str | None) -> Path | None:
    """The file of weights to start from, if any."""
    given = pretrained or segmentor.pretrained
    if given and not isinstance(given, str | Path):
        raise ConfigError(f"segmentor pretrained: fetch {given.url} first and pass the file as `pretrained`")
    if given and not Path(given).is_file():
        raise WeightsError(f"{given}: there is no such file of pretrained weights; fetch it, or correct `pretrained` of the segmentor")
    return Path(given) if given else None


def _check(segmentor: Segmentor, iterations: int, device: str) -> None:
    alone = 1 if device == "cuda" else segmentor.processes  # on GPUs batches are normalised together
    if segmentor.batch_size < 2 * alone:
        raise ConfigError(f"segmentor batch_size: {segmentor.batch_size} is too few for batch normalisation; allowed: {2 * alone} or more")
    if segmentor.warmup >= iterations:
        raise ConfigError(f"segmentor warmup: {segmentor.warmup} leaves nothing of {iterations} iterations; it must be shorter")


def _described(segmentor: Segmentor, num_classes: int, weights: list[float] | None) -> dict[str, Any]:
    """The network's configuration as plain values, with class weights in its losses."""
    if segmentor.config:
        model = model_of_file(segmentor.config, num_classes)
    else:
        model = model_config(segmentor.architecture, num_classes).to_dict()
    if weights:
        weigh_classes(model, weights)
    return model


def _seen(described: dict[str, Any]) -> Preparation:
    """How the network sees images when it is not trained."""
    images = described["data_preprocessor"]
    mean, std = ([value / 255 for value in images[key]] for key in ("mean", "std"))
    return Preparation(mean, std, images["bgr_to_rgb"], divisor=DIVISOR)


@contextlib.contextmanager
def _near(group: ProcessGroup, scratch: Path | str | None) -> Iterator[Path | None]:
    """A folder in ``scratch`` that all processes share, until the first of them is done with it; None without one."""
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


def newest_checkpoint(folder: Path | str) -> tuple[Path, int] | None:
    """The newest readable training checkpoint of a work folder and the iterations it has seen; damaged ones are skipped, and
    those whose best weights so far are gone or damaged."""
    numbered = [(int(match[1]), path) for path in Path(folder).glob("iter_*.pth") if (match := re.fullmatch(r"iter_(\d+)\.pth", path.name))]
    for iteration, path in sorted(numbered, reverse=True):
        try:
            looks = read_checkpoint(path).get("message_hub", {}).get("runtime_info", {}).get("validation", [])
            if looks:
                read_checkpoint(best_path(folder, best_of(looks)))
        except WeightsError as error:
            print(f"{error}; continuing from an older one", flush=True)
        else:
            print(f"continuing after iteration {iteration}", flush=True)
            return path, iteration
    return None


def _tiles(manifest: Path | str, table: pd.DataFrame, root: Path | str, num_classes: int, seed: int, near: Path | None = None) -> Tiles:
    return Tiles(table, paths_of(manifest, table, "image", root), paths_of(manifest, table, "label", root), num_classes, seed, near)


def _write(out: Path, runner: TrainingRunner, meta: dict[str, Any], validation: Validation | None) -> None:
    """Write the last weights, or where tiles were looked at the best ones, and beside them the last ones if they are others."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in runner.network.state_dict().items()}
    last = out.with_name("last.pth")
    if validation:
        history = validation.history(runner)
        meta |= {"validation": history, "chosen": best_of(history)}
        if meta["chosen"] != meta["iterations"]:
            _save(last, weights, meta)
            _save(out, validation.best_weights(history), meta)
            return
    _save(out, weights, meta)
    last.unlink(missing_ok=True)  # of an earlier training


def _save(path: Path, weights: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    with atomic_path(path) as aside:
        torch.save({"state_dict": weights, "meta": meta}, aside)
