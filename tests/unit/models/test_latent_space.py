"""Label maps as grey images, and latents of images."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_vae

from crfm_core import DataError
from crfm_core.models.latent_space import decode_latents, encode_images, encode_mask_levels, mask_latents


def levels_of(labels: list[int], num_classes: int, code: str) -> list[int]:
    images = encode_mask_levels(torch.tensor([[labels]]), num_classes, code)
    assert images.dtype == torch.float32 and images.shape == (1, 3, 1, len(labels))
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    return ((images[0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_classes_have_the_released_codes_grey_levels():
    for code in ("grey", "grey_compat"):
        assert levels_of([0, 1, 2, 17], 18, code) == [0, 14, 28, 240]
        assert levels_of([0, 3, 6], 7, code) == [0, 109, 218]


def test_ignored_pixels_have_a_level_no_class_has_but_wrap_around_in_the_compatible_code():
    for count in range(1, 256):
        assert len(set(levels_of([*range(count), 255], count, "grey"))) == count + 1
    assert levels_of([255, 2], 18, "grey_compat") == [28, 28]


def test_labels_may_be_bytes():
    assert torch.equal(
        encode_mask_levels(torch.tensor([[[6, 255]]], dtype=torch.uint8), 7), encode_mask_levels(torch.tensor([[[6, 255]]]), 7)
    )


def test_ids_and_codes_that_do_not_exist_are_refused():
    with pytest.raises(DataError, match=r"\[7\] outside 0 \.\.\. 6"):
        encode_mask_levels(torch.tensor([[[7]]]), 7)
    with pytest.raises(ValueError, match="code='colour'"):
        encode_mask_levels(torch.tensor([[[0]]]), 7, "colour")
    with pytest.raises(ValueError, match="num_classes=256"):
        encode_mask_levels(torch.tensor([[[0]]]), 256)


@torch.no_grad()
def test_latents_are_normalised_and_decoding_undoes_it():
    vae, labels = tiny_vae(), torch.randint(0, 7, (2, 16, 24))
    latents = mask_latents(labels, vae, 7)
    mode = vae.encode(encode_mask_levels(labels, 7)).latent_dist.mode()
    assert latents.shape == (2, 16, 8, 12)
    assert torch.allclose(latents, (mode - 0.0609) * 1.5305)
    assert torch.allclose(decode_latents(latents, vae), vae.decode(mode).sample, atol=1e-5)
    sampled = [encode_images(encode_mask_levels(labels, 7), vae, torch.Generator().manual_seed(0), sample=True) for _ in range(2)]
    assert torch.equal(*sampled) and not torch.equal(sampled[0], latents)
