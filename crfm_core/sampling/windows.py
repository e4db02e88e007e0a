"""Masks larger than a tile: one image without seams, sampled through overlapping windows of the tile's size.

At every step the velocity is computed, and corrected, window by window, and where windows overlap their velocities are averaged before
the one latent of the whole moves on (MultiDiffusion, Bar-Tal et al., ICML 2023). The decoder's images are blended likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from crfm_core import DataError, WeightsError
from crfm_core.data.grid import Grid
from crfm_core.data.rasters import write_raster
from crfm_core.data.windows import window_offsets
from crfm_core.files import seed_of, sha256_of
from crfm_core.models.latent_space import decode_latents, downscaling
from crfm_core.models.mask_encoding import IGNORE, mask_latents
from crfm_core.sampling.correction import Corrector
from crfm_core.sampling.flow import euler_step, noise_levels
from crfm_core.sampling.pipeline import Guide, MaskToImagePipeline, open_decoder, open_generator
from crfm_core.sampling.rectify import RectifySettings
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.sliding import Canvas
from crfm_core.settings import Captions, Sampler
from crfm_core.text.captions import caption_of
from crfm_core.text.encoders import TextEncoders

#: Share of a window that it has in common with the next one, at least.
OVERLAP = 0.5


class Window(NamedTuple):
    """A rectangle in latents."""

    top: int
    left: int
    height: int
    width: int

    def of(self, whole: Tensor, scale: int = 1) -> Tensor:
        """The window's part of the last two dimensions, whose cells are ``scale`` times smaller than latents."""
        rows, columns = (slice(scale * start, scale * (start + size)) for start, size in (self[::2], self[1::2]))
        return whole[..., rows, columns]


def taper(size: int, scale: int = 1) -> Tensor:
    """Weights [scale size, scale size] of a window: highest in its middle, falling linearly to its edges, never 0."""
    ramp = torch.arange(scale * size, dtype=torch.float32) + 0.5
    ramp = torch.minimum(ramp, ramp.flip(0))
    return torch.outer(ramp, ramp)


@torch.no_grad()
def sample_windows(
    pipeline: MaskToImagePipeline,
    mask: np.ndarray,
    encode: Callable[[Sequence[np.ndarray]], tuple[Tensor, Tensor]],
    size: int,
    critic: Callable[[Tensor], Tensor] | None = None,
    rectify: RectifySettings | None = None,
    negative: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    guidance_scale: float = 1.0,
    critic_decoder: torch.nn.Module | None = None,
    num_steps: int = 23,
    batch_size: int = 8,
    overlap: float = OVERLAP,
    generator: torch.Generator | None = None,
) -> tuple[np.ndarray, list[str]]:
    """One image for a mask of any size.

    A mask no larger than a window gives what the pipeline gives. Sides that the latent grid does not divide are enlarged and cropped.

    Args:
        mask: class ids [H, W]; 255 is ignored.
        encode: the windows' masks -> prompt embeddings [n, T, D] and pooled ones [n, P].
        size: side of a window in pixels, best that of the tiles the generator was trained on.
        critic, rectify, guidance_scale, critic_decoder: as in :meth:`MaskToImagePipeline.__call__`; each window is corrected by itself.
        negative: embeddings and pooled ones of the empty prompt, for guidance.
        batch_size: windows at once.
        overlap: share of a window that it has in common with the next one, at least; in [0, 1).
        generator: for the noise, on the CPU.

    Returns: uint8 [H, W, 3], and a note per window ("" for nothing).
    Raises: ValueError naming the argument; WeightsError when the networks give numbers that are not finite.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap}: must lie in [0, 1)")
    shrink, grain = downscaling(pipeline.vae), pipeline.grain
    if size % grain:
        raise ValueError(f"size={size}: must be divisible by {grain}")
    labels = torch.as_tensor(mask)[None]
    pipeline.check_masks(labels, pad=True)
    wanted, seen = (each[0] for each in pipeline.padded(labels.long()))

    height, width = (side // shrink for side in wanted.shape)
    side, shared = size // shrink, round(overlap * size / grain) * grain // shrink
    patch = pipeline.transformer.config.patch_size
    stride = (side - min(shared, side - patch)) // patch
    tops, lefts = (
        [patch * start for start in window_offsets(length // patch, min(side, length) // patch, stride, "spread")]
        for length in (height, width)
    )
    windows = [Window(top, left, min(side, height), min(side, width)) for top in tops for left in lefts]
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]

    device, dtype = pipeline._execution_device, pipeline.transformer.dtype
    sigmas = noise_levels(num_steps, pipeline.scheduler.config.shift, pipeline.scheduler.config.num_train_timesteps).tolist()
    decoder = critic_decoder or pipeline.vae
    prompts, masks, correctors = [], [], []
    for batch in batches:
        chosen = torch.stack([window.of(seen, shrink) for window in batch])
        prompts.append(encode([part.numpy() for part in chosen]))
        coded = mask_latents(chosen.to(device), pipeline.vae, pipeline.config.num_classes, pipeline.config.mask_code)
        masks.append(coded.to("cpu", dtype))
        if rectify:
            judged = torch.stack([window.of(wanted, shrink) for window in batch]).to(device)
            correctors.append(Corrector(judged, lambda clean: decode_latents(clean, decoder), critic, rectify, num_steps))

    channels = pipeline.transformer.config.in_channels
    latents = torch.randn(channels, height, width, generator=generator).to(device)
    weights = Window(0, 0, *windows[0][2:]).of(taper(side)).to(device)
    for step in tqdm(range(num_steps), desc="steps", disable=None):
        blend = Canvas((channels,), height, width, device)
        for index, batch in enumerate(batches):
            parts = torch.stack([window.of(latents) for window in batch])
            guide = Guide(
                pipeline.transformer, sigmas[step : step + 2], masks[index].to(device), *prompts[index], *negative, guidance_scale
            )
            velocity = guide.velocity(parts, 0)
            if rectify:
                velocity = correctors[index](step, sigmas[step], velocity, parts)
            for window, part in zip(batch, velocity, strict=True):
                blend.add(window.top, window.left, part, weights)
        latents = euler_step(latents, blend.mean(), sigmas[step], sigmas[step + 1])

    image = _decode(pipeline, latents, windows, tops, shrink, batch_size, side)
    return image[: mask.shape[0], : mask.shape[1]], [note for corrector in correctors for note in corrector.notes]


def _decode(
    pipeline: MaskToImagePipeline, latents: Tensor, windows: list[Window], tops: list[int], shrink: int, batch_size: int, side: int
) -> np.ndarray:
    """The image uint8 [H, W, 3] of the whole's latents, a row of windows after the other so that only two are held as floats."""
    height, width = (shrink * length for length in latents.shape[1:])
    image = np.empty((height, width, 3), np.uint8)
    weights = Window(0, 0, *windows[0][2:]).of(taper(side, shrink), shrink).to(latents.device)
    strip = Canvas((3,), shrink * windows[0].height, width, latents.device)
    for top, following in zip(tops, [*tops[1:], latents.shape[1]], strict=True):
        row = [window for window in windows if window.top == top]
        for start in range(0, len(row), batch_size):
            batch = row[start : start + batch_size]
            decoded = decode_latents(torch.stack([window.of(latents) for window in batch]), pipeline.vae)
            if not decoded.isfinite().all():
                raise WeightsError("the image holds numbers that are not finite; damaged weights, or bfloat16 is too narrow: use float32")
            for window, part in zip(batch, decoded, strict=True):
                strip.add(0, shrink * window.left, part, weights)
        done = shrink * (following - top)
        pixels = (strip.take(done) / 2 + 0.5).clamp(0, 1)
        image[shrink * top : shrink * top + done] = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return image


def synthesise_scene(
    generator: Path,
    name: str,
    mask: np.ndarray,
    grid: Grid,
    critic: Path | None,
    classes: list[str],
    captions: Captions,
    sampler_name: str,
    sampler: Sampler,
    size: int,
    seed: int,
    out: Path,
    device: str = "cpu",
) -> list[str]:
    """Write the image of a whole mask raster as a GeoTIFF in the mask's place; its tags say how it was made.

    Args:
        generator: MaskToImagePipeline folder, with its text encoders.
        name: the scene's name, which gives the noise.
        mask: its class ids, [H, W] uint8; 255 is ignored.
        grid: where the mask lies.
        critic: checkpoint or folder of the critic, when the sampler corrects.
        captions: how each window's prompt is made of the classes in it, by the template with every kind.
        size: side of a window in pixels: that of the tiles the generator was trained on.

    Returns: a note per window. Raises DataError when no pixel is labelled.
    """
    if (mask == IGNORE).all():
        raise DataError(f"scene {name}: all pixels are ignored; there is nothing to draw")
    pipeline = open_generator(generator)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    settings = sampler.rectification
    guide = load_critic(critic, device, classes) if settings else None
    encoders = TextEncoders.from_folder(generator, device, dtype)
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def of_text(text: str) -> tuple[Tensor, Tensor]:
        if text not in known:
            known[text] = encoders.encode([text])
        return known[text]

    def encode(parts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        counts = [np.bincount(part[part != IGNORE], minlength=len(classes)).tolist() for part in parts]
        texts = [caption_of(pixels, classes, captions) for pixels in counts]
        return tuple(torch.cat(each) for each in zip(*map(of_text, texts), strict=True))

    sample_seed = seed_of("scene", name, sampler_name, seed)
    image, notes = sample_windows(
        pipeline.to(device, dtype),
        mask,
        encode,
        size,
        guide,
        settings,
        of_text("") if sampler.guidance_scale > 1 else (None, None),
        sampler.guidance_scale,
        open_decoder(sampler.critic_decoder).to(device, dtype) if sampler.critic_decoder else None,
        sampler.num_steps,
        sampler.batch_size,
        generator=torch.Generator().manual_seed(sample_seed),
    )
    for note, count in Counter(notes).items():
        if note:
            print(f"{count} of {len(notes)} windows: {note}", flush=True)
    tags = {"generator": sha256_of(generator / "transformer", generator / "vae")[:12], "seed": sample_seed, "sampler": sampler_name}
    write_raster(out, image, grid.crs or None, tuple(grid.transform)[:6] if grid.crs else None, tags | {"mask_of": name})
    return notes
