"""The samples a training step takes. Each follows from the seed and its running number alone, whoever draws it and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from crfm_core.files import seed_of
from crfm_core.generator.latents import CachedLatents
from crfm_core.models.flow_schedule import training_sigmas
from crfm_core.models.latent_space import normalise
from crfm_core.settings import Control


class Batch(NamedTuple):
    """B samples: normalised latents, masks and noise [B,C,h,w], noise levels [B], the rows of their tiles, and whose prompt is empty."""

    clean: Tensor
    mask: Tensor
    noise: Tensor
    sigma: Tensor
    rows: list[int]
    unprompted: list[bool]


def draw_batch(numbers: range, cached: CachedLatents, vae: AutoencoderKL, shift: float, control: Control) -> Batch:
    """The samples with these running numbers, on the CPU. ``vae`` gives the latents' scale, ``shift`` is the scheduler's."""
    clean, masks, noises, sigmas, rows, unprompted = [], [], [], [], [], []
    for number, row in zip(numbers, tiles_of(numbers, len(cached), control.seed), strict=True):
        generator = torch.Generator().manual_seed(seed_of("generator", control.seed, number))
        flip = int(torch.rand((), generator=generator) < control.flip)
        latent, mask = cached.sample(row, flip, torch.randn(cached.shape, generator=generator))
        clean.append(normalise(latent, vae))
        masks.append(mask)
        noises.append(torch.randn(cached.shape, generator=generator))
        sigmas.append(training_sigmas(1, generator, control.density, shift)[0])
        rows.append(row)
        unprompted.append(bool(torch.rand((), generator=generator) < control.caption_dropout))
    return Batch(*(torch.stack(items) for items in (clean, masks, noises, sigmas)), rows, unprompted)


def tiles_of(numbers: range, tiles: int, seed: int) -> Iterator[int]:
    """Tile of each running number: every tile once per pass, each pass in an order of its own."""
    order, current = None, -1
    for number in numbers:
        if number // tiles != current:
            current = number // tiles
            order = torch.randperm(tiles, generator=torch.Generator().manual_seed(seed_of("pass", seed, current)))
        yield int(order[number % tiles])
