"""Training the generator: resumable to the bit, frozen where it should be, stopped when it diverges."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from generator_trainings import control, stop_before_batch, train, weights_of
from prompt_files import write_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from segmentor_tiles import PALETTE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_sd3
from tiny_world import World, training_job
from torch.utils._pytree import tree_leaves

from crfm_core import DataError, ResourceError, WeightsError
from crfm_core.data.rasters import read_rgb
from crfm_core.files import read_json, write_json
from crfm_core.generator import training
from crfm_core.generator.latents import CachedLatents, draw_batch, tiles_of
from crfm_core.generator.resuming import read_checkpoint
from crfm_core.generator.training import train_generator
from crfm_core.generator.validation import open_checkpoint, sample_validation
from crfm_core.generator.weights import choose_trainable, initial_network
from crfm_core.manifest import read_manifest
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.models.sd3_names import released_key
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.sampler import open_generator
from crfm_core.settings import Control
from crfm_core.text.encoders import NO_PROMPT, PromptCache, hash_of_encoders


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(world, folder, control())
    return folder


@pytest.mark.parametrize("ema", [0.9, None])
def test_a_stopped_training_continues_to_the_same_weights(world, trained, tmp_path, monkeypatch, ema):
    whole = weights_of(trained / "out") if ema else train(world, tmp_path / "whole", control(ema=None))
    asked = stop_before_batch(monkeypatch, 2 * 5 + 2)  # in the middle of the sixth update; the last checkpoint is after the third
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "parts", control(ema=ema))
    assert not (tmp_path / "parts" / "out").exists() and (tmp_path / "parts" / "work" / "checkpoint-3.pt").is_file()
    resumed = train(world, tmp_path / "parts", control(ema=ema))
    assert asked[12] == range(12, 14), "continues with the fourth update: four samples each"
    assert same(whole, resumed)
    assert not (tmp_path / "parts" / "work").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(world, tmp_path, monkeypatch):
    asked = stop_before_batch(monkeypatch, 2 * 4)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path, control())
    other = train(world, tmp_path, control(learning_rate=2e-3))
    assert asked[8] == range(2)
    assert same(other, train(world, tmp_path / "fresh", control(learning_rate=2e-3)))


def test_the_chosen_branches_change_and_the_others_do_not_by_a_bit(world, trained):
    base = MaskMMDiT.from_sd3(SD3Transformer2DModel.from_pretrained(world.base, subfolder="transformer"), "own", "copy")
    before, after = base.state_dict(), weights_of(trained / "out")
    branches = base.branch_parameters()
    assert min(map(len, branches.values())) > 10
    assert [name for name, _ in branches["text"] if not torch.equal(before[name], after[name])] == []
    learned = [name for branch in ("image", "mask") for name, _ in branches[branch]]
    assert [name for name in learned if torch.equal(before[name], after[name])] == []


def test_accumulated_and_split_batches_are_the_same_samples(world, tmp_path):
    together = train(world, tmp_path / "a", control(batch_size=4, accumulate=1, ema=None))
    split = train(world, tmp_path / "b", control(batch_size=1, accumulate=4, ema=None))
    assert all(torch.allclose(together[name], split[name], rtol=0, atol=2e-4) for name in together)


def test_a_batch_is_made_of_its_running_numbers_whoever_draws_it(world):
    cached = CachedLatents(world.latents, read_manifest(world.captions))
    vae = AutoencoderKL.from_pretrained(world.base, subfolder="vae")

    def batch(numbers: range):
        return draw_batch(numbers, cached, vae, 3.0, control())

    whole, halves = batch(range(8, 16)), [batch(range(8, 12)), batch(range(12, 16))]
    for index in range(4):
        assert torch.equal(whole[index], torch.cat([half[index] for half in halves]))
    assert whole[4] == halves[0][4] + halves[1][4]
    assert whole[3].shape == (8,) and len(set(whole[3].tolist())) > 4
    assert not torch.equal(batch(range(2))[2], draw_batch(range(2), cached, vae, 3.0, control(seed=6))[2])


def test_the_configured_share_of_prompts_is_empty_and_nothing_else_of_the_batch_changes(world):
    cached = CachedLatents(world.latents, read_manifest(world.captions))
    vae = AutoencoderKL.from_pretrained(world.base, subfolder="vae")
    with_all, without = (draw_batch(range(400), cached, vae, 3.0, control(caption_dropout=share)) for share in (0, 0.1))
    assert not any(with_all.unprompted) and 20 <= sum(without.unprompted) <= 60
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(with_all[:4], without[:4], strict=True))


def test_a_generator_trained_with_empty_prompts_says_so_and_learns_from_them(world, tmp_path):
    without = train(world, tmp_path / "without", control(caption_dropout=0.9999))
    assert MaskToImagePipeline.load_config(tmp_path / "without" / "out")["caption_dropout"] == 0.9999
    # the same as with the empty prompt's embedding under every prompt's name
    cache, emptied = PromptCache(world.prompts), tmp_path / "prompts.json"
    empty = tuple(part[0] for part in cache.take([NO_PROMPT]))
    write_prompts(dict.fromkeys(cache.prompts.values(), empty), emptied, hash_of_encoders(world.base))
    assert same(without, train(world, tmp_path / "emptied", control(), prompts=emptied))


def test_every_pass_shows_every_tile_once_in_an_order_of_its_own():
    rows = list(tiles_of(range(30), 10, seed=1))
    passes = [rows[:10], rows[10:20], rows[20:]]
    assert [sorted(one) for one in passes] == [list(range(10))] * 3 and len({tuple(one) for one in passes}) == 3
    assert list(tiles_of(range(13, 27), 10, seed=1)) == rows[13:27]


def test_a_loss_that_is_no_number_stops_the_training(world, tmp_path):
    tensors = load_file(world.latents)
    broken = tmp_path / "latents.safetensors"
    tensors["mean"][:] = float("nan")
    save_file(tensors, broken, metadata=metadata(world.latents))
    with pytest.raises(WeightsError, match=r"at step 1 the loss became nan .*; no checkpoint was written yet; lower learning_rate"):
        train(world, tmp_path, control(), latents=broken)
    assert not (tmp_path / "out").exists()


def test_the_folder_is_a_pipeline_that_samples(trained):
    pipeline = MaskToImagePipeline.from_pretrained(trained / "out")
    assert (pipeline.config.num_classes, pipeline.config.mask_code) == (3, "grey")
    masks = np.zeros((1, 32, 32), np.uint8)
    image = pipeline(masks, "a satellite image of soil", num_inference_steps=2, output_type="np", progress=False).images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


# --------------------------------------------------------------------------------------------------- what trains, and how


def base_weights(world: World, settings: Control) -> dict[str, torch.Tensor]:
    return initial_network(world.base, settings, 3).state_dict()


@pytest.mark.parametrize("scheme", ["triattention", "siamese", "adapter", "controlnet"])
def test_each_scheme_trains_its_own_branches_learns_from_the_masks_and_samples(world, tmp_path, scheme):
    settings = control(scheme=scheme, trainable=["image", "mask"], steps=150, accumulate=1, batch_size=4, learning_rate=3e-3, ema=None)
    train(world, tmp_path, settings)
    before, pipeline = base_weights(world, settings), open_generator(tmp_path / "out")
    after = pipeline.transformer.state_dict()
    for branch, members in pipeline.transformer.branch_parameters().items():
        changed = {not torch.equal(before[name], after[name]) for name, _ in members}
        assert changed == {branch != "text"}, branch
    losses = tmp_path / "losses.json"
    sample_validation(pipeline, world.captions, world.prompts, world.root, PALETTE, tmp_path / "v.png", losses, num_steps=2)
    found = read_json(losses)
    assert found["loss"] < found["loss_mask_ignored"]
    assert [entry["sigma"] for entry in found["by_sigma"]] == sorted((entry["sigma"] for entry in found["by_sigma"]), reverse=True)
    assert read_rgb(tmp_path / "v.png").shape == (6 * 32, 3 * 32, 3)


@pytest.mark.parametrize("scheme", ["adapter", "controlnet"])
def test_the_base_stays_frozen_by_default_where_the_scheme_says_so(world, tmp_path, scheme):
    after = train(world, tmp_path, control(scheme=scheme, ema=None))
    before = base_weights(world, control(scheme=scheme))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mask." in name or name.startswith(("mask_embed", "controlnet.")) for name in changed)


def test_low_rank_updates_are_merged_and_resumed(world, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    settings = control(lora={"rank": 2, "alpha": 4, "branches": ["image"]}, ema=None)
    whole = train(world, tmp_path / "whole", settings)
    stop_before_batch(monkeypatch, 2 * 5 + 2)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "parts", settings)
    assert same(whole, train(world, tmp_path / "parts", settings))
    before = base_weights(world, settings)
    assert whole.keys() == before.keys()
    name = "blocks.0.image.attention.to_q.weight"
    assert torch.linalg.matrix_rank(whole[name] - before[name], atol=1e-6) == 2
    assert torch.equal(whole["blocks.0.image.attention.norm_q.weight"], before["blocks.0.image.attention.norm_q.weight"])
    assert torch.linalg.matrix_rank(whole[name.replace("image", "mask")] - before[name.replace("image", "mask")], atol=1e-6) > 2


def test_eight_bit_state_trains_and_resumes(world, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", partial(bitsandbytes.optim.AdamW8bit, min_8bit_size=0))  # weights here are tiny
    settings = control(optimiser="adamw_8bit", ema=None)
    whole = train(world, tmp_path / "whole", settings)
    stop_before_batch(monkeypatch, 2 * 5 + 2)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "parts", settings)
    state = read_checkpoint(tmp_path / "parts" / "work" / "checkpoint-3.pt")["optimiser"]["state"]
    assert {value.dtype for value in tree_leaves(state) if torch.is_tensor(value)} == {torch.uint8, torch.float32}
    assert same(whole, train(world, tmp_path / "parts", settings))


def test_bfloat16_keeps_the_trained_weights_in_float32_and_the_frozen_ones_to_the_bit(world, tmp_path):
    settings = control(precision="bf16", ema=None)
    network = initial_network(world.base, settings, 3)
    names = choose_trainable(network, settings)
    assert {network.get_parameter(name).dtype for name in names} == {torch.float32}
    assert network.blocks[0].text.attention.to_q.weight.dtype == torch.bfloat16
    before, after = base_weights(world, settings), train(world, tmp_path, settings)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())
    assert torch.equal(before["blocks.0.text.attention.to_q.weight"], after["blocks.0.text.attention.to_q.weight"])
    exact = train(world, tmp_path / "exact", control(ema=None))
    assert all(torch.allclose(after[name], exact[name], rtol=0, atol=0.02) for name in exact)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_to_the_same_weights(world, tmp_path):
    plain, compiled = (train(world, tmp_path / str(flag), control(compile=flag, ema=None)) for flag in (False, True))
    assert all(torch.allclose(plain[name], compiled[name], rtol=0, atol=1e-3) for name in plain)


def test_the_curves_hold_each_step_once_and_the_loss_by_noise_level(world, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    stop_before_batch(monkeypatch, 2 * 6 + 1)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path, control())
    train(world, tmp_path, control())
    curves = EventAccumulator(str(tmp_path / "curves"))
    curves.Reload()
    assert [point.step for point in curves.Scalars("loss")] == [2, 4, 6, 7]
    assert all(np.isfinite(point.value) for tag in ("loss", "learning_rate", "gradient_norm") for point in curves.Scalars(tag))
    by_sigma = [tag for tag in curves.Tags()["scalars"] if tag.startswith("loss_by_sigma/")]
    assert "loss_by_sigma/0.9-1.0" in by_sigma and len(by_sigma) > 3


# ------------------------------------------------------------------------------------------------ checkpoints and starts


def test_the_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(world, trained, tmp_path, monkeypatch, capsys):
    settings = control(checkpoint_every=1, keep_checkpoints=2)
    stop_before_batch(monkeypatch, 2 * 5 + 1)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path, settings)
    work = tmp_path / "work"
    assert sorted(path.name for path in work.glob("*.pt")) == ["checkpoint-4.pt", "checkpoint-5.pt"]
    newest = work / "checkpoint-5.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert same(train(world, tmp_path, settings), weights_of(trained / "out"))
    said = capsys.readouterr().out
    assert "checkpoint-5.pt: is damaged" in said and "continuing from step 4 of 7" in said


def test_a_checkpoint_can_be_sampled_while_training_goes_on(world, tmp_path, monkeypatch):
    stop_before_batch(monkeypatch, 2 * 5)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path, control())
    pipeline = open_checkpoint(tmp_path / "work" / "checkpoint-3.pt", world.base, control(), 3)
    shorter = train(world, tmp_path / "shorter", control(steps=3, schedule="constant", warmup=0))
    assert pipeline.transformer.state_dict().keys() == shorter.keys()
    saved = read_checkpoint(tmp_path / "work" / "checkpoint-3.pt")["ema"]["model"]
    assert all(torch.equal(pipeline.transformer.state_dict()[name], value) for name, value in saved.items())


def test_a_training_that_another_run_has_finished_is_not_repeated(world, trained, monkeypatch):
    asked = stop_before_batch(monkeypatch, 1)
    before = weights_of(trained / "out")
    train_generator(training_job(world, trained, control()))
    assert not asked and same(before, weights_of(trained / "out"))


def test_a_loss_that_explodes_names_the_last_good_checkpoint(world, tmp_path):
    settings = control(learning_rate=1e30, warmup=0, schedule="constant", checkpoint_every=1, ema=None, clip_norm=1e30)
    with pytest.raises(WeightsError, match=r"at step \d the loss became .*checkpoint-\d\.pt holds the last good state; lower learning"):
        train(world, tmp_path, settings)
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_next_checkpoint_is_said_before_it_is_written(world, tmp_path, monkeypatch):
    asked, usage = [], shutil.disk_usage

    def shrinking(path):
        asked.append(path)
        return usage(path)._replace(free=10**12 if len(asked) == 1 else 1000)

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    with pytest.raises(ResourceError, match=r"work: 0\.0 GB needed"):
        train(world, tmp_path, control())
    assert len(asked) == 2 and not list((tmp_path / "work").glob("*.pt"))


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"])
def test_a_batch_that_does_not_fit_names_the_settings_that_help(world, tmp_path, monkeypatch, said):
    def losses(*arguments):
        raise RuntimeError(said)

    monkeypatch.setattr(training, "flow_losses", losses)
    with pytest.raises(ResourceError, match="batch_size"):
        train(world, tmp_path, control())


def test_training_starts_from_another_generator(world, trained, tmp_path):
    start = control(steps=0, start_from=str(trained / "out"), ema=None)
    assert same(train(world, tmp_path, start), weights_of(trained / "out"))


def test_training_starts_from_a_file_of_the_released_code(world, trained, tmp_path):
    weights = weights_of(trained / "out")
    save_file({released_key(name): value for name, value in weights.items() if ".text." not in name}, tmp_path / "released.safetensors")
    assert same(train(world, tmp_path, control(steps=0, start_from=str(tmp_path / "released.safetensors"), ema=None)), weights)


def test_a_start_that_does_not_fit_is_refused_with_what_differs(world, trained, tmp_path):
    def refused(match: str, **changes) -> None:
        settings = control(steps=0, start_from=changes.pop("start_from", str(trained / "out")), **changes)
        with pytest.raises(WeightsError, match=match):
            train(world, tmp_path / "out", settings)

    other_classes = tmp_path / "classes"
    shutil.copytree(trained / "out", other_classes)
    index = read_json(other_classes / "model_index.json")
    write_json(other_classes / "model_index.json", index | {"num_classes": 4})
    refused("was trained with num_classes 4, here it is 3", start_from=str(other_classes))
    refused("is of scheme triattention; set `scheme`", scheme="siamese")
    refused("only scheme triattention can load those", scheme="adapter", start_from=__file__)
    refused("no file or folder", start_from=str(tmp_path / "absent.safetensors"))
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    refused("broken.pt: is damaged", start_from=str(tmp_path / "broken.pt"))
    other = tmp_path / "other"
    shutil.copytree(trained / "out", other)
    wider = MaskMMDiT.from_sd3(tiny_sd3())
    shutil.rmtree(other / "transformer")
    wider.save_pretrained(other / "transformer")
    refused(r"weights of .*other do not fit the base model: of another shape: blocks\.\S+ \(16,\) instead of \(8,\)", start_from=str(other))


def test_latents_and_prompts_of_another_base_model_are_refused(world, tmp_path):
    for part, match in (("vae", "latents of another autoencoder"), ("text_encoder_2", "embeddings of other text encoders")):
        other = tmp_path / part
        shutil.copytree(world.base, other)
        config = read_json(other / part / "config.json")
        write_json(other / part / "config.json", config | {"note": "another"})
        with pytest.raises(DataError, match=f"{match}.*; delete it and run the workflow again"):
            train(world, tmp_path / "out", control(), base=other)
    with pytest.raises(DataError, match="holds masks of another code than grey_compat"):
        train(world, tmp_path / "out", control(mask_code="grey_compat"))
    with pytest.raises(DataError, match="holds masks of another number of classes than 4"):
        train(world, tmp_path / "out", control(), num_classes=4)
