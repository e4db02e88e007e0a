"""Whole scenes: one image without seams for a mask larger than a tile, sampled through overlapping windows of the tile's size.

At every step the velocity is computed, and corrected, window by window, and where windows overlap their velocities are averaged before
the scene's latents take one Euler step (MultiDiffusion, Bar-Tal et al., ICML 2023). The decoder's images are blended likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crfm_core import DataError, WeightsError
from crfm_core.data.grid import Grid
from crfm_core.data.rasters import IGNORE, write_raster
from crfm_core.data.windows import window_offsets
from crfm_core.devices import compute_dtype
from crfm_core.files import seed_of
from crfm_core.models.latent_space import decode_latents, downscaling, mask_latents
from crfm_core.sampling.correction import VelocityCorrector
from crfm_core.sampling.flow import euler_sample
from crfm_core.sampling.guidance import GuidedVelocity
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.sampler import OpenedSampler, SamplerSpec
from crfm_core.segmentor.sliding import Canvas
from crfm_core.settings import Captions
from crfm_core.text.captions import caption_of
from crfm_core.text.encoders import TextEncoders

#: Least share of a window that it has in common with the next one.
OVERLAP = 0.5


class WindowBatch(NamedTuple):
    """Windows that are computed together."""

    corners: list[tuple[int, int]]  # top and left in latents
    mask: Tensor  # latents of their masks, on the CPU
    prompts: tuple[Tensor, Tensor]  # embeddings and pooled ones
    corrector: VelocityCorrector


def cut(whole: Tensor, corner: tuple[int, int], extent: tuple[int, int], scale: int = 1) -> Tensor:
    """A window of the last two dimensions, whose cells are ``scale`` times smaller than the latents that it is given in."""
    (top, left), (height, width) = corner, extent
    return whole[..., scale * top : scale * (top + height), scale * left : scale * (left + width)]


def taper(size: int, scale: int = 1) -> Tensor:
    """Weights [scale size, scale size] of a window: highest in its middle, falling linearly to its edges, never 0."""
    ramp = torch.arange(scale * size, dtype=torch.float32) + 0.5
    ramp = torch.minimum(ramp, ramp.flip(0))
    return torch.outer(ramp, ramp)


@torch.no_grad()
def sample_scene(
    sampler: OpenedSampler,
    mask: np.ndarray,
    encode: Callable[[Sequence[np.ndarray]], tuple[Tensor, Tensor]],
    size: int,
    generator: torch.Generator | None = None,
    overlap: float = OVERLAP,
) -> tuple[np.ndarray, list[str]]:
    """One image for a mask of any size.

    A mask no larger than a window gives what the pipeline gives. Sides that the latent grid does not divide are enlarged and cropped.

    Args:
        sampler: its ``batch_size`` counts windows; each window is corrected by itself.
        mask: class ids [H, W]; 255 is ignored.
        encode: the windows' masks -> prompt embeddings [n, T, D] and pooled ones [n, P].
        size: side of a window in pixels, best that of the tiles the generator was trained on.
        generator: for the noise, on the CPU.
        overlap: least share of a window that it has in common with the next one, in [0, 1).

    Returns: uint8 [H, W, 3], and a note per window ("" for nothing).
    Raises: ValueError naming the argument; WeightsError when the networks give numbers that are not finite.
    """
    pipeline, settings = sampler.pipeline, sampler.settings
    shrink, divisor, patch = downscaling(pipeline.vae), pipeline.size_divisor, pipeline.transformer.config.patch_size
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap}: must lie in [0, 1)")
    if size % divisor:
        raise ValueError(f"size={size}: must be divisible by {divisor}")
    labels = torch.as_tensor(mask)[None]
    pipeline.check_masks(labels, pad=True)
    judged, labels = (each[0] for each in pipeline.pad_labels(labels.long()))

    height, width = (side // shrink for side in labels.shape)
    side, shared = size // shrink, round(overlap * size / divisor) * divisor // shrink
    stride = (side - min(shared, side - patch)) // patch
    tops, lefts = (
        [patch * start for start in window_offsets(length // patch, min(side, length) // patch, stride, "spread")]
        for length in (height, width)
    )
    corners = [(top, left) for top in tops for left in lefts]
    extent = min(side, height), min(side, width)

    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    sigmas = pipeline.noise_levels(settings.num_steps)
    decoder, correction = sampler.critic_decoder or pipeline.vae, settings.rectify
    scales = settings.guidance_scale, settings.mask_guidance_scale

    def prepare(corners: list[tuple[int, int]]) -> WindowBatch:
        own_labels, own_judged = (torch.stack([cut(whole, corner, extent, shrink) for corner in corners]) for whole in (labels, judged))
        own_mask = mask_latents(own_labels.to(device), pipeline.vae, pipeline.config.num_classes, pipeline.config.mask_code)
        decode = lambda clean: decode_latents(clean, decoder)  # noqa: E731
        corrector = VelocityCorrector(own_judged.to(device), decode, sampler.critic, correction, settings.num_steps)
        return WindowBatch(corners, own_mask.to("cpu", dtype), encode([part.numpy() for part in own_labels]), corrector)

    batches = [prepare(corners[start : start + settings.batch_size]) for start in range(0, len(corners), settings.batch_size)]
    channels = pipeline.transformer.config.in_channels
    weights = cut(taper(side), (0, 0), extent).to(device)

    def velocity(latents: Tensor, step: int) -> Tensor:
        blend = Canvas((channels,), height, width, device)
        for batch in batches:
            parts = torch.stack([cut(latents, corner, extent) for corner in batch.corners])
            # Prepared anew at each step: what all steps of all windows need would not fit into memory.
            levels, mask = sigmas[step : step + 2], batch.mask.to(device)
            guided = GuidedVelocity(pipeline.transformer, levels, mask, batch.prompts, sampler.unconditional, *scales)
            own = batch.corrector(step, sigmas[step], guided(parts, 0), parts)
            for (top, left), part in zip(batch.corners, own, strict=True):
                blend.add(top, left, part, weights)
        return blend.mean()

    noise = torch.randn(channels, height, width, generator=generator).to(device)
    latents = euler_sample(velocity, noise, sigmas, tqdm(range(settings.num_steps), desc="steps", disable=None))
    image = _decode(pipeline, latents, tops, lefts, extent, taper(side, shrink), settings.batch_size)
    return image[: mask.shape[0], : mask.shape[1]], [note for batch in batches for note in batch.corrector.notes]


def _decode(
    pipeline: MaskToImagePipeline,
    latents: Tensor,
    tops: list[int],
    lefts: list[int],
    extent: tuple[int, int],
    weights: Tensor,
    batch_size: int,
) -> np.ndarray:
    """The image uint8 [H, W, 3] of the whole's latents, a row of windows after the other so that only two are held as floats."""
    shrink = downscaling(pipeline.vae)
    height, width = (shrink * length for length in latents.shape[1:])
    image = np.empty((height, width, 3), np.uint8)
    weights = cut(weights, (0, 0), extent, shrink).to(latents.device)
    strip = Canvas((3,), shrink * extent[0], width, latents.device)
    for top, following in zip(tops, [*tops[1:], latents.shape[1]], strict=True):
        for start in range(0, len(lefts), batch_size):
            batch = lefts[start : start + batch_size]
            decoded = decode_latents(torch.stack([cut(latents, (top, left), extent) for left in batch]), pipeline.vae)
            if not decoded.isfinite().all():
                raise WeightsError("the image holds numbers that are not finite; damaged weights, or bfloat16 is too narrow: use float32")
            for left, part in zip(batch, decoded, strict=True):
                strip.add(0, shrink * left, part, weights)
        done = shrink * (following - top)
        pixels = (strip.take(done) / 2 + 0.5).clamp(0, 1)
        image[shrink * top : shrink * top + done] = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return image


def synthesise_scene(
    sampler: SamplerSpec, name: str, mask: np.ndarray, grid: Grid, captions: Captions, size: int, seed: int, out: Path
) -> list[str]:
    """Write the image of a whole scene's mask as a GeoTIFF in the mask's place; its tags say how it was made.

    Args:
        sampler: its generator's folder must hold the text encoders.
        name: of the scene; part of the seed of its noise.
        mask: the scene's class ids, [H, W] uint8; 255 is ignored.
        grid: where the mask lies.
        captions: how each window's prompt is made of the classes in it: by the template, whatever their kind.
        size: side of a window in pixels: that of the tiles the generator was trained on.
        seed: the run's.

    Returns: a note per window. Raises DataError when no pixel is labelled.
    """
    if (mask == IGNORE).all():
        raise DataError(f"scene {name}: all pixels are ignored; there is nothing to draw")
    encoders = TextEncoders.from_folder(sampler.generator, sampler.device, compute_dtype(sampler.device))
    encode_text = lru_cache(None)(lambda text: encoders.encode([text]))

    def encode(parts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        counts = [np.bincount(part[part != IGNORE], minlength=len(sampler.classes)).tolist() for part in parts]
        texts = [caption_of(pixels, sampler.classes, captions) for pixels in counts]
        embeds, pooled = zip(*map(encode_text, texts), strict=True)
        return torch.cat(embeds), torch.cat(pooled)

    sample_seed = seed_of("scene", name, sampler.name, seed)
    opened = sampler.open(encode_text("") if sampler.settings.guidance_scale > 1 else None)
    image, notes = sample_scene(opened, mask, encode, size, torch.Generator().manual_seed(sample_seed))
    for note, count in Counter(notes).items():
        if note:
            print(f"{count} of {len(notes)} windows: {note}", flush=True)
    tags = {"generator": sampler.weights_digest()[:12], "seed": str(sample_seed), "sampler": sampler.name, "mask_of": name}
    write_raster(out, image, grid.crs or None, tuple(grid.transform)[:6] if grid.crs else None, tags)
    return notes
