"""Prompt embeddings are those of diffusers' SD3 pipeline, and the cache gives back what was encoded."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_models import tiny_sd3, tiny_text_parts, tiny_vae

from crfm_core import DataError, WeightsError
from crfm_core.text.encoders import NO_PROMPT, TextEncoders, encode_prompts_file, prompt_key, read_prompts

PROMPTS = ["a satellite image of road, water", "forest", "a satellite image of " + "barren, " * 12]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(), **tiny_text_parts()
    )
    pipeline.folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(pipeline.folder)
    return pipeline


@pytest.fixture(scope="module")
def encoders(base) -> TextEncoders:
    return TextEncoders.from_folder(base.folder)


def test_embeddings_are_those_of_diffusers_pipeline(base, encoders):
    ours = encoders.encode(PROMPTS)
    with torch.no_grad():
        theirs, _, theirs_pooled, _ = base.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=encoders.t5_length
        )
    assert ours[0].shape == (3, 40 + 50, 32) and ours[1].shape == (3, 24)
    assert torch.equal(ours[0], theirs) and torch.equal(ours[1], theirs_pooled)
    assert not torch.equal(ours[0][0], ours[0][1])


@torch.no_grad()
def test_clip_states_are_the_penultimate_layers_without_the_final_norm(base, encoders):
    ids = base.tokenizer(PROMPTS, padding="max_length", max_length=40, truncation=True, return_tensors="pt").input_ids
    shortened = TextEncoders.from_folder(base.folder).clips[0][1]
    text_model = getattr(shortened, "text_model", shortened)
    text_model.encoder.layers = text_model.encoder.layers[:-1]
    text_model.final_layer_norm = torch.nn.Identity()
    assert torch.allclose(encoders.encode(PROMPTS)[0][:, :40, :12], shortened(ids).last_hidden_state, atol=1e-6)


def test_the_t5_length_is_at_most_256(encoders):
    tokenizer, encoder = encoders.t5
    tokenizer.model_max_length = 512
    clips = {"tokenizer": encoders.clips[0][0], "text_encoder": encoders.clips[0][1]}
    clips |= {f"{name}_2": part for name, part in clips.items()}
    longer = TextEncoders(**clips, tokenizer_3=tokenizer, text_encoder_3=encoder)
    tokenizer.model_max_length = 50
    assert longer.encode(["road"])[0].shape == (1, 40 + 256, 32)


def test_the_cache_holds_each_distinct_prompt_and_the_empty_one_as_encoded_alone(base, encoders, tmp_path):
    encode_prompts_file(base.folder, [*PROMPTS, *PROMPTS[::-1]], tmp_path / "prompts.safetensors")
    cache = read_prompts(tmp_path / "prompts.safetensors")
    assert cache.prompts == {prompt_key(prompt): prompt for prompt in (*PROMPTS, "")}
    embeds, pooled = cache.take([prompt_key(PROMPTS[1]), prompt_key(PROMPTS[1]), prompt_key(PROMPTS[0]), NO_PROMPT])
    for row, prompt in enumerate((PROMPTS[1], PROMPTS[1], PROMPTS[0], "")):
        alone = encoders.encode([prompt])
        assert torch.equal(embeds[row], alone[0][0]) and torch.equal(pooled[row], alone[1][0])


def test_what_is_missing_or_damaged_is_named(base, tmp_path):
    with pytest.raises(WeightsError, match="tokenizer is missing"):
        TextEncoders.from_folder(tmp_path)
    with pytest.raises(DataError, match="no prompts to encode"):
        encode_prompts_file(base.folder, [], tmp_path / "prompts.safetensors")
    with pytest.raises(DataError, match="absent"):
        read_prompts(tmp_path / "absent")
    (tmp_path / "broken").write_bytes(b"0123456789abcdef")
    with pytest.raises(DataError, match="broken"):
        read_prompts(tmp_path / "broken")
    encode_prompts_file(base.folder, ["road"], tmp_path / "prompts.safetensors")
    with pytest.raises(DataError, match=prompt_key("water")):
        read_prompts(tmp_path / "prompts.safetensors").take([prompt_key("water")])
