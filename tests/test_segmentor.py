"""Training segmentors and scoring them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from segmentor_tiles import CLASSES, PALETTE, write_tiles

from crfm_core import ConfigError, DataError, WeightsError
from crfm_core.segmentor import openmmlab, training
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.evaluation import evaluate, predict
from crfm_core.settings import Segmentor

SMALL = Segmentor(architecture="segformer_tiny", iterations=6, batch_size=4, learning_rate=3e-3, warmup=2, checkpoint_every=2)


def _train(folder, name, manifest, segmentor=SMALL, iterations=6, seed=0):
    out = folder / f"{name}.pth"
    training.train_segmentor(manifest, folder, out, folder / f".{name}", segmentor, CLASSES, PALETTE, iterations, seed)
    return out


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("tiles") / "train.parquet", 12)


@pytest.fixture(scope="module")
def checkpoint(tiles):
    return _train(tiles.parent, "learned", tiles, SMALL.model_copy(update={"checkpoint_every": 500}), iterations=60)


def test_a_segmentor_learns_and_its_scores_are_of_the_whole_split(tiles, checkpoint):
    scores = evaluate(checkpoint, tiles, tiles.parent, batch_size=5)
    assert scores["OA"] > 60
    assert scores["tiles"] == 12
    assert scores["classes"] == CLASSES
    assert evaluate(checkpoint, tiles, tiles.parent, batch_size=1)["IoU"] == pytest.approx(scores["IoU"], abs=0.1)


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(tiles, monkeypatch, capsys):
    folder = tiles.parent
    # with dropout, so that randomness inside the network is part of the claim
    monkeypatch.setitem(
        openmmlab.ARCHITECTURES, "segformer_tiny", lambda k: openmmlab._segformer(k, 16, [1, 1, 1, 1], [1, 2, 4, 8], 32, drop=0.2)
    )
    undisturbed = _weights(_train(folder, "undisturbed", tiles))
    watch = training._Watch.after_train_iter

    def stop(self, runner, batch_idx, *args, **kwargs):
        watch(self, runner, batch_idx, *args, **kwargs)
        if batch_idx == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Watch, "after_train_iter", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(folder, "stopped", tiles)
    assert not (folder / "stopped.pth").exists()
    newest = folder / ".stopped" / "iter_4.pth"
    os.truncate(newest, newest.stat().st_size // 2)
    assert _same(undisturbed, _weights(_train(folder, "stopped", tiles)))
    assert "continuing after iteration 2" in capsys.readouterr().out
    assert not (folder / ".stopped").exists()


def test_another_seed_gives_another_segmentor(tiles):
    one, other = (_weights(_train(tiles.parent, f"seed{seed}", tiles, iterations=3, seed=seed)) for seed in (1, 2))
    assert not _same(one, other)


def test_a_diverging_run_stops_and_names_the_iteration(tiles):
    wild = SMALL.model_copy(update={"optimiser": "SGD", "learning_rate": 1e30, "warmup": 0})
    with pytest.raises(ConfigError, match=r"diverged.*iteration \d+.*learning_rate"):
        _train(tiles.parent, "wild", tiles, wild)


def test_a_label_outside_the_classes_is_refused_with_its_file(tiles):
    with pytest.raises(DataError, match=r"label.*\.png: class id 2"):
        training.train_segmentor(tiles, tiles.parent, tiles.parent / "x.pth", tiles.parent / ".x", SMALL, CLASSES[:2], PALETTE[:2], 3, 0)


def test_draws_follow_the_weights_exactly_and_depend_on_nothing_but_seed_and_place():
    def first(count, start=0, seed=0):
        draws = iter(training.WeightedDraws(np.array([3.0, 1.0, 0.0, 1.5]), seed, start))
        return [next(draws) for _ in range(count)]

    rounds = np.bincount([draw.row for draw in first(600)], minlength=4)
    assert abs(rounds - 600 * np.array([3, 1, 0, 1.5]) / 5.5).max() <= 100
    assert rounds[2] == 0
    assert first(40)[13:] == first(27, start=13)
    assert first(40) != first(40, seed=1)
    equal = iter(training.WeightedDraws(np.ones(7), 0))
    assert sorted(next(equal).row for _ in range(7)) == list(range(7))


def test_augmentation_moves_image_and_label_together():
    label = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = np.repeat(label[..., None], 3, axis=2)
    for seed in range(20):
        lit, moved = training.augment(image, label, np.random.default_rng(seed))
        brightness = lit[..., 0].ravel()[np.argsort(moved.ravel())]
        assert (np.diff(brightness) >= 0).all()


def test_a_prediction_does_not_depend_on_its_batch(tiles, checkpoint):
    critic = load_critic(checkpoint)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert (predict(critic, images, 5) == predict(critic, images, 2)).mean() > 0.999


@pytest.mark.parametrize("architecture", ["unet_tiny", "pspnet_r50", "segformer_b2"])
def test_every_architecture_gives_one_logit_per_class_and_pixel(architecture):
    network = openmmlab.build_model(architecture, 5).eval()
    with torch.no_grad():
        logits = network.encode_decode(torch.rand(1, 3, 64, 64), [{"img_shape": torch.Size([64, 64])}])
    assert logits.shape == (1, 5, 64, 64)


def test_pretrained_backbones_are_loaded_and_those_of_another_architecture_refused(checkpoint, tmp_path):
    network = openmmlab.build_model("segformer_tiny", 7)
    openmmlab.load_backbone(network, checkpoint)
    stored = {name.removeprefix("backbone."): tensor for name, tensor in _weights(checkpoint).items() if name.startswith("backbone.")}
    assert _same(network.backbone.state_dict(), stored)
    torch.save(stored, tmp_path / "bare.pth")
    openmmlab.load_backbone(network, tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match="does not fit the backbone UNet"):
        openmmlab.load_backbone(openmmlab.build_model("unet_tiny", 7), checkpoint)
