"""Training segmentors and scoring them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from segmentor_tiles import CLASSES, PALETTE, interrupted, with_dropout, write_tiles
from segmentors import train_on

from crfm_core import ConfigError, DataError, ResourceError, WeightsError
from crfm_core.data.rasters import read_rgb
from crfm_core.files import write_bytes
from crfm_core.segmentor import dataset, training
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.evaluation import evaluate, predict
from crfm_core.segmentor.mmseg import networks, running, weights
from crfm_core.settings import Evaluation, Segmentor

SMALL = Segmentor(architecture="segformer_tiny", iterations=6, batch_size=4, learning_rate=3e-3, warmup=2, checkpoint_every=2)


def _train(folder, name, manifest, segmentor=SMALL, iterations=6, seed=0):
    return train_on(manifest, folder / f"{name}.pth", segmentor, iterations=iterations, seed=seed)


def in_this_process(loader):
    """The loader of batches without processes of its own, so that a test sees what is read."""
    return lambda *args, **kwargs: loader(*args, **kwargs | {"num_workers": 0, "persistent_workers": False})


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
    scores = evaluate(checkpoint, tiles, tiles.parent, evaluation=Evaluation(batch_size=5))
    assert scores["OA"] > 60
    assert scores["tiles"] == 12
    assert scores["classes"] == CLASSES
    assert evaluate(checkpoint, tiles, tiles.parent, evaluation=Evaluation(batch_size=1))["IoU"] == pytest.approx(scores["IoU"], abs=0.1)


def test_tiles_that_memory_does_not_hold_are_read_from_copies_on_the_machines_own_disk(tiles, tmp_path, monkeypatch):
    expected = _weights(_train(tiles.parent, "in-memory", tiles))
    monkeypatch.setattr(dataset, "CACHE_BYTES", 0)
    read = []
    monkeypatch.setattr(dataset, "read_rgb", lambda path: read.append(path) or read_rgb(path))
    monkeypatch.setattr(training, "DataLoader", in_this_process(training.DataLoader))

    def train(name):
        return _weights(train_on(tiles, tmp_path / f"{name}.pth", SMALL, scratch=tmp_path / "scratch"))

    with pytest.raises(ResourceError, match=r"scratch: .*scratch cannot hold copies of tiles \(No such file"):
        train("nowhere")
    (tmp_path / "scratch").mkdir()
    assert _same(expected, train("near"))
    assert len(read) == 24 and all(path.is_relative_to(tmp_path / "scratch") for path in read)
    assert list((tmp_path / "scratch").iterdir()) == [], "they are gone afterwards"

    def full(path, content):
        if len(read) == 24 + 3:
            raise ResourceError(f"{path}: could not be written whole")
        return write_bytes(path, content)

    monkeypatch.setattr(dataset, "write_bytes", full)
    assert _same(expected, train("full"))
    assert not read[-1].is_relative_to(tmp_path / "scratch") and read[24].is_relative_to(tmp_path / "scratch")


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(tiles, monkeypatch, capsys):
    folder = tiles.parent
    with_dropout(monkeypatch)
    undisturbed = _weights(_train(folder, "undisturbed", tiles))
    with interrupted(monkeypatch, running.TrainingHook, 5):
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
        train_on(tiles, tiles.parent / "x.pth", SMALL, classes=CLASSES[:2], palette=PALETTE[:2], iterations=3)


def test_a_prediction_does_not_depend_on_its_batch(tiles, checkpoint):
    critic = load_critic(checkpoint)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert (predict(critic, images, 5) == predict(critic, images, 2)).mean() > 0.999


def test_pretrained_backbones_are_loaded_and_those_of_another_architecture_refused(checkpoint, tmp_path):
    network = networks.build_model("segformer_tiny", 7)
    weights.load_backbone(network, checkpoint)
    stored = {name.removeprefix("backbone."): tensor for name, tensor in _weights(checkpoint).items() if name.startswith("backbone.")}
    assert _same(network.backbone.state_dict(), stored)
    torch.save(stored, tmp_path / "bare.pth")
    weights.load_backbone(network, tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match="does not fit the backbone UNet"):
        weights.load_backbone(networks.build_model("unet_tiny", 7), checkpoint)


def test_mixed_precision_computes_otherwise_but_keeps_whole_weights_and_about_the_result(tiles):
    bf16 = SMALL.model_copy(update={"precision": "bf16"})
    plain, mixed = (_weights(_train(tiles.parent, one.precision, tiles, one)) for one in (SMALL, bf16))
    assert {tensor.dtype for tensor in mixed.values()} == {tensor.dtype for tensor in plain.values()}
    moved = [float((tensor.float() - mixed[name].float()).abs().max()) for name, tensor in plain.items() if "running" not in name]
    assert 0 < max(moved) < 0.02  # six steps of at most 3e-3


def test_the_weighted_loss_counts_each_pixel_by_its_class_and_ignored_ones_not_at_all():
    networks.load_mmseg()
    from mmseg.registry import MODELS

    weights = torch.tensor([0.5, 1.0, 3.0])
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    labels[:, :3] = 255
    summed = torch.nn.functional.cross_entropy(logits, labels, weights, ignore_index=255, reduction="sum")
    loss = {"type": "WeightedCrossEntropyLoss", "class_weight": weights.tolist()}
    assert MODELS.build(loss)(logits, labels, ignore_index=255) == pytest.approx(float(summed) / labels.numel())
    whole = MODELS.build({**loss, "avg_non_ignore": True})(logits, labels, ignore_index=255)
    assert whole == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels, weights, ignore_index=255)))


def test_weights_of_one_change_nothing_and_a_class_that_weighs_nothing_is_not_learned(tiles, checkpoint):
    longer = SMALL.model_copy(update={"checkpoint_every": 500})
    even = _train(tiles.parent, "even", tiles, longer.model_copy(update={"class_weights": [7.0] * 3}), iterations=60)
    for name, tensor in _weights(checkpoint).items():
        torch.testing.assert_close(_weights(even)[name], tensor, rtol=0.02, atol=0.02)
    assert torch.load(even, weights_only=True)["meta"]["class_weights"] == pytest.approx([1, 1, 1])
    without = _train(tiles.parent, "without", tiles, longer.model_copy(update={"class_weights": [1.0, 0.0, 1.0]}), iterations=60)
    with_it, without_it = (evaluate(path, tiles, tiles.parent)["IoU"][1] for path in (checkpoint, without))
    assert without_it < 5 < with_it


def test_a_training_that_continues_runs_nothing_that_its_checkpoint_holds(tiles, monkeypatch):
    """mmengine would run the configuration in a checkpoint's meta as Python, to compare it with its own."""
    folder = tiles.parent
    with interrupted(monkeypatch, running.TrainingHook, 5):
        _train(folder, "tampered", tiles)
    newest, mark = folder / ".tampered" / "iter_4.pth", folder / "ran"
    stored = weights.read_mmseg_checkpoint(newest)
    stored["meta"]["config"] = f"import os\nos.system('touch {mark}')\n"
    torch.save(stored, newest)
    _train(folder, "tampered", tiles)
    assert not mark.exists()
