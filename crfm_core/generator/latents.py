"""Latents of the training tiles, encoded once, and the batches that training draws of them instead of running the autoencoder.

Each sample follows from the seed and its running number alone, whoever draws it and when.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.files import atomic_path, hash_of, seed_of, sha256_of
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.models.flow_schedule import training_sigmas
from crfm_core.models.latent_space import mask_latents, normalise
from crfm_core.settings import Control


@torch.no_grad()
def encode_tiles(
    base: Path,
    manifest: Path,
    root: Path,
    num_classes: int,
    mask_code: str,
    out: Path,
    device: str = "cpu",
    batch_size: int = 16,
    labelled: bool = True,
) -> None:
    """Encode every tile of ``manifest`` and its mask, as they are and flipped left to right, into one safetensors file.

    A flipped latent is not the latent of the flipped image, so both are kept. Keys, for N tiles, latent [C,h,w] and
    flip f in {0, 1}: ``mean`` and ``logvar`` [2,N,C,h,w] of the posterior, ``mask`` [2,N,C,h,w] normalised; half precision
    (its rounding is far below the posterior's own spread). The metadata says which tiles, autoencoder, mask code and classes they are of.

    Args:
        base: pipeline folder whose ``vae`` encodes.
        mask_code: ``grey`` or ``grey_compat`` (see :mod:`crfm_core.models.latent_space`).
        labelled: False for tiles without labels, whose file has no ``mask``.
    """
    table = read_manifest(manifest, labelled=labelled)
    images = paths_of(manifest, table, "image", root)
    labels = paths_of(manifest, table, "label", root) if labelled else []
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(device).eval()
    origin = {"tiles": _hash_of_tiles(table), "vae": sha256_of(base / "vae"), "mask_code": mask_code, "num_classes": str(num_classes)}
    starts: dict[str, int] = {}
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        for start in tqdm(range(0, len(table), batch_size), desc="latents", disable=None):
            rgb = torch.from_numpy(np.stack([read_rgb(path) for path in images[start : start + batch_size]]))
            ids = torch.from_numpy(np.stack([read_label(path) for path in labels[start : start + batch_size]])).long() if labels else None
            pixels = (rgb.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)
            for flip in (0, 1):
                posterior = vae.encode(pixels.flip(-1) if flip else pixels).latent_dist
                parts = {"mean": posterior.mean, "logvar": posterior.logvar}
                if ids is not None:
                    parts["mask"] = mask_latents((ids.flip(-1) if flip else ids).to(device), vae, num_classes, mask_code)
                starts = starts or _begin_file(file, dict.fromkeys(parts, (2, len(table), *posterior.mean.shape[1:])), origin)
                # each batch goes to its place in the file: those of a large dataset are more than a job's memory
                for name, values in parts.items():
                    halves = values.half().cpu().contiguous().numpy()
                    file.seek(starts[name] + (flip * len(table) + start) * halves[0].nbytes)
                    file.write(halves.data)


def _begin_file(file: IO[bytes], shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write the head of a safetensors file of half-precision tensors of these shapes; where in the file each tensor begins."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name], end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _hash_of_tiles(table: pd.DataFrame) -> str:
    """Hash of the tiles' ids and contents, in order."""
    return hash_of(list(table.tile_id), list(table.digest))


class CachedLatents:
    """Memory-mapped view of the file :func:`encode_tiles` wrote.

    Args:
        path: the file.
        table: manifest of the tiles it must hold, in this order; DataError otherwise.
    """

    def __init__(self, path: Path, table: pd.DataFrame):
        self._path = path
        try:
            opened = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not a readable file of latents ({error}); delete it and run the workflow again") from None
        with opened:
            self._origin = opened.metadata() or {}
            self._require("tiles", _hash_of_tiles(table), "other tiles than the manifest")
            self._mean, self._logvar = (opened.get_tensor(name) for name in ("mean", "logvar"))
            self._mask = opened.get_tensor("mask") if "mask" in opened.keys() else None  # noqa: SIM118 - it is no mapping

    def check(self, base: Path, mask_code: str, num_classes: int) -> None:
        """Raise DataError unless the autoencoder of ``base`` made these latents, and the masks' with this code for so many classes."""
        self._require("vae", sha256_of(base / "vae"), f"latents of another autoencoder than {base / 'vae'}")
        self._require("mask_code", mask_code, f"masks of another code than {mask_code}")
        self._require("num_classes", str(num_classes), f"masks of another number of classes than {num_classes}")

    def _require(self, key: str, expected: str, otherwise: str) -> None:
        if self._origin.get(key) != expected:
            raise DataError(f"{self._path}: holds {otherwise}; delete it and run the workflow again")

    def __len__(self) -> int:
        return self._mean.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [C,h,w] of one latent."""
        channels, height, width = self._mean.shape[2:]
        return channels, height, width

    @property
    def has_masks(self) -> bool:
        """Whether the tiles' masks are there too."""
        return self._mask is not None

    def sample(self, index: int, flip: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A draw from the posterior (not normalised) with the given standard normal noise, and the mask latent, 0 where there is none:
        [C,h,w] each."""
        mean, logvar = self._mean[flip, index].float(), self._logvar[flip, index].float()
        mask = torch.zeros_like(mean) if self._mask is None else self._mask[flip, index].float()
        return mean + torch.exp(0.5 * logvar) * noise, mask

    def modes(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The likeliest latents (not normalised) of tiles as they are, and their mask latents: [B,C,h,w] each."""
        noise = torch.zeros(self.shape)
        latents, masks = zip(*(self.sample(row, 0, noise) for row in rows), strict=True)
        return torch.stack(latents), torch.stack(masks)


class Batch(NamedTuple):
    """B samples: normalised latents, masks and noise [B,C,h,w], noise levels [B], the rows of their tiles, whose prompt is empty, which
    have a mask, and which are of unlabelled tiles."""

    clean: Tensor
    mask: Tensor
    noise: Tensor
    sigma: Tensor
    rows: list[int]
    unprompted: list[bool]
    masked: list[bool]
    unlabelled: list[bool]


def draw_batch(
    numbers: range,
    cached: CachedLatents,
    vae: AutoencoderKL,
    shift: float,
    control: Control,
    rows: Sequence[int] | None = None,
    unlabelled: CachedLatents | None = None,
) -> Batch:
    """The samples with these running numbers, on the CPU.

    Args:
        vae: gives the latents' scale.
        shift: the scheduler's.
        rows: those of ``cached`` that are trained on; None: all.
        unlabelled: latents of the unlabelled tiles, of which ``control.unlabelled_share`` of the samples are.
    """
    trained = range(len(cached)) if rows is None else rows
    places = list(places_of(numbers, control.unlabelled_share if unlabelled is not None else 0))
    labelled_tiles = tiles_of([place for of_unlabelled, place in places if not of_unlabelled], len(trained), control.seed)
    unlabelled_tiles = tiles_of(
        [place for of_unlabelled, place in places if of_unlabelled], len(unlabelled or ()), control.seed, "unlabelled pass"
    )
    tensors: list[tuple[Tensor, ...]] = []
    rows_drawn, unprompted, masked = [], [], []
    for number, (of_unlabelled, _) in zip(numbers, places, strict=True):
        latents = unlabelled if of_unlabelled and unlabelled is not None else cached
        row = next(unlabelled_tiles) if of_unlabelled else trained[next(labelled_tiles)]
        generator = torch.Generator().manual_seed(seed_of("generator", control.seed, number))
        flip = int(torch.rand((), generator=generator) < control.flip)
        latent, mask = latents.sample(row, flip, torch.randn(latents.shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        sigma = training_sigmas(1, generator, control.density, shift)[0]
        tensors.append((normalise(latent, vae), mask, noise, sigma))
        rows_drawn.append(row)
        unprompted.append(bool(torch.rand((), generator=generator) < control.caption_dropout))
        dropped = bool(torch.rand((), generator=generator) < control.mask_dropout)
        masked.append(latents.has_masks and (of_unlabelled or not dropped))
    clean, masks, noises, sigmas = map(torch.stack, zip(*tensors, strict=True))
    return Batch(clean, masks, noises, sigmas, rows_drawn, unprompted, masked, [of_unlabelled for of_unlabelled, _ in places])


def places_of(numbers: range, share: float) -> Iterator[tuple[bool, int]]:
    """Whether each running number is of an unlabelled tile, of which there are ``share``, evenly spread, and its place among its like."""
    exact = Fraction(share).limit_denominator(1_000_000)  # 0.3 is a little less as a binary number
    for number in numbers:
        before, after = math.floor(number * exact), math.floor((number + 1) * exact)
        yield after > before, before if after > before else number - before


def tiles_of(places: Sequence[int], tiles: int, seed: int, order: str = "pass") -> Iterator[int]:
    """Tile at each place, in rising order: every tile once per pass, each pass in an order of its own by seed and ``order``."""
    rows, current = torch.empty(0), -1
    for place in places:
        if place // tiles != current:
            current = place // tiles
            rows = torch.randperm(tiles, generator=torch.Generator().manual_seed(seed_of(order, seed, current)))
        yield int(rows[place % tiles])
