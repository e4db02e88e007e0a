"""The state a stopped training continues from: written atomically, the newest few kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from crfm_core.checkpoints import read_torch_file
from crfm_core.files import atomic_path, require_disk
from crfm_core.generator.best_weights import BestWeights

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"), key=lambda path: int(path.stem.rpartition("-")[2]))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, mapped into memory and without executing anything. Raises WeightsError when it is damaged."""
    return read_torch_file(path, str(path), "delete it", mmap=True)


class TrainingState:
    """Everything that training changes: the network's trained weights, the optimiser, its schedule and the averaged weights.

    It is gathered into whole tensors and spread out again however the processes share them (one process, DDP, FSDP).

    Args:
        unwrapped: the network without what spreads it over processes.
        names: its parameters that train.
        ema: decay of the averaged weights, None for none.
        best: the best weights so far, None where nothing looks for them.
    """

    def __init__(
        self,
        network: nn.Module,
        unwrapped: nn.Module,
        names: list[str],
        optimiser: torch.optim.Optimizer,
        schedule: Any,
        ema: float | None,
        best: BestWeights | None = None,
    ):
        self.network, self.names, self.optimiser, self.schedule = network, names, optimiser, schedule
        self.parameters = [unwrapped.get_parameter(name) for name in names]
        self.ema = EMAModel(self.parameters, decay=ema, foreach=True) if ema else None
        self.best = best

    def gathered(self, step: int) -> dict[str, Any]:
        """The state after ``step`` updates. All processes must call it; only the first gets the tensors of others."""
        state = {
            "step": step,
            "model": self._weights(),
            "optimiser": get_optimizer_state_dict(self.network, self.optimiser, options=_WHOLE),
            "schedule": self.schedule.state_dict(),
            "ema": {"step": self.ema.optimization_step, "model": self._averages()} if self.ema else None,
        }
        return state | ({"best": self.best.state()} if self.best else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`gathered` gave."""
        set_model_state_dict(self.network, dict(state["model"]), options=_WHOLE)
        set_optimizer_state_dict(self.network, self.optimiser, state["optimiser"], options=_WHOLE)
        self.schedule.load_state_dict(state["schedule"])
        if self.best:
            self.best.restore(state["best"])
        if self.ema:
            self.ema.optimization_step = state["ema"]["step"]
            for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
                value = state["ema"]["model"][name].to(shadow.device)
                shadow.copy_(distribute_tensor(value, shadow.device_mesh, shadow.placements) if isinstance(shadow, DTensor) else value)

    def result(self) -> dict[str, Tensor]:
        """The trained weights: averaged where that was asked for. All processes must call it; the first gets them."""
        return self._averages() if self.ema else self._weights()

    def size(self) -> int:
        """Bytes of a checkpoint, at most."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)
        return weights * (3 + bool(self.ema) + bool(self.best))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the averaged weights, where there are any. All processes must enter it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the trained weights and the averaged ones, in place and one by one."""
        for module in self.network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or it would go on with the whole weights that it has gathered
        for parameter, shadow in zip(self.parameters, self.ema.shadow_params if self.ema else (), strict=bool(self.ema)):
            own = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(own)

    def _weights(self) -> dict[str, Tensor]:
        whole = get_model_state_dict(self.network, options=_WHOLE)
        return {name: value for name in self.names if isinstance(value := whole.get(name), Tensor)}

    def _averages(self) -> dict[str, Tensor]:
        if self.ema is None:
            return {}
        return {name: _whole(shadow).cpu() for name, shadow in zip(self.names, self.ema.shadow_params, strict=True)}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_checkpoint(folder: Path, state: dict[str, Any], size: int, keep: int) -> None:
    """Write ``state`` and remove all but the newest ``keep`` checkpoints. Raises ResourceError before writing when the disk is too full."""
    require_disk(folder, size)
    with atomic_path(folder / f"checkpoint-{state['step']}.pt") as temporary:
        torch.save(state, temporary)
    for old in checkpoints_in(folder)[:-keep]:
        old.unlink()
