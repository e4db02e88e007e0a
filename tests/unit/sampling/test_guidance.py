"""Guidance by the prompt and by the mask: none is none, and more is the formula."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TinyCritic, network_inputs, tiny_network, tiny_pipeline
from torch import Tensor

from crfm_core.models.network import ControlNetwork
from crfm_core.sampling.guidance import GuidedVelocity
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.rectify import RectifySettings
from crfm_core.settings import SCHEMES

SIGMAS = [1.0, 0.6, 0.0]
MASKS = torch.randint(0, 7, (2, 16, 16), generator=torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS, MASK = network_inputs()["hidden_states"], normal(2, 16, 8, 12)
PROMPT = network_inputs()["encoder_hidden_states"], network_inputs()["pooled_projections"]
EMPTY = normal(1, 7, 32), normal(1, 24)


def shaken(scheme: str) -> ControlNetwork:
    """A network none of whose maps starts at zero: its mask matters."""
    network = tiny_network(scheme)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * normal(*parameter.shape, seed=parameter.numel()))
    return network


@torch.no_grad()
def velocity(network: ControlNetwork, step: int, prompt: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    text, pooled = (part.expand(2, *part.shape[1:]) for part in prompt)
    return network(LATENTS, text, pooled, torch.full((2,), 1000 * SIGMAS[step]), mask).sample


@torch.no_grad()
def guided(network: ControlNetwork, step: int, *arguments) -> Tensor:
    return GuidedVelocity(network, SIGMAS, MASK, PROMPT, *arguments)(LATENTS, step)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_guided_velocity_is_composed_of_those_without_both_with_the_prompt_and_with_prompt_and_mask(scheme, step):
    network = shaken(scheme)
    without, prompted, both = (velocity(network, step, *one) for one in ((EMPTY, None), (PROMPT, None), (PROMPT, MASK)))
    assert not torch.allclose(prompted, both, atol=1e-2) and not torch.allclose(prompted, without, atol=1e-2)
    by_mask = prompted + 2.5 * (both - prompted)
    assert torch.allclose(guided(network, step, None, 1.0, 2.5), by_mask, rtol=0, atol=1e-4)
    assert torch.allclose(guided(network, step, EMPTY, 1.0, 2.5), by_mask, rtol=0, atol=1e-4)
    by_both = without + 3.0 * (prompted - without) + 2.5 * (both - prompted)
    assert torch.allclose(guided(network, step, EMPTY, 3.0, 2.5), by_both, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_guidance_of_one_is_none_to_the_bit_and_that_of_the_prompt_alone_keeps_the_mask_on_both_sides(scheme):
    network = shaken(scheme)
    times = torch.tensor([1000 * sigma for sigma in SIGMAS[:-1]])
    plain = network.velocity(LATENTS, network.prepare(*PROMPT, times, MASK), 1)
    assert torch.equal(guided(network, 1), plain) and torch.equal(guided(network, 1, EMPTY, 1.0, 1.0), plain)
    both = [torch.cat([empty.expand(2, *empty.shape[1:]), prompt]) for empty, prompt in zip(EMPTY, PROMPT, strict=True)]
    prepared = network.prepare(*both, times, torch.cat([MASK, MASK]))
    empty, prompted = network.velocity(torch.cat([LATENTS, LATENTS]), prepared, 1).chunk(2)
    assert torch.equal(guided(network, 1, EMPTY, 3.0, 1.0), empty + 3.0 * (prompted - empty))


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_guidance_leads_away_from_is_plain_sd3(scheme):
    network = shaken(scheme)
    plain = network.to_sd3()(LATENTS, *PROMPT, torch.full((2,), 1000 * SIGMAS[1])).sample
    with_mask = guided(network, 1)
    assert torch.allclose(2 * with_mask - guided(network, 1, None, 1.0, 2.0), plain, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- pipeline


def draw(pipeline: MaskToImagePipeline, **changes):
    arguments = {"prompt_embeds": normal(2, 6, 32), "pooled_prompt_embeds": normal(2, 24), "num_inference_steps": 1}
    arguments |= {"latents": normal(2, 16, 8, 8), "output_type": "latent", "progress": False}
    return pipeline(MASKS, **(arguments | changes))


def test_the_pipeline_guides_by_the_mask_what_knows_missing_masks_and_corrects_after_that(tmp_path):
    pipeline = tiny_pipeline(knows_missing_masks=True)
    pipeline.save_pretrained(tmp_path)
    assert MaskToImagePipeline.from_pretrained(tmp_path).config.knows_missing_masks
    plain, stronger = draw(pipeline), draw(pipeline, mask_guidance_scale=2.0)
    assert torch.equal(plain.images, draw(pipeline, mask_guidance_scale=1.0).images)
    # one Euler step from noise z to σ = 0 gives z - v, which is linear in the velocity
    with torch.no_grad():
        without = pipeline.transformer(normal(2, 16, 8, 8), normal(2, 6, 32), normal(2, 24), torch.full((2,), 1000.0)).sample
    unmasked = normal(2, 16, 8, 8) - without
    assert torch.allclose(stronger.images, unmasked + 2 * (plain.images - unmasked), rtol=0, atol=1e-4)
    settings = RectifySettings(steps=1, step_size=0.02)
    corrected = draw(pipeline, mask_guidance_scale=2.0, critic=TinyCritic(), rectify=settings)
    change = (corrected.images - stronger.images).flatten(1).norm(dim=1) / (normal(2, 16, 8, 8) - stronger.images).flatten(1).norm(dim=1)
    assert change.tolist() == pytest.approx([0.02, 0.02], rel=1e-3), "a share of the guided velocity's length"
