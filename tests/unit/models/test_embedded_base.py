"""The base model that ships: small, what its card says, of use for tiles, classes and words that it was not made for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from paths import ROOT
from safetensors import safe_open

from crfm_core.checkpoints import check_base_model
from crfm_core.data.sources.embedded import draw_scene
from crfm_core.files import read_json, seed_of
from crfm_core.generator.weights import initial_network
from crfm_core.models.latent_space import decode_latents, encode_images, mask_latents
from crfm_core.settings import Control
from crfm_core.text.encoders import TextEncoders

BASE = ROOT / "models" / "embedded"


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(BASE, subfolder="vae").eval()


def psnr(images, vae):
    """Of images in [-1, 1] through the autoencoder, in dB."""
    with torch.no_grad():
        decoded = decode_latents(encode_images(images, vae), vae).clamp(-1, 1)
    return float(10 * torch.log10(4 / (decoded - images).square().mean()))


def test_it_is_small_in_16_bits_and_what_its_card_says():
    check_base_model(BASE)
    files = read_json(BASE / "card.json")["sha256"]
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 16e6
    assert sorted(files) == sorted(path.relative_to(BASE).as_posix() for path in BASE.rglob("*.safetensors"))
    for name in files:
        with safe_open(BASE / name, framework="pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118  # it is no dict


def test_it_keeps_tiles_of_a_country_it_has_not_seen(vae):
    scene, _ = draw_scene(seed_of("of this test"))
    tile = torch.from_numpy(scene[:128, :128]).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert psnr(tile, vae) > 33


@pytest.mark.parametrize("classes", [2, 7, 18])
def test_it_tells_the_grey_levels_of_any_number_of_classes_apart(vae, classes):
    labels = torch.arange(classes).repeat_interleave(16)[:, None].expand(-1, 64)[None]  # bands of 16 rows
    with torch.no_grad():
        grey = decode_latents(mask_latents(labels, vae, classes), vae).mean(1)
    found = ((grey + 1) * 127.5 * classes / 255).round().clamp(0, classes - 1)
    inside = torch.arange(16 * classes) % 16
    inside = (inside > 3) & (inside < 12)
    assert (found == labels)[:, inside].float().mean() > 0.9


def test_it_takes_any_words_and_a_mask_branch_grows_on_it():
    embeds, pooled = TextEncoders.from_folder(BASE).encode(["mangrove", "photovoltaic panels", ""])
    assert len({tuple(one.flatten().tolist()) for one in embeds}) == 3 and torch.isfinite(pooled).all()
    control = Control(steps=1, batch_size=1, learning_rate=1e-3, mask_init="copy")
    network = initial_network(BASE, control, 7).eval()
    latents, levels = torch.zeros(3, 8, 16, 16), torch.full((3,), 500.0)
    with torch.no_grad():
        velocity = network(latents, embeds, pooled, levels).sample
    assert np.isfinite(velocity.numpy()).all() and velocity.abs().max() > 0
