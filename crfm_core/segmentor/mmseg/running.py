"""mmengine's Runner as this package uses it: chosen devices, atomic checkpoints, draws that continue where a stopped run was."""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from crfm_core import ConfigError, __version__
from crfm_core.distributed import ProcessGroup
from crfm_core.files import atomic_path, seed_of
from crfm_core.segmentor.mmseg.libraries import lean_imports
from crfm_core.segmentor.mmseg.weights import load_backbone, read_mmseg_checkpoint
from crfm_core.segmentor.validation import Convergence, History, Validator
from crfm_core.settings import Segmentor

with lean_imports():
    import mmengine
    from mmengine.hooks import Hook
    from mmengine.model import MMDistributedDataParallel
    from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
    from mmengine.runner import IterBasedTrainLoop, Runner


def _optimiser(segmentor: Segmentor, device: str, pretrained: bool) -> dict[str, Any]:
    """mmengine's description of the optimiser; ``device`` is "cpu" or "cuda"."""
    wrapper = {"type": Autocast, "device": device} if segmentor.precision == "bf16" else {"type": OptimWrapper}
    optimiser = {"type": segmentor.optimiser, "lr": segmentor.learning_rate, "weight_decay": segmentor.weight_decay}
    if segmentor.optimiser == "SGD":
        return {**wrapper, "optimizer": {**optimiser, "momentum": 0.9}}
    optimiser["fused"] = True  # a fifth of an embedded network's iteration was the optimiser's
    rules = {"norm": {"decay_mult": 0.0}}
    if pretrained:  # a fresh head on a trained backbone, as in SegFormer's recipe
        rules["head"] = {"lr_mult": 10.0}
    return {**wrapper, "constructor": FewGroups, "optimizer": optimiser, "paramwise_cfg": {"custom_keys": rules}}


def _schedule(segmentor: Segmentor, iterations: int) -> list[dict[str, Any]]:
    """mmengine's description of the learning rate: linear warm-up, then poly to zero."""
    warmup = segmentor.warmup
    poly = {"type": "PolyLR", "power": segmentor.poly_power, "eta_min": 0.0, "begin": warmup, "end": iterations, "by_epoch": False}
    linear = {"type": "LinearLR", "start_factor": 1e-3, "begin": 0, "end": warmup, "by_epoch": False}
    return [linear, poly] if warmup else [poly]


class FewGroups(DefaultOptimWrapperConstructor):
    """mmengine's constructor makes a group of every parameter; here those of one rate and decay are one group, whose step is one call."""

    def __call__(self, model: torch.nn.Module) -> OptimWrapper:
        wrapper = super().__call__(model)
        merged: dict[tuple, dict[str, Any]] = {}
        for group in wrapper.optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            merged.setdefault(tuple(settings.items()), {**settings, "params": []})["params"] += group["params"]
        wrapper.optimizer.param_groups = list(merged.values())
        return wrapper


class Autocast(OptimWrapper):
    """An optimiser whose forward passes compute in bfloat16 where that is safe; mmengine's own does not on a CPU."""

    def __init__(self, device: str, **settings: Any):
        super().__init__(**settings)
        self.device = device

    @contextlib.contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(self.device, torch.bfloat16):
            yield


class TrainLoop(IterBasedTrainLoop):
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


class TrainingHook(Hook):
    """Seeds what is random in an iteration; after it stops a run whose loss is not finite, logs progress, and validates."""

    def __init__(self, seed: int, iterations: int, group: ProcessGroup, validation: Validator | None, convergence: Convergence | None):
        self.seed, self.iterations, self.group = seed, iterations, group
        self.measurements = {"validation": validation, "held_out": convergence}

    def before_train_iter(self, runner: TrainingRunner, batch_idx: int, data_batch: dict | None = None) -> None:
        own = () if self.group.is_main else (self.group.rank,)
        torch.manual_seed(seed_of("iteration", self.seed, batch_idx, *own))

    def after_train_iter(self, runner: TrainingRunner, batch_idx: int, data_batch: dict | None = None, outputs: Any = None) -> None:
        loss, number = self.group.mean(outputs["loss"]), batch_idx + 1
        if not math.isfinite(loss):
            raise ConfigError(f"training diverged: loss is {loss} at iteration {number}; lower learning_rate or lengthen warmup")
        if self.group.is_main and (number % 50 == 0 or number == self.iterations):
            rate = runner.optim_wrapper.get_lr()["lr"][0]
            print(f"iteration {number}/{self.iterations}  loss {loss:.4f}  learning rate {rate:.2e}", flush=True)
        for name, measurement in self.measurements.items():
            if measurement:
                runner.message_hub.update_info(name, measurement(number, runner.network, runner.history(name)))


class TrainingRunner(Runner):
    """mmengine's Runner on a chosen device, with atomic checkpoints that are read without running code, and a quiet start."""

    model: Any

    def __init__(
        self,
        network: torch.nn.Module,
        loader: DataLoader,
        segmentor: Segmentor,
        iterations: int,
        seed: int,
        folder: Path,
        group: ProcessGroup,
        validation: Validator | None,
        convergence: Convergence | None,
        checkpoint: Path | None,
        backbone: Path | None,
    ):
        """Train ``network`` with the optimiser and schedule of ``segmentor``, and keep training checkpoints in ``folder``.

        Args:
            loader: batches of :func:`crfm_core.segmentor.mmseg.networks.collate`, endless.
            checkpoint: a training checkpoint to continue from.
            backbone: without one, pretrained weights that the backbone starts from.
        """
        hook = {
            "type": "CheckpointHook",
            "interval": segmentor.checkpoint_every,
            "by_epoch": False,
            "max_keep_ckpts": 2,
            "save_last": False,
        }
        super().__init__(
            model=network,
            work_dir=str(folder),
            train_dataloader=loader,
            train_cfg={"type": TrainLoop, "max_iters": iterations},
            optim_wrapper=_optimiser(segmentor, group.device.split(":")[0], backbone is not None),
            param_scheduler=_schedule(segmentor, iterations),
            # None switches a default hook off: their log histories cost time and would be pickled into the checkpoints.
            default_hooks={"checkpoint": hook, "runtime_info": None, "timer": None, "sampler_seed": None, "logger": None},
            custom_hooks=[TrainingHook(seed, iterations, group, validation, convergence)],
            randomness={"seed": seed},
            log_level="ERROR",  # below it are warnings about what the library does itself
            default_scope="mmseg",
            experiment_name=uuid.uuid4().hex,  # mmengine keeps process-wide state by this name
        )
        self._start = (checkpoint, backbone)
        self.model.to(group.device, memory_format=torch.channels_last)  # convolutions are a seventh faster so
        if group.size > 1:
            own = None
            if group.device != "cpu":
                self.model, own = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model), [torch.device(group.device)]
            # a network from a file may have parts that an iteration does not use
            self.model = MMDistributedDataParallel(self.model, device_ids=own, find_unused_parameters=segmentor.config is not None)

    @property
    def network(self) -> torch.nn.Module:
        """The network itself, without what spreads it over processes."""
        return self.model.module if isinstance(self.model, MMDistributedDataParallel) else self.model

    def history(self, name: str) -> History:
        """What was measured so far on the tiles of "validation" or "held_out". It is part of the training checkpoints."""
        return self.message_hub.runtime_info.get(name, [])

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        return model  # mmengine would move it to any GPU it sees

    def load_or_resume(self) -> None:
        checkpoint, backbone = self._start
        if checkpoint:
            self.resume(str(checkpoint), map_location="cpu")
        elif backbone:
            load_backbone(self.network, backbone)

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        checkpoint = read_mmseg_checkpoint(filename)
        checkpoint.get("meta", {}).pop("config", None)  # mmengine would run it as Python to compare it with its own
        self.network.load_state_dict(checkpoint["state_dict"])
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        if self.rank == 0:
            with atomic_path(Path(out_dir) / filename) as temporary:
                super().save_checkpoint(str(temporary.parent), temporary.name, *args, **kwargs)

    def _log_env(self, env_cfg: dict) -> None:
        """Nothing: it would start compilers only to log their versions."""


def versions() -> dict[str, str]:
    """Versions of the software that trains a segmentor."""
    import mmseg

    own = {"crfm_core": __version__, "torch": str(torch.__version__)}
    return own | {"mmengine": mmengine.__version__, "mmsegmentation": mmseg.__version__}
