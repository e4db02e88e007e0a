"""Euler sampling of a flow: the noise levels to visit, the step between two of them, and the loop over all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from crfm_core.models.flow_schedule import LEVELS, SHIFT, shift_sigma


def noise_levels(num_steps: int, shift: float = SHIFT, levels: int = LEVELS) -> Tensor:
    """The noise levels 1 = σ₀ > σ₁ > ... > σ_N = 0 of a run of ``num_steps`` steps, [N + 1] float64.

    They are those of diffusers' ``FlowMatchEulerDiscreteScheduler``, which shifts twice: its smallest level is shifted
    before the levels between it and 1 are spaced evenly, and then all of them are. The network's time input is 1000 σ.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: must be at least 1")
    evenly = torch.linspace(1.0, shift_sigma(1 / levels, shift), num_steps, dtype=torch.float64)
    return torch.cat([shift_sigma(evenly, shift), evenly.new_zeros(1)])


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Follow the velocity from noise level ``sigma`` to ``next_sigma``."""
    return latents + (next_sigma - sigma) * velocity


def euler_sample(
    velocity: Callable[[Tensor, int], Tensor],
    latents: Tensor,
    sigmas: Sequence[float],
    steps: Iterable[int] | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Follow a velocity from noise to clean latents: the one loop of tiles and scenes.

    Args:
        velocity: (latents, index of the step) -> velocity of the same shape; guidance and correction are part of it.
        latents: noise at ``sigmas[0]``, of any shape.
        sigmas: the N + 1 noise levels of :func:`noise_levels`.
        steps: ``range(N)``, perhaps with a progress bar around it.
        after_step: (index of the step, latents) -> latents to go on with.
    """
    for step in steps or range(len(sigmas) - 1):
        latents = euler_step(latents, velocity(latents, step), sigmas[step], sigmas[step + 1])
        if after_step:
            latents = after_step(step, latents)
    return latents
