"""Between images or label maps and the normalised latents the transformer works on: x₀ = (encoded - shift) · scale.

A label map is encoded as a grey image, one level per class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from crfm_core import DataError
from crfm_core.data.rasters import IGNORE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

    Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny

#: Ways to encode ignored pixels, see :func:`encode_mask_levels`.
CODES = ("grey", "grey_compat")


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


def encode_mask_levels(labels: Tensor, num_classes: int, code: str = "grey") -> Tensor:
    """Grey images [B, 3, H, W] in [-1, 1] (float32) of label maps [B, H, W] with ids 0 ... ``num_classes`` - 1 and 255 = ignore.

    Class c gets the level ⌊255 c / K⌋ of 0 ... 255. Ignored pixels get level 255, which no class uses, with the code "grey";
    with "grey_compat" they get what the authors' released code gives them, the same formula wrapped around at 256, which
    may be the level of a class (of class 2 for K = 18). Resize labels with nearest neighbours only, before this.

    Raises DataError for ids outside the classes and ValueError for an unknown code or an impossible ``num_classes``.
    """
    if code not in CODES:
        raise ValueError(f"code={code!r}: must be one of {', '.join(CODES)}")
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes={num_classes}: must lie between 1 and {IGNORE}")
    labels = labels.long()
    strange = labels[((labels < 0) | (labels >= num_classes)) & (labels != IGNORE)]
    if strange.numel():
        raise DataError(f"label ids {strange.unique().tolist()[:5]} outside 0 ... {num_classes - 1} (and {IGNORE} = ignore)")
    levels = labels * 255 // num_classes % 256
    if code == "grey":
        levels = levels.masked_fill(labels == IGNORE, 255)
    return (levels.float() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)


@torch.no_grad()
def mask_latents(labels: Tensor, vae: torch.nn.Module, num_classes: int, code: str = "grey") -> Tensor:
    """Normalised latents [B, C, h, w] (float32) of label maps [B, H, W]; see :func:`encode_mask_levels`."""
    return encode_images(encode_mask_levels(labels, num_classes, code), vae)
