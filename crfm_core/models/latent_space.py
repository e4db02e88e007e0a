"""Between images and the normalised latents the transformer works on: x₀ = (encoded - shift) · scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

    Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny


def encode_images(images: Tensor, vae: Autoencoder, generator: torch.Generator | None = None, sample: bool = False) -> Tensor:
    """Normalised latents [B, C, h, w] (float32) of images [B, 3, H, W] in [-1, 1] on the VAE's device: the posterior's mode
    or a sample of it."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    encoded = posterior.sample(generator) if sample else posterior.mode()
    return normalise(encoded.float(), vae)


def decode_latents(latents: Tensor, vae: Autoencoder) -> Tensor:
    """Images [B, 3, H, W] around [-1, 1], not clipped, of normalised latents, in the latents' dtype; differentiable."""
    encoded = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(encoded.to(vae.dtype), return_dict=False)[0].to(latents.dtype)


def normalise(encoded: Tensor, vae: Autoencoder) -> Tensor:
    """Bring the VAE's own latents to the scale of the noise."""
    return (encoded - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def downscaling(vae: Autoencoder) -> int:
    """How many pixels one latent stands for along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
