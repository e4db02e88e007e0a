"""Control-rectify flow matching: correct the velocity so that a critic sees the wanted classes in the clean estimate.

Source: TODSynth (arXiv 2512.16740). Notation: z noisy latent, v velocity, σ noise level, ẑ₀ = z - σv the clean estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crfm_core.models.mask_encoding import IGNORE
from crfm_core.settings import RectifySettings

__all__ = ["Rectification", "RectifySettings", "critic_loss", "rectify_velocity"]

TINY = 1e-10


class Rectification(NamedTuple):
    """A corrected velocity and what the correction did, per sample."""

    velocity: Tensor  # [B, C, h, w], in the dtype of the velocity that came in
    loss: Tensor  # [B], the critic's loss before the (first) correction
    gradient_ratio: Tensor  # [B], length of the gradient's change of v over the length of v
    clamp_ratio: Tensor  # [B], length of the clamp's change of v over the length of v


def rectify_velocity(
    velocity: Tensor,
    latents: Tensor,
    sigma: Tensor | float,
    labels: Tensor,
    decode: Callable[[Tensor], Tensor],
    critic: Callable[[Tensor], Tensor],
    settings: RectifySettings,
    step_size: float,
) -> Rectification:
    """Correct a velocity ``settings.inner_steps`` times by the critic's loss on the image it leads to.

    Args:
        velocity, latents: v and z at one noise level, [B, C, h, w]; the work is done in the velocity's dtype. Keep them in
            float32: a typical step is lost in bfloat16.
        sigma: the noise level, a number or one per sample [B].
        labels: wanted class ids at image size, [B, H, W]; 255 is ignored. A sample without any label is not corrected.
        decode: normalised clean latents -> images [B, 3, H, W] around [-1, 1], not clipped.
        critic: images in [0, 1] -> logits [B, K, H, W], in eval mode, with its own normalisation inside.
        step_size: α of this step, see :meth:`RectifySettings.step_sizes`.

    Raises: ValueError when shapes or ids do not fit together.
    """
    _check(velocity, latents, sigma, labels)
    sigma = torch.as_tensor(sigma, dtype=velocity.dtype, device=velocity.device).reshape(-1, 1, 1, 1)
    velocity, latents = velocity.detach(), latents.detach().to(velocity.dtype)
    length = _length(velocity).clamp(min=TINY)
    by_gradient = by_clamp = torch.zeros_like(velocity)
    first_loss = None

    for _ in range(settings.inner_steps):
        with torch.enable_grad():
            velocity.requires_grad_()
            loss = critic_loss(latents - sigma * velocity, labels, decode, critic, settings.pixels)
            (gradient,) = torch.autograd.grad(loss.sum(), velocity)
        velocity = velocity.detach()
        if first_loss is None:
            first_loss = loss.detach()

        if settings.reduction == "mean":
            gradient = gradient / len(gradient)
        if settings.normalise == "l2":
            gradient = gradient / (_length(gradient) + TINY)
        elif settings.normalise == "relative":
            gradient = gradient * torch.nan_to_num(_length(velocity) / _length(gradient), posinf=0.0)

        if settings.shrink:
            velocity = (1 - step_size) * velocity
        velocity = velocity - step_size * gradient
        by_gradient = by_gradient - step_size * gradient
        if settings.clamp:
            clamped = velocity.clamp(-1, 1)
            by_clamp = by_clamp + (clamped - velocity)
            velocity = clamped

    return Rectification(velocity, first_loss, (_length(by_gradient) / length).flatten(), (_length(by_clamp) / length).flatten())


def critic_loss(
    clean_latents: Tensor,
    labels: Tensor,
    decode: Callable[[Tensor], Tensor],
    critic: Callable[[Tensor], Tensor],
    pixels: str = "valid",
) -> Tensor:
    """The critic's mean cross-entropy per sample, [B], on the images of clean latents [B, C, h, w].

    ``pixels``: over all "valid" pixels (label not 255), or only the "wrong" ones among them, whose likeliest class is not
    the label (the choice is not differentiated). A sample with no such pixel has loss 0. See :func:`rectify_velocity`.
    """
    images = (decode(clean_latents) / 2 + 0.5).clamp(0, 1)
    logits = critic(images).to(clean_latents.dtype)
    if (len(logits), *logits.shape[2:]) != tuple(labels.shape):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the critic's logits {tuple(logits.shape)}: sizes must be equal")
    counted = labels != IGNORE
    strange = labels[counted & ((labels < 0) | (labels >= logits.shape[1]))]
    if strange.numel():
        raise ValueError(f"labels hold ids {strange.unique().tolist()[:5]}, the critic knows 0 ... {logits.shape[1] - 1}")
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    if pixels == "wrong":
        counted = counted & (logits.argmax(1) != labels)
    return (loss * counted).sum((1, 2)) / (counted.sum((1, 2)) + TINY)


def _length(of: Tensor) -> Tensor:
    """Euclidean length of each sample, [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(of, dim=(1, 2, 3), keepdim=True)


def _check(velocity: Tensor, latents: Tensor, sigma: Tensor | float, labels: Tensor) -> None:
    if velocity.ndim != 4 or velocity.shape != latents.shape:
        raise ValueError(f"velocity has shape {tuple(velocity.shape)}, latents {tuple(latents.shape)}: both must be [B, C, h, w]")
    if labels.ndim != 3 or len(labels) != len(velocity):
        raise ValueError(f"labels have shape {tuple(labels.shape)}: must be [B, H, W] with B = {len(velocity)}")
    count = torch.as_tensor(sigma).numel()
    if count not in (1, len(velocity)):
        raise ValueError(f"sigma has {count} values: must be one number or one per sample ({len(velocity)})")
