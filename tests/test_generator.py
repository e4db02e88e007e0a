"""Training the generator: resumable to the bit, frozen where it should be, stopped when it diverges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from segmentor_tiles import CLASSES
from tiny_world import World

from crfm_core import DataError, WeightsError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.generator import training
from crfm_core.generator.latents import CachedLatents, encode_tiles
from crfm_core.generator.training import train_generator
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.models.mask_encoding import mask_latents
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import Control

STEPS = 7


def control(**changes) -> Control:
    settings = {"steps": STEPS, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-3, "warmup": 2, "ema": 0.9, "checkpoint_every": 3}
    return Control(**(settings | {"mask_init": "copy", "seed": 5} | changes))


def train(world: World, folder: Path, settings: Control, **changes) -> dict[str, torch.Tensor]:
    """Train into ``folder``; the weights that were written."""
    arguments = {"base": world.base, "latents": world.latents, "prompts": world.prompts, "captions": world.captions}
    train_generator(**(arguments | changes), num_classes=3, control=settings, out=folder / "out", work=folder / "work")
    return weights_of(folder / "out")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(world, folder, control())
    return folder


def stop_before_batch(monkeypatch, count: int) -> list[range]:
    """Interrupt training when it asks for its ``count``-th batch from now; the list fills with what it asked for."""
    asked, batch = [], training._batch

    def interrupting(numbers, *arguments):
        asked.append(numbers)
        if len(asked) == count:
            raise KeyboardInterrupt
        return batch(numbers, *arguments)

    monkeypatch.setattr(training, "_batch", interrupting)
    return asked


@pytest.mark.parametrize("ema", [0.9, None])
def test_a_stopped_training_continues_to_the_same_weights(world, trained, tmp_path, monkeypatch, ema):
    whole = weights_of(trained / "out") if ema else train(world, tmp_path / "whole", control(ema=None))
    asked = stop_before_batch(monkeypatch, 2 * 5 + 2)  # in the middle of the sixth update; the last checkpoint is after the third
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "parts", control(ema=ema))
    assert not (tmp_path / "parts" / "out").exists() and (tmp_path / "parts" / "work" / "checkpoint.pt").is_file()
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
    cached = CachedLatents(world.latents, list(read_manifest(world.captions).tile_id))
    vae = AutoencoderKL.from_pretrained(world.base, subfolder="vae")

    def batch(numbers: range):
        return training._batch(numbers, cached, vae, 3.0, control(), torch.device("cpu"))

    whole, halves = batch(range(8, 16)), [batch(range(8, 12)), batch(range(12, 16))]
    for index in range(4):
        assert torch.equal(whole[index], torch.cat([half[index] for half in halves]))
    assert whole[4] == halves[0][4] + halves[1][4]
    assert whole[3].shape == (8,) and len(set(whole[3].tolist())) > 4
    assert not torch.equal(batch(range(2))[2], training._batch(range(2), cached, vae, 3.0, control(seed=6), torch.device("cpu"))[2])


def test_every_pass_shows_every_tile_once_in_an_order_of_its_own():
    rows = list(training._rows(range(30), 10, seed=1))
    passes = [rows[:10], rows[10:20], rows[20:]]
    assert [sorted(one) for one in passes] == [list(range(10))] * 3 and len({tuple(one) for one in passes}) == 3
    assert list(training._rows(range(13, 27), 10, seed=1)) == rows[13:27]


def test_a_loss_that_is_no_number_stops_the_training(world, tmp_path):
    tensors = load_file(world.latents)
    broken = tmp_path / "latents.safetensors"
    tensors["mean"][:] = float("nan")
    save_file(tensors, broken, metadata=metadata(world.latents))
    with pytest.raises(WeightsError, match="the loss became nan at step 1; no checkpoint was written yet; lower learning_rate"):
        train(world, tmp_path, control(), latents=broken)
    assert not (tmp_path / "out").exists()


def test_the_folder_is_a_pipeline_that_samples(trained):
    pipeline = MaskToImagePipeline.from_pretrained(trained / "out")
    assert (pipeline.config.num_classes, pipeline.config.mask_code) == (3, "grey")
    masks = np.zeros((1, 32, 32), np.uint8)
    image = pipeline(masks, "a satellite image of soil", num_inference_steps=2, output_type="np", progress=False).images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


# -------------------------------------------------------------------------------------------------------------- latents


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@torch.no_grad()
def test_cached_latents_are_those_of_the_tile_and_of_the_flipped_tile(world):
    table = read_manifest(world.tiles)
    vae = AutoencoderKL.from_pretrained(world.base, subfolder="vae").eval()
    cached = CachedLatents(world.latents, list(table.tile_id))
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
    ids = list(read_manifest(world.tiles).tile_id)
    for other in (ids[::-1], ids[:-1]):
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
            CachedLatents(tmp_path / name, [])
