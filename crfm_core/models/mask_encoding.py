"""How a label map becomes something the VAE can encode: one grey level per class."""

from __future__ import annotations

import torch
from torch import Tensor

from crfm_core import DataError
from crfm_core.data.rasters import IGNORE
from crfm_core.models.latent_space import encode_images

CODES = ("grey", "grey_compat")


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
