"""Control-rectify flow matching: correct the velocity so that a critic recognises the mask's classes in the clean estimate.

Source: TODSynth (arXiv 2512.16740); the search for a step size is this project's. Notation: z noisy latent, v velocity, σ noise
level, ẑ₀ = z - σv the clean estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crfm_core.data.rasters import IGNORE
from crfm_core.settings import RectifySettings

__all__ = ["Correction", "Rectification", "RectifySettings", "correct_velocity", "critic_loss", "rectify_velocity"]

TINY = 1e-10

#: A trial that did not lower the loss is followed by one between these shares of its step, where a parabola has its minimum.
SHORTER = (0.1, 0.5)


class Rectification(NamedTuple):
    """A corrected velocity and what the correction did, per sample."""

    velocity: Tensor  # [B, C, h, w], in the dtype of the velocity that came in
    loss: Tensor  # [B], the critic's loss before the (first) correction
    gradient_ratio: Tensor  # [B], length of the gradient's change of v over the length of v
    clamp_ratio: Tensor  # [B], length of the clamp's change of v over the length of v


class Correction(NamedTuple):
    """What :func:`correct_velocity` did: a :class:`Rectification` with all measurements; [B] except for the velocity."""

    velocity: Tensor
    loss_before: Tensor
    loss_after: Tensor | None  # None where it was not measured
    agreement: Tensor  # share of the labelled pixels whose likeliest class was the label, before the correction
    step_size: Tensor  # the one taken; 0 where a search found none
    tried: Tensor  # the last one tried
    gradient_ratio: Tensor
    clamp_ratio: Tensor


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

    A sample for which the critic's loss or gradient is not finite has a loss of NaN and is not corrected.
    Raises: ValueError when shapes or ids do not fit together.
    """
    done = correct_velocity(velocity, latents, sigma, labels, decode, critic, settings, step_size)
    return Rectification(done.velocity, done.loss_before, done.gradient_ratio, done.clamp_ratio)


def correct_velocity(
    velocity: Tensor,
    latents: Tensor,
    sigma: Tensor | float,
    labels: Tensor,
    decode: Callable[[Tensor], Tensor],
    critic: Callable[[Tensor], Tensor],
    settings: RectifySettings,
    step_size: Tensor | float,
    measure: bool = False,
    batch: int | None = None,
) -> Correction:
    """:func:`rectify_velocity` with all its measurements.

    Args (beside those of :func:`rectify_velocity`):
        step_size: also one per sample, [B]; with ``settings.search`` the first one that is tried.
        measure: also measure the loss after the correction, which takes another forward pass; a search has measured it already.
        batch: number of samples that ``settings.reduction`` "mean" divides by; None: that of ``velocity``.
    """
    _check(velocity, latents, sigma, labels)
    sigma = torch.as_tensor(sigma, dtype=velocity.dtype, device=velocity.device).reshape(-1, 1, 1, 1)
    step_size = torch.as_tensor(step_size, dtype=velocity.dtype, device=velocity.device).expand(len(velocity))
    velocity, latents = velocity.detach(), latents.detach().to(velocity.dtype)
    length = _length(velocity).clamp(min=TINY)

    def loss_of(velocity: Tensor, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        level = sigma[rows] if len(sigma) > 1 else sigma
        return _loss_and_agreement(latents[rows] - level * velocity, labels[rows], decode, critic, settings.pixels)

    if settings.search == "backtracking":
        return _search(velocity, length, loss_of, settings, step_size)

    by_gradient = by_clamp = torch.zeros_like(velocity)
    alpha = step_size.reshape(-1, 1, 1, 1)
    for inner_step in range(settings.inner_steps):
        loss, agreed, gradient = _gradient(velocity, loss_of)
        if inner_step == 0:
            loss_before, agreement = loss, agreed
        if settings.reduction == "mean":
            gradient = gradient / (batch or len(gradient))
        if settings.normalise == "l2":
            gradient = gradient / (_length(gradient) + TINY)
        elif settings.normalise == "relative":
            gradient = _rescale(velocity, gradient)
        if settings.ascend:
            gradient = -gradient

        if settings.shrink:
            velocity = (1 - alpha) * velocity
        velocity = velocity - alpha * gradient
        by_gradient = by_gradient - alpha * gradient
        if settings.clamp:
            clamped = velocity.clamp(-1, 1)
            by_clamp = by_clamp + (clamped - velocity)
            velocity = clamped

    with torch.no_grad():
        after = loss_of(velocity)[0] if measure else None
    ratios = [(_length(change) / length).flatten() for change in (by_gradient, by_clamp)]
    return Correction(velocity, loss_before, after, agreement, step_size, step_size, *ratios)


def _search(velocity: Tensor, length: Tensor, loss_of: Callable, settings: RectifySettings, step_size: Tensor) -> Correction:
    """One correction whose step size is found for each sample: of at most ``settings.trials`` the first that lowers its loss.

    A trial that fails is followed by the step where the parabola through the loss, its slope and the failed trial has its minimum
    (Nocedal and Wright, Numerical Optimization, 3.5), kept within :data:`SHORTER`. Where all fail, the velocity stays as it is.
    """
    before, agreement, gradient = _gradient(velocity, loss_of)
    slope = -(_length(gradient) * length).flatten()  # of the loss over the step size
    direction = _rescale(velocity, gradient)
    found, after, taken, tried = velocity.clone(), before.clone(), torch.zeros_like(step_size), step_size.clone()
    rows = ((slope < 0) & before.isfinite()).nonzero().flatten()
    for trial in range(settings.trials):
        if not len(rows):
            break
        alpha = tried[rows]
        moved = velocity[rows] - alpha.reshape(-1, 1, 1, 1) * direction[rows]
        with torch.no_grad():
            loss = loss_of(moved, rows)[0]
        lower = loss < before[rows]  # false for a loss that is not a number
        kept = rows[lower]
        found[kept], after[kept], taken[kept] = moved[lower], loss[lower], alpha[lower]
        rows, alpha, loss = rows[~lower], alpha[~lower], loss[~lower]
        if trial + 1 < settings.trials:
            bend = loss - before[rows] - slope[rows] * alpha
            minimum = -slope[rows] * alpha**2 / (2 * bend)
            tried[rows] = torch.nan_to_num(minimum, nan=0.0).clamp(SHORTER[0] * alpha, SHORTER[1] * alpha)
    ratio = (_length(found - velocity) / length).flatten()
    return Correction(found, before, after, agreement, taken, tried, ratio, torch.zeros_like(ratio))


def _gradient(velocity: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and agreement [B], and the gradient of each sample's loss by its own velocity; 0 where something is not finite."""
    with torch.enable_grad():
        velocity = velocity.detach().requires_grad_()
        loss, agreement = loss_of(velocity)
        (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    loss = loss.detach()
    broken = ~(loss.isfinite() & gradient.flatten(1).isfinite().all(1))
    loss = torch.where(broken, torch.nan, loss)
    return loss, agreement, gradient.masked_fill(broken.reshape(-1, 1, 1, 1), 0)


def _rescale(velocity: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the length of the velocity; 0 where its own length is 0."""
    return gradient * torch.nan_to_num(_length(velocity) / _length(gradient), nan=0.0, posinf=0.0)


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
    return _loss_and_agreement(clean_latents, labels, decode, critic, pixels)[0]


def _loss_and_agreement(clean_latents: Tensor, labels: Tensor, decode: Callable, critic: Callable, pixels: str) -> tuple[Tensor, Tensor]:
    """:func:`critic_loss`, and the share of labelled pixels on which the critic agrees with the label, [B]."""
    images = (decode(clean_latents) / 2 + 0.5).clamp(0, 1)
    logits = critic(images).to(clean_latents.dtype)
    if (len(logits), *logits.shape[2:]) != tuple(labels.shape):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the critic's logits {tuple(logits.shape)}: sizes must be equal")
    counted = labels != IGNORE
    strange = labels[counted & ((labels < 0) | (labels >= logits.shape[1]))]
    if strange.numel():
        raise ValueError(f"labels hold ids {strange.unique().tolist()[:5]}, the critic knows 0 ... {logits.shape[1] - 1}")
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    wrong = counted & (logits.detach().argmax(1) != labels)
    agreement = 1 - wrong.sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)
    chosen = wrong if pixels == "wrong" else counted
    return (loss * chosen).sum((1, 2)) / (chosen.sum((1, 2)) + TINY), agreement


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
