"""Prompt embeddings are those of diffusers' SD3 pipeline, each is made once, and the cache gives back what was encoded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from prompt_files import write_prompts
from tiny_models import tiny_sd3, tiny_text_parts, tiny_vae

from crfm_core import DataError, WeightsError
from crfm_core.files import read_json, write_json
from crfm_core.text import encoders as encoders_module
from crfm_core.text.encoders import (
    NO_PROMPT,
    PromptCache,
    TextEncoders,
    encode_prompts_file,
    hash_of_encoders,
    prompt_key,
)

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


# ----------------------------------------------------------------------------------------------- Stable Diffusion 3's size


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> StableDiffusion3Pipeline:
    """Text encoders with the widths and lengths of Stable Diffusion 3's, but few layers and narrow ones."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    parts = tiny_text_parts()
    for name, length in (("tokenizer", 77), ("tokenizer_2", 77), ("tokenizer_3", 512)):
        parts[name].model_max_length = length
    for name, width, heads in (("text_encoder", 768, 12), ("text_encoder_2", 1280, 20)):
        torch.manual_seed(width)
        config = CLIPTextConfig(
            vocab_size=56, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads,
            projection_dim=width, bos_token_id=54, eos_token_id=55, pad_token_id=55,
        )  # fmt: skip
        assert config.max_position_embeddings == 77
        parts[name] = CLIPTextModelWithProjection(config).eval()
    torch.manual_seed(0)
    narrow = T5Config(vocab_size=31, d_model=4096, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    parts["text_encoder_3"] = T5EncoderModel(narrow).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3(joint_attention_dim=4096), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(), **parts
    )
    folder = tmp_path_factory.mktemp("full")
    pipeline.save_pretrained(folder)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.folder = folder
    return pipeline


@torch.no_grad()
def test_embeddings_have_the_layout_of_stable_diffusion_3_in_bfloat16(full_size, tmp_path):
    prompt = PROMPTS[0]
    encode_prompts_file(full_size.folder, [prompt], tmp_path / "prompts.json", dtype=torch.bfloat16)
    cache = PromptCache(tmp_path / "prompts.json")
    (embeds,), (pooled,) = cache.take([prompt_key(prompt)])
    assert (embeds.shape, pooled.shape, cache.tokens) == ((77 + 256, 4096), (768 + 1280,), 333)
    assert embeds.dtype == pooled.dtype == torch.bfloat16
    assert (embeds[:77, 768 + 1280 :] == 0).all() and (embeds[77:, 768 + 1280 :] != 0).any(1).all()
    theirs, _, theirs_pooled, _ = full_size.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=256)
    assert torch.equal(embeds, theirs[0]) and torch.equal(pooled, theirs_pooled[0])
    for name, tokens, where in (("", full_size.tokenizer, slice(768)), ("_2", full_size.tokenizer_2, slice(768, 2048))):
        encoder = getattr(full_size, f"text_encoder{name}")
        ids = tokens(prompt, padding="max_length", return_tensors="pt").input_ids
        seen = encoder(ids, output_hidden_states=True)
        assert ids.shape == (1, 77) and torch.equal(embeds[:77, where], seen.hidden_states[-2][0])
        assert torch.equal(pooled[where], seen.text_embeds[0])


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The prompts that were encoded since."""
    prompts, encode = [], TextEncoders.encode

    def remember(self, texts):
        prompts.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(TextEncoders, "encode", remember)
    return prompts


def files_of(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("encoded/*/*.safetensors")}


def test_the_cache_holds_each_distinct_prompt_and_the_empty_one_as_encoded_alone(base, encoders, tmp_path):
    encode_prompts_file(base.folder, [*PROMPTS, *PROMPTS[::-1]], tmp_path / "prompts.json")
    cache = PromptCache(tmp_path / "prompts.json")
    assert cache.prompts == {prompt_key(prompt): prompt for prompt in (*PROMPTS, "")}
    embeds, pooled = cache.take([prompt_key(PROMPTS[1]), prompt_key(PROMPTS[1]), prompt_key(PROMPTS[0]), NO_PROMPT])
    for row, prompt in enumerate((PROMPTS[1], PROMPTS[1], PROMPTS[0], "")):
        alone = encoders.encode([prompt])
        assert torch.equal(embeds[row], alone[0][0]) and torch.equal(pooled[row], alone[1][0])


def test_the_store_is_named_by_encoders_dtype_and_length_and_the_index_finds_it_wherever_both_lie(base, tmp_path):
    encode_prompts_file(base.folder, PROMPTS, tmp_path / "here" / "train.json")
    index = read_json(tmp_path / "here" / "train.json")
    assert index["store"] == f"encoded/{hash_of_encoders(base.folder)[:16]}-float32-50"
    assert (index["encoders"], index["dtype"], index["t5_length"]) == (hash_of_encoders(base.folder), "float32", 50)
    assert set(files_of(tmp_path / "here")) == set(index["prompts"]) == {prompt_key(prompt) for prompt in (*PROMPTS, "")}
    before = PromptCache(tmp_path / "here" / "train.json").take([NO_PROMPT])
    (tmp_path / "here").rename(tmp_path / "there")
    after = PromptCache(tmp_path / "there" / "train.json").take([NO_PROMPT])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True))


def test_only_prompts_that_are_new_are_encoded_and_splits_share_what_is_there(base, tmp_path, encoded, monkeypatch):
    encode_prompts_file(base.folder, ["road", "water"], tmp_path / "train.json")
    encode_prompts_file(base.folder, ["water", "forest"], tmp_path / "test.json")
    assert encoded == ["", "road", "water", "forest"]
    times = {key: path.stat().st_mtime_ns for key, path in files_of(tmp_path).items()}
    index = (tmp_path / "train.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "from_folder", None)  # they are not even loaded
        encode_prompts_file(base.folder, ["water", "road"], tmp_path / "train.json")
    assert encoded[4:] == [] and (tmp_path / "train.json").read_bytes() == index
    assert times == {key: path.stat().st_mtime_ns for key, path in files_of(tmp_path).items()}
    assert set(PromptCache(tmp_path / "train.json").prompts.values()) == {"", "road", "water"}, "not the other split's"


def test_an_encoding_that_was_stopped_continues(base, tmp_path, encoded, monkeypatch):
    everything, encode = ["a", "b", "c", "d"], TextEncoders.encode

    def stop_at_c(self, texts):
        if texts == ["c"]:
            raise KeyboardInterrupt
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "encode", stop_at_c)
        with pytest.raises(KeyboardInterrupt):
            encode_prompts_file(base.folder, everything, tmp_path / "train.json")
    assert not (tmp_path / "train.json").exists() and encoded == ["", "a", "b"]
    encode_prompts_file(base.folder, everything, tmp_path / "train.json")
    assert encoded == ["", *everything] and len(PromptCache(tmp_path / "train.json").take(list(map(prompt_key, everything)))[0]) == 4


def test_what_another_job_encodes_meanwhile_is_not_encoded_twice(base, tmp_path, encoded, monkeypatch):
    load = TextEncoders.from_folder

    def load_beside_another(*arguments):
        monkeypatch.setattr(TextEncoders, "from_folder", load)
        encode_prompts_file(base.folder, ["b", "c"], tmp_path / "test.json")
        return load(*arguments)

    monkeypatch.setattr(TextEncoders, "from_folder", load_beside_another)
    encode_prompts_file(base.folder, ["b", "c", "d"], tmp_path / "train.json")
    assert sorted(encoded) == ["", "", "b", "c", "d"], "the first one may be encoded by both"


def test_another_dtype_and_other_encoders_have_stores_of_their_own(base, tmp_path, encoded):
    cut = tmp_path / "cut"
    shutil.copytree(base.folder, cut)
    config = read_json(cut / "tokenizer_3" / "tokenizer_config.json")
    write_json(cut / "tokenizer_3" / "tokenizer_config.json", config | {"model_max_length": 20})
    encode_prompts_file(base.folder, ["road"], tmp_path / "whole.json")
    encode_prompts_file(base.folder, ["road"], tmp_path / "half.json", dtype=torch.bfloat16)
    encode_prompts_file(cut, ["road"], tmp_path / "cut.json")
    whole, half, shorter = (PromptCache(tmp_path / f"{name}.json").take([prompt_key("road")]) for name in ("whole", "half", "cut"))
    assert encoded == ["", "road"] * 3 and len(list((tmp_path / "encoded").iterdir())) == 3
    assert [part.dtype for part in (*whole, *half)] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for ours, theirs in zip(whole, half, strict=True):
        assert 0 < (ours - theirs.float()).abs().max() < 0.05 * ours.abs().max()
    assert (whole[0].shape, shorter[0].shape) == ((1, 90, 32), (1, 60, 32))
    PromptCache(tmp_path / "half.json").check(base.folder)
    with pytest.raises(DataError, match=r"cut\.json: embeddings of other text encoders than those of"):
        PromptCache(tmp_path / "cut.json").check(base.folder)


def remove(path: Path, _: Path) -> None:
    path.unlink()


def cut_off(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def exchange(path: Path, another: Path) -> None:
    shutil.copy(another, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "missing, of "),
        (cut_off, "not a readable embedding of prompt 'road'"),
        (empty, "not a readable embedding of prompt 'road'"),
        (exchange, "not the embedding of prompt 'road' by the encoders"),
    ],
)
def test_a_file_that_is_missing_or_spoilt_is_named_and_running_again_makes_it(
    base, tmp_path, encoded, spoil: Callable[[Path, Path], None], message
):
    encode_prompts_file(base.folder, ["road", "water"], tmp_path / "train.json")
    keys, index = [prompt_key("water"), prompt_key("road")], tmp_path / "train.json"
    right = PromptCache(index).take(keys)
    files = files_of(tmp_path)
    spoil(files[keys[1]], files[keys[0]])
    remedy = rf"; delete {index} and run the workflow again, it encodes what is missing"
    with pytest.raises(DataError, match=rf"{files[keys[1]]}: {message}.*{remedy}"):
        PromptCache(index).take(keys)
    index.unlink()
    encoded.clear()
    encode_prompts_file(base.folder, ["road", "water"], index)
    assert encoded == ["road"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(PromptCache(index).take(keys), right, strict=True))


def test_a_file_of_another_encoder_or_length_under_the_right_name_is_refused(base, tmp_path):
    encode_prompts_file(base.folder, ["road"], tmp_path / "train.json")
    index = read_json(tmp_path / "train.json")
    for change in ({"encoders": "0" * 64}, {"dtype": "bfloat16"}, {"t5_length": 49}):
        write_json(tmp_path / "other.json", index | change)
        with pytest.raises(DataError, match="not the embedding of prompt 'road' by the encoders, dtype and length"):
            PromptCache(tmp_path / "other.json").take([prompt_key("road")])


def test_no_more_files_are_held_open_than_is_allowed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders_module, "OPEN_FILES", 2)
    opened, open_embedding = [], encoders_module._open_embedding
    monkeypatch.setattr(encoders_module, "_open_embedding", lambda path, *rest: opened.append(path.stem) or open_embedding(path, *rest))
    write_prompts({text: (torch.full((3, 4), float(ord(text))), torch.zeros(2)) for text in "abc"}, tmp_path / "train.json")
    cache, (a, b, c) = PromptCache(tmp_path / "train.json"), map(prompt_key, "abc")
    assert [int(row[0, 0]) for row in cache.take([a, b, a, b, c, a])[0]] == [97, 98, 97, 98, 99, 97]
    assert opened[:4] == [a, b, c, a], "the one not used for longest is closed"


def test_what_is_missing_or_damaged_is_named(base, tmp_path):
    for load in (TextEncoders.from_folder, lambda folder: encode_prompts_file(folder, ["road"], tmp_path / "prompts.json")):
        with pytest.raises(WeightsError, match="tokenizer is missing; the folder must be a diffusers pipeline with all three"):
            load(tmp_path)
    with pytest.raises(DataError, match="no prompts to encode"):
        encode_prompts_file(base.folder, [], tmp_path / "prompts.json")
    with pytest.raises(DataError, match="absent"):
        PromptCache(tmp_path / "absent")
    for content, message in (("{", "not valid JSON"), ("{}", "not an index of prompts; delete it and run the workflow again")):
        (tmp_path / "broken").write_text(content)
        with pytest.raises(DataError, match=f"broken: {message}"):
            PromptCache(tmp_path / "broken")
    encode_prompts_file(base.folder, ["road"], tmp_path / "prompts.json")
    with pytest.raises(DataError, match=prompt_key("water")):
        PromptCache(tmp_path / "prompts.json").take([prompt_key("water")])
