"""The decoder made fast decodes as before, and checkpointing is switched by the memory that decoding needs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import psutil
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.upsampling import Upsample2D
from tiny_models import tiny_vae
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from crfm_core.models.decoder import choose_checkpointing, fused_upsampling, saved_bytes, speed_up
from crfm_core.models.latent_space import decode_latents, downscaling


def tiny_autoencoder(**changes) -> AutoencoderTiny:
    torch.manual_seed(4)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 16}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**(widths | blocks | changes)).eval().requires_grad_(False)


def kl_autoencoder() -> nn.Module:
    return tiny_vae((8, 16, 16)).requires_grad_(False)


AUTOENCODERS = pytest.mark.parametrize("build", [kl_autoencoder, tiny_autoencoder])


def latents_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def decoded(vae: nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and the gradient of their squares' sum."""
    latents = latents.clone().requires_grad_()
    images = decode_latents(latents, vae)
    return images.detach(), torch.autograd.grad(images.square().sum(), latents)[0]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (4, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_upsampling_is_upsampling_and_convolution_at_the_borders_too(size, bias):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 3, padding=1, bias=bias).double()
    fused = fused_upsampling(convolution)
    one, other = (latents_of(2, 3, *size, dtype=torch.float64).requires_grad_() for _ in range(2))
    expected, result = convolution(F.interpolate(one, scale_factor=2.0, mode="nearest")), fused(other)
    assert result.shape == expected.shape and torch.allclose(result, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    result.square().sum().backward()
    assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-11)


@AUTOENCODERS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_a_faster_decoder_gives_the_same_images_and_gradients(build, dtype, tolerance):
    vae = build()
    nn.Module.to(vae, dtype)
    fast = copy.deepcopy(vae)
    speed_up(fast)
    latents = latents_of(2, 16, 5, 7, dtype=dtype)
    (image, gradient), (fast_image, fast_gradient) = decoded(vae, latents), decoded(fast, latents)
    assert torch.allclose(fast_image, image, rtol=0, atol=tolerance)
    assert torch.allclose(fast_gradient, gradient, rtol=0, atol=tolerance * gradient.abs().max().item())


@AUTOENCODERS
def test_a_faster_decoder_works_less_and_stores_no_upsampled_tensor(build):
    vae, latents = build(), latents_of(1, 16, 8, 8)
    work, stored = [], []
    for fast in (False, True):
        if fast:
            speed_up(vae)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decode_latents(latents, vae)
        work.append(counter.get_total_flops())
        stored.append(saved_bytes(vae, latents))
    assert work[1] < 0.95 * work[0] and stored[1] < stored[0]
    assert not any(isinstance(module, (Upsample2D, nn.Upsample)) for module in vae.decoder.modules())


def test_other_upsamplings_stay():
    torch.manual_seed(0)
    sequence = nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Upsample(scale_factor=3),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 4, 1),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        Upsample2D(4),
        Upsample2D(4, use_conv_transpose=True),
    )
    vae = nn.Module()
    vae.decoder = sequence
    before, sample = list(sequence), latents_of(1, 4, 3, 3)
    expected = sequence(sample)
    speed_up(vae)
    assert list(vae.decoder) == before and torch.allclose(vae.decoder(sample), expected, atol=1e-5)


@AUTOENCODERS
def test_what_decoding_keeps_grows_with_area_and_batch(build):
    vae = build()
    small, large = (saved_bytes(vae, latents_of(*shape)) for shape in ((1, 16, 4, 4), (3, 16, 8, 16)))
    assert large == pytest.approx(24 * small, rel=0.03)


def with_free(monkeypatch, free: float) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free)))


@AUTOENCODERS
@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (2, 16, 16, 8)])
def test_the_decoder_is_checkpointed_where_memory_does_not_suffice_and_only_there(build, shape, monkeypatch):
    vae, latents = build(), latents_of(*shape)
    speed_up(vae)
    image, gradient = decoded(vae, latents)
    needed = saved_bytes(vae, latents)
    for free, expected in ((1.4 * needed, True), (1.9 * needed, False), (0, True)):
        with_free(monkeypatch, free)
        assert choose_checkpointing(vae, latents) is expected
        assert vae.is_gradient_checkpointing is expected
        again = decoded(vae, latents)
        assert torch.equal(again[0], image) and torch.allclose(again[1], gradient, rtol=1e-5, atol=1e-6)


def test_a_decoding_and_its_gradient_need_no_more_memory_than_is_asked_for(monkeypatch):
    vae, latents = tiny_vae((16, 32, 32), layers_per_block=2).requires_grad_(False), latents_of(2, 16, 16, 16)
    speed_up(vae)
    peaks = []
    for free in (1e18, 0):
        with_free(monkeypatch, free)
        choose_checkpointing(vae, latents)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            decoded(vae, latents)
        now = peak = 0
        for event in sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        peaks.append(peak)
    vae.disable_gradient_checkpointing()
    assert peaks[0] < 1.3 * saved_bytes(vae, latents)  # the rest of what is asked for is the critic's
    assert peaks[1] < 0.75 * peaks[0]


def test_a_decoder_that_knows_no_checkpointing_stays_as_it_is(monkeypatch):
    vae = tiny_autoencoder()
    monkeypatch.setattr(AutoencoderTiny, "_supports_gradient_checkpointing", False)
    with_free(monkeypatch, 0)
    assert choose_checkpointing(vae, latents_of(1, 16, 4, 4)) is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_autoencoder_decodes_the_same_latents(dtype):
    vae = tiny_autoencoder().to(dtype)
    latents = latents_of(2, 16, 3, 4)
    images, gradient = decoded(vae, latents)
    assert downscaling(vae) == 2 and images.shape == (2, 3, 6, 8) and images.dtype == torch.float32
    assert torch.equal(images, vae.decode(latents.to(dtype)).sample.float())  # they are its own latents: neither scaled nor shifted
    assert gradient.isfinite().all() and gradient.any()
