"""The embedded base model: a pipeline folder like SD3.5's, an autoencoder that can be interrupted, tokenizers that know the words."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from segmentor_tiles import CLASSES
from tiny_world import tiny_base_settings
from transformers import CLIPTokenizer, T5TokenizerFast

from crfm_core import WeightsError
from crfm_core.checkpoints import COMPONENTS, check_base_model
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.models import base as base_module
from crfm_core.models.base import build_base_model, train_autoencoder
from crfm_core.models.latent_space import decode_latents, encode_images
from crfm_core.text.encoders import TextEncoders

CAPTION = f"a satellite image of {', '.join(CLASSES)}"


@pytest.fixture(scope="module")
def arrays(world) -> tuple[np.ndarray, np.ndarray]:
    table = read_manifest(world.tiles)
    images = np.stack([read_rgb(path) for path in paths_of(world.tiles, table, "image", world.root)])
    return images, np.stack([read_label(path) for path in paths_of(world.tiles, table, "label", world.root)])


def test_the_folder_is_a_stable_diffusion_3_pipeline_that_draws(world):
    pipeline = StableDiffusion3Pipeline.from_pretrained(check_base_model(world.base))
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        CAPTION, num_inference_steps=2, height=32, width=32, output_type="np", max_sequence_length=16, guidance_scale=1.0
    ).images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()
    assert pipeline.scheduler.config.shift == 3.0
    assert not (world.root / "work" / "base_model").exists()


def test_latents_of_the_tiles_have_mean_0_and_spread_1(world, arrays):
    vae = StableDiffusion3Pipeline.from_pretrained(world.base).vae
    pixels = torch.from_numpy(arrays[0]).permute(0, 3, 1, 2) / 127.5 - 1
    latents = encode_images(pixels, vae)
    assert latents.shape == (6, 4, 16, 16)
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 1) < 0.02
    error = (decode_latents(latents, vae) - pixels).abs().mean()
    assert error < 0.8 * (pixels - pixels.mean((0, 2, 3), keepdim=True)).abs().mean(), "40 steps already beat a flat grey"


def test_each_word_of_a_caption_is_one_token_also_after_the_disk(world):
    words = re.findall(r"\w+|,", CAPTION)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(world.base / name)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(CAPTION).input_ids)[1:-1]
        assert [token.removesuffix("</w>") for token in tokens] == words
    t5 = T5TokenizerFast.from_pretrained(world.base / "tokenizer_3")
    for caption in (CAPTION, "a satellite image of soil, water", "a satellite image of water"):
        tokens = t5.convert_ids_to_tokens(t5(caption).input_ids)[:-1]
        assert [token.removeprefix("▁") for token in tokens] == caption.split(), "a word with its comma is one"
    assert len(t5(CAPTION).input_ids) == t5.model_max_length, "the longest caption is read whole"


def test_captions_of_other_classes_have_other_embeddings_and_unknown_words_are_no_fault(world):
    encoders = TextEncoders.from_folder(world.base)
    (one, two, strange), pooled = encoders.encode([f"a satellite image of {name}" for name in ("water", "wood", "Xylophön!")])
    assert not torch.allclose(one, two) and not torch.allclose(pooled[0], pooled[1])
    assert strange.isfinite().all()


@pytest.mark.parametrize("damaged", [False, True], ids=["stopped", "stopped and its checkpoint damaged"])
def test_an_interrupted_autoencoder_ends_with_the_weights_of_one_that_was_not(arrays, tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(base_module, "CHECKPOINT_EVERY", 4)
    settings = tiny_base_settings(steps=10).vae
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    whole = train_autoencoder(*arrays, 3, settings, seed=0, work=tmp_path / "whole")

    steps_taken = []

    def stop_at_step_7(*arguments):
        steps_taken.append(1)
        if len(steps_taken) == 7:
            raise KeyboardInterrupt
        return crops(*arguments)

    crops = base_module._crops
    monkeypatch.setattr(base_module, "_crops", stop_at_step_7)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(*arrays, 3, settings, seed=0, work=tmp_path / "parts")
    if damaged:
        os.truncate(tmp_path / "parts" / "autoencoder.pt", 1000)
    resumed = train_autoencoder(*arrays, 3, settings, seed=0, work=tmp_path / "parts")
    assert len(steps_taken) == 7 + (10 if damaged else 6), "steps 4 ... 9 again, and 0 ... 3 only where it must be"
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert whole.config.scaling_factor == resumed.config.scaling_factor


def test_an_autoencoder_that_diverges_says_so_and_writes_nothing(world, tmp_path):
    settings = tiny_base_settings()
    broken = settings.model_copy(update={"vae": settings.vae.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(WeightsError, match=r"autoencoder: loss is (nan|inf) at step \d+; lower base_model\.vae\.learning_rate"):
        build_base_model(world.tiles, world.root, 3, [CAPTION], broken, tmp_path / "base", tmp_path / "work")
    assert not (tmp_path / "base").exists()


def test_what_a_base_model_lacks_is_named(world, tmp_path):
    assert check_base_model(world.base) == world.base
    with pytest.raises(WeightsError, match=f"model_index.json, {', '.join(COMPONENTS)}; it must be a diffusers folder"):
        check_base_model(tmp_path)
    for name in ("model_index.json", *COMPONENTS):
        (tmp_path / name).symlink_to(world.base / name)
    (tmp_path / "text_encoder_3").unlink()
    with pytest.raises(WeightsError, match=r"base_model\.path: .* lacks text_encoder_3; it must"):
        check_base_model(tmp_path)
