"""Noise levels, the Euler step, and masks as grey images."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_vae

from crfm_core import DataError
from crfm_core.models.flow_schedule import sigma_of_uniform, training_sigmas
from crfm_core.models.latent_space import decode_latents, encode_images
from crfm_core.models.mask_encoding import encode_mask_levels, mask_latents
from crfm_core.sampling.flow import euler_step, noise_levels


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


def levels_of(labels: list[int], num_classes: int, code: str) -> list[int]:
    images = encode_mask_levels(torch.tensor([[labels]]), num_classes, code)
    assert images.dtype == torch.float32 and images.shape == (1, 3, 1, len(labels))
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    return ((images[0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_classes_have_the_released_codes_grey_levels():
    for code in ("grey", "grey_compat"):
        assert levels_of([0, 1, 2, 17], 18, code) == [0, 14, 28, 240]
        assert levels_of([0, 3, 6], 7, code) == [0, 109, 218]


def test_ignored_pixels_have_a_level_no_class_has_but_wrap_around_in_the_compatible_code():
    for count in range(1, 256):
        assert len(set(levels_of([*range(count), 255], count, "grey"))) == count + 1
    assert levels_of([255, 2], 18, "grey_compat") == [28, 28]


def test_labels_may_be_bytes():
    assert torch.equal(
        encode_mask_levels(torch.tensor([[[6, 255]]], dtype=torch.uint8), 7), encode_mask_levels(torch.tensor([[[6, 255]]]), 7)
    )


def test_ids_and_codes_that_do_not_exist_are_refused():
    with pytest.raises(DataError, match=r"\[7\] outside 0 \.\.\. 6"):
        encode_mask_levels(torch.tensor([[[7]]]), 7)
    with pytest.raises(ValueError, match="code='colour'"):
        encode_mask_levels(torch.tensor([[[0]]]), 7, "colour")
    with pytest.raises(ValueError, match="num_classes=256"):
        encode_mask_levels(torch.tensor([[[0]]]), 256)


@torch.no_grad()
def test_latents_are_normalised_and_decoding_undoes_it():
    vae, labels = tiny_vae(), torch.randint(0, 7, (2, 16, 24))
    latents = mask_latents(labels, vae, 7)
    mode = vae.encode(encode_mask_levels(labels, 7)).latent_dist.mode()
    assert latents.shape == (2, 16, 8, 12)
    assert torch.allclose(latents, (mode - 0.0609) * 1.5305)
    assert torch.allclose(decode_latents(latents, vae), vae.decode(mode).sample, atol=1e-5)
    sampled = [encode_images(encode_mask_levels(labels, 7), vae, torch.Generator().manual_seed(0), sample=True) for _ in range(2)]
    assert torch.equal(*sampled) and not torch.equal(sampled[0], latents)
