"""The noise levels of training."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from crfm_core.models.flow_schedule import sigma_of_uniform, training_sigmas


def test_training_levels_are_diffusers_training_levels():
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.allclose(sigma_of_uniform(u), FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas, rtol=0, atol=1e-6)
    assert sigma_of_uniform(torch.tensor([0.0, 1.0])).tolist() == [1.0, pytest.approx(3 / 1002)]


def test_training_levels_follow_their_generator_and_density():
    drawn = [training_sigmas(4000, torch.Generator().manual_seed(0), density) for density in ("uniform", "uniform", "logit_normal")]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[2].std() < drawn[0].std()
    assert drawn[0].min() > 0 and drawn[0].max() <= 1
    with pytest.raises(ValueError, match="density='mode'"):
        training_sigmas(1, density="mode")
