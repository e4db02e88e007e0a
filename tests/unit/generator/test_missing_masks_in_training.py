"""Training on samples without masks and on unlabelled tiles: who is drawn, what is learnt, and that a stop changes nothing."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from generator_trainings import control, stop_before_batch, train, weights_of
from safetensors import safe_open
from tiny_world import World, training_job
from unlabelled_tiles import write_unlabelled

from crfm_core import DataError
from crfm_core.files import hash_of, read_json, sha256_of
from crfm_core.generator.latents import CachedLatents, draw_batch, encode_tiles, places_of
from crfm_core.generator.tiles import TileFiles
from crfm_core.manifest import read_manifest
from crfm_core.sampling.sampler import open_generator

MIXED = {"mask_dropout": 0.4, "unlabelled_share": 0.3}


@pytest.fixture(scope="module")
def unlabelled(world, tmp_path_factory) -> TileFiles:
    return write_unlabelled(world, tmp_path_factory.mktemp("unlabelled"))


@pytest.fixture(scope="module")
def predicted(world, tmp_path_factory) -> TileFiles:
    return write_unlabelled(world, tmp_path_factory.mktemp("pseudo"), masks=True)


def batches(world: World, files: TileFiles | None, **changes):
    cached = CachedLatents(world.latents, read_manifest(world.captions))
    others = files and CachedLatents(files.latents, read_manifest(files.captions, labelled=False))
    vae = AutoencoderKL.from_pretrained(world.base, subfolder="vae")
    return lambda numbers, rows=None: draw_batch(numbers, cached, vae, 3.0, control(**changes), rows, others)


# ------------------------------------------------------------------------------------------------------------- who is drawn


def test_the_share_is_that_of_any_stretch_of_numbers_and_every_tile_comes_once_per_pass(world, unlabelled):
    for share in (0.1, 0.3, 0.5, 0.87):
        drawn = list(places_of(range(1000), share))
        for start in range(0, 1000, 100):
            assert abs(sum(of for of, _ in drawn[start : start + 100]) - 100 * share) <= 1
        for kind in (True, False):
            places = [place for of, place in drawn if of == kind]
            assert places == list(range(len(places)))
    batch = batches(world, unlabelled, **MIXED)(range(80))
    rows = {kind: [row for row, of in zip(batch.rows, batch.unlabelled, strict=True) if of == kind] for kind in (True, False)}
    assert [Counter(rows[True][start : start + 4]) for start in range(0, 24, 4)] == [Counter(range(4))] * 6
    assert [Counter(rows[False][start : start + 6]) for start in range(0, 54, 6)] == [Counter(range(6))] * 9
    left = [row for row, of in zip(*batches(world, unlabelled, **MIXED)(range(80), [1, 4])[4:8:3], strict=True) if not of]
    assert set(left) == {1, 4}


def test_a_mixed_batch_is_made_of_its_running_numbers_whoever_draws_it(world, unlabelled):
    draw = batches(world, unlabelled, **MIXED)
    whole, parts = draw(range(8, 16)), [draw(range(8, 9)), draw(range(9, 13)), draw(range(13, 16))]
    assert all(torch.equal(whole[index], torch.cat([part[index] for part in parts])) for index in range(4))
    assert all(whole[index] == list(chain.from_iterable(part[index] for part in parts)) for index in range(4, 8))
    assert {True, False} == set(whole.unlabelled)


def test_masks_are_left_out_of_the_configured_share_and_nothing_else_of_the_batch_changes(world, predicted, unlabelled):
    plain, dropped = (batches(world, None, mask_dropout=share)(range(400)) for share in (0, 0.25))
    assert all(plain.masked) and 70 <= dropped.masked.count(False) <= 130
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain[:4], dropped[:4], strict=True)) and plain.rows == dropped.rows
    without, critics = batches(world, unlabelled, **MIXED)(range(200)), batches(world, predicted, **MIXED)(range(200))
    assert not any(masked for masked, of in zip(without.masked, without.unlabelled, strict=True) if of)
    assert all(masked for masked, of in zip(critics.masked, critics.unlabelled, strict=True) if of)
    chosen = [index for index, of in enumerate(without.unlabelled) if of]
    assert not without.mask[chosen].any() and torch.equal(without.clean, critics.clean)


def test_tiles_without_labels_are_encoded_without_masks(world, unlabelled, predicted):
    with safe_open(unlabelled.latents, framework="pt") as without, safe_open(predicted.latents, framework="pt") as masked:
        assert (set(without.keys()), set(masked.keys())) == ({"mean", "logvar"}, {"mean", "logvar", "mask"})
        assert all(torch.equal(without.get_tensor(name), masked.get_tensor(name)) for name in ("mean", "logvar"))
    with pytest.raises(DataError, match="its label is '', which is no path"):
        encode_tiles(world.base, unlabelled.captions, unlabelled.captions.parent, 3, "grey", unlabelled.latents.with_name("other"))


# ------------------------------------------------------------------------------------------------------------- what is learnt


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scheme", ["triattention", "controlnet"])
def test_a_stopped_training_on_mixed_batches_continues_to_the_same_weights(world, unlabelled, tmp_path, monkeypatch, scheme):
    settings = control(scheme=scheme, trainable=["image", "mask"], **MIXED)
    whole = train(world, tmp_path / "whole", settings, unlabelled=unlabelled)
    stop_before_batch(monkeypatch, 2 * 5 + 2)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "parts", settings, unlabelled=unlabelled)
    assert (tmp_path / "parts" / "work" / "checkpoint-3.pt").is_file()
    assert same(whole, train(world, tmp_path / "parts", settings, unlabelled=unlabelled))
    assert not same(whole, train(world, tmp_path / "plain", control(scheme=scheme, trainable=["image", "mask"])))


@pytest.mark.parametrize("scheme", ["triattention", "siamese", "adapter", "controlnet"])
def test_mixed_batches_that_are_split_are_the_same_samples(world, unlabelled, tmp_path, scheme):
    settings = {"scheme": scheme, "trainable": ["image", "mask"], "ema": None} | MIXED
    together = train(world, tmp_path / "a", control(batch_size=4, accumulate=1, **settings), unlabelled=unlabelled)
    split = train(world, tmp_path / "b", control(batch_size=1, accumulate=4, **settings), unlabelled=unlabelled)
    assert all(torch.allclose(together[name], split[name], rtol=0, atol=2e-4) for name in together)


def test_unlabelled_tiles_teach_their_own_prompt_and_the_critics_masks(world, unlabelled, predicted, tmp_path):
    without = train(world, tmp_path / "without", control(unlabelled_share=0.5, ema=None), unlabelled=unlabelled)
    with_masks = train(
        world, tmp_path / "with", control(unlabelled_share=0.5, unlabelled_masks="predicted", ema=None), unlabelled=predicted
    )
    assert not same(without, with_masks)
    assert [open_generator(tmp_path / name / "out").config.knows_missing_masks for name in ("without", "with")] == [True, False]


def test_masks_that_are_asked_for_and_not_there_are_missed(world, unlabelled, tmp_path):
    settings = control(unlabelled_share=0.5, unlabelled_masks="predicted")
    with pytest.raises(DataError, match="its label is '', which is no path"):
        train(world, tmp_path, settings, unlabelled=unlabelled)
    with pytest.raises(DataError, match="unlabelled_share: no unlabelled tiles were given; set it to 0"):
        train(world, tmp_path, control(unlabelled_share=0.5))


def test_low_rank_updates_learn_from_mixed_batches(world, unlabelled, tmp_path):
    pytest.importorskip("peft")
    settings = control(lora={"rank": 2, "alpha": 4, "branches": ["image"]}, ema=None, **MIXED)
    learnt = train(world, tmp_path, settings, unlabelled=unlabelled)
    assert all(value.isfinite().all() for value in learnt.values()) and same(learnt, weights_of(tmp_path / "out"))


# --------------------------------------------------------------------------------------------------- what was there before


def test_new_keys_at_their_defaults_change_no_fingerprint_and_no_record(world, tmp_path):
    job = training_job(world, tmp_path, control())
    before = {
        "scheme": "triattention", "mask_init": "copy", "mask_mlp_modulation": "own", "controlnet_layers": None, "mask_code": "grey",
        "trainable": None, "lora": None, "start_from": None, "steps": 7, "batch_size": 2, "accumulate": 2, "processes": 1,
        "parallel": "ddp", "optimiser": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "warmup": 2, "weight_decay": 0.01,
        "clip_norm": 1.0, "ema": 0.9, "density": "uniform", "flip": 0.5, "caption_dropout": 0.0, "precision": "no",
        "gradient_checkpointing": False, "compile": False, "seed": 5,
    }  # fmt: skip
    inputs = sha256_of(world.base / "transformer", world.latents, world.prompts, world.captions)
    assert job.fingerprint() == hash_of(before, 3, inputs)
    saved = {"checkpoint_every": 3, "keep_checkpoints": 2}
    train(world, tmp_path, control())
    assert read_json(tmp_path / "out" / "training.json") == {"fingerprint": job.fingerprint(), "control": before | saved}
    for changes in ({"mask_dropout": 0.1}, {"validate_every": 2}):
        assert training_job(world, tmp_path, control(**changes)).fingerprint() != job.fingerprint()


def test_what_unlabelled_tiles_hold_is_part_of_the_fingerprint(world, unlabelled, predicted, tmp_path):
    settings = control(unlabelled_share=0.5)
    jobs = [training_job(world, tmp_path, settings, unlabelled=files) for files in (unlabelled, predicted)]
    assert jobs[0].fingerprint() != jobs[1].fingerprint()
    assert Path(jobs[0].unlabelled.latents) == unlabelled.latents
