"""Noise levels, the Euler step and the loop over all steps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from crfm_core.sampling.flow import euler_sample, euler_step, noise_levels


@pytest.mark.parametrize("num_steps", [1, 2, 23, 50])
def test_noise_levels_are_those_of_diffusers_scheduler(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    levels = noise_levels(num_steps)
    assert levels.dtype == torch.float64 and levels.shape == (num_steps + 1,)
    assert torch.allclose(levels, scheduler.sigmas.double(), rtol=0, atol=1e-6)


def test_the_first_noise_levels_of_23_steps_are_the_published_ones():
    assert np.round(noise_levels(23)[:4].numpy(), 3).tolist() == [1.0, 0.984, 0.968, 0.950]


def test_a_run_needs_a_step():
    with pytest.raises(ValueError, match="num_steps=0"):
        noise_levels(0)


def test_euler_steps_along_a_constant_velocity_end_at_the_clean_latent():
    clean, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    latents, levels = noise, noise_levels(5).tolist()
    for sigma, following in pairwise(levels):
        latents = euler_step(latents, noise - clean, sigma, following)
    assert torch.allclose(latents, clean)
    looped = euler_sample(lambda latents, step: noise - clean, noise, levels)
    assert torch.equal(looped, latents)


def test_the_loop_gives_each_step_its_latents_and_goes_on_with_what_is_done_to_them():
    steps, levels = [], [1.0, 0.5, 0.25, 0.0]

    def velocity(latents, step):
        steps.append((step, latents.item()))
        return torch.ones(1)

    end = euler_sample(velocity, torch.ones(1), levels, after_step=lambda step, latents: latents + 10 * (step == 1))
    assert steps == [(0, 1.0), (1, 0.5), (2, 10.25)] and end.item() == 10.0
