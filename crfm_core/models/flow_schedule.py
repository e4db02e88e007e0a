"""The noise levels of Stable Diffusion 3's flow matching: σ = 0 is the clean latent, σ = 1 pure noise."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from crfm_core.checkpoints import check_scheduler

LEVELS = 1000
SHIFT = 3.0

Level = TypeVar("Level", float, Tensor)


def load_scheduler(folder: Path | str) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline folder, of which only `shift` is used. Raises WeightsError when it has other noise levels than these."""
    config = FlowMatchEulerDiscreteScheduler.load_config(str(folder), subfolder="scheduler", local_files_only=True)
    check_scheduler(config, f"{folder}/scheduler/scheduler_config.json")
    return FlowMatchEulerDiscreteScheduler.from_config(config)


def shift_sigma(sigma: Level, shift: float = SHIFT) -> Level:
    """Move noise levels in [0, 1] towards 1, keeping the ends: large images need more noise for the same loss of detail."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_of_uniform(u: Tensor, shift: float = SHIFT) -> Tensor:
    """The training noise levels at quantiles ``u`` in [0, 1], each one of LEVELS discrete ones; u = 0 is pure noise."""
    index = (u * LEVELS).floor().clamp(max=LEVELS - 1)
    return shift_sigma((LEVELS - index) / LEVELS, shift)


def training_sigmas(batch: int, generator: torch.Generator | None = None, density: str = "uniform", shift: float = SHIFT) -> Tensor:
    """Draw noise levels for training, [B] float32 on the CPU.

    ``density``: "uniform" over the discrete levels (the released code's ``none``) or "logit_normal" (SD3: fewer near the ends).
    """
    if density == "uniform":
        u = torch.rand(batch, generator=generator)
    elif density == "logit_normal":
        u = torch.randn(batch, generator=generator).sigmoid()
    else:
        raise ValueError(f"density={density!r}: must be 'uniform' or 'logit_normal'")
    return sigma_of_uniform(u, shift)
