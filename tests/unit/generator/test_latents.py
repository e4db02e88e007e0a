"""Latents of the training tiles: what is kept of each, and which files are refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from segmentor_tiles import CLASSES

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.generator.latents import CachedLatents, encode_tiles
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.models.latent_space import mask_latents


@torch.no_grad()
def test_cached_latents_are_those_of_the_tile_and_of_the_flipped_tile(world):
    table = read_manifest(world.tiles)
    vae = AutoencoderKL.from_pretrained(world.base, subfolder="vae").eval()
    cached = CachedLatents(world.latents, table)
    assert len(cached) == 6 and cached.shape == (4, 16, 16)
    image = read_rgb(paths_of(world.tiles, table, "image", world.root)[2])
    label = read_label(paths_of(world.tiles, table, "label", world.root)[2])
    for flip in (0, 1):
        seen, ids = (array[:, ::-1].copy() if flip else array for array in (image, label))
        posterior = vae.encode(torch.from_numpy(seen).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        noise = torch.randn(cached.shape, generator=torch.Generator().manual_seed(0))
        latent, mask = cached.sample(2, flip, noise)
        assert torch.allclose(latent, (posterior.mean + posterior.std * noise)[0], rtol=0, atol=5e-3)
        assert torch.allclose(mask, mask_latents(torch.from_numpy(ids)[None], vae, len(CLASSES))[0], rtol=0, atol=5e-3)
    unflipped = cached.sample(2, 0, torch.zeros(cached.shape))[0]
    assert not torch.allclose(cached.sample(2, 1, torch.zeros(cached.shape))[0].flip(-1), unflipped, atol=1e-2), "encoding is not symmetric"


def test_latents_of_other_tiles_are_refused(world):
    table = read_manifest(world.tiles)
    for other in (table[::-1], table[:-1], table.assign(digest="other")):
        with pytest.raises(DataError, match=r"grey\.safetensors: holds other tiles than the manifest; delete it"):
            CachedLatents(world.latents, other)


def test_latents_do_not_depend_on_the_batch_they_were_encoded_in(world, tmp_path):
    encode_tiles(world.base, world.tiles, world.root, 3, "grey", tmp_path / "one.safetensors", batch_size=1)
    one, all_at_once = load_file(tmp_path / "one.safetensors"), load_file(world.latents)
    assert all(torch.allclose(one[name].float(), all_at_once[name].float(), rtol=0, atol=5e-3) for name in one)


def test_missing_or_damaged_latents_are_named(tmp_path):
    (tmp_path / "broken").write_bytes(b"0123456789abcdef")
    for name in ("absent", "broken"):
        with pytest.raises(DataError, match=f"{name}: not a readable file of latents .*; delete it and run the workflow again"):
            CachedLatents(tmp_path / name, None)
