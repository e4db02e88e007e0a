"""The best weights of a training by another split: which are chosen, that they survive a kill, and what is written beside them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from segmentor_tiles import interrupted, with_dropout, write_tiles
from segmentors import train_on

from crfm_core import DataError
from crfm_core.data.rasters import write_raster
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.segmentor.evaluation import evaluate
from crfm_core.segmentor.mmseg.running import TrainingHook
from crfm_core.segmentor.validation import Validator, best_of, gain_of_last_quarter
from crfm_core.settings import Segmentor

SMALL = Segmentor(architecture="segformer_tiny", iterations=8, batch_size=4, learning_rate=6e-3, warmup=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("tiles") / "train.parquet", 12)


@pytest.fixture(scope="module")
def val(tiles):
    return write_tiles(tiles.parent / "val.parquet", 5, seed=1, prefix="v")


@pytest.fixture
def train(tiles, tmp_path):
    """Trains on the tiles and gives the checkpoint; all of a name have one work folder."""

    def _train(name, val=None, iterations=8, **settings):
        out = tmp_path / name / "checkpoint.pth"
        segmentor = SMALL.model_copy(update=settings)
        return train_on(tiles, out, segmentor, tmp_path / f".{name}", iterations=iterations, val=val)

    return _train


def _load(path):
    return torch.load(path, weights_only=True)


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _scripted(monkeypatch, scores):
    """Let the looks at the tiles give these scores; returns the weights that were looked at."""
    scores, seen = iter(scores), []

    def measure(self, network):
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(Validator, "measure", measure)
    return seen


def test_the_earliest_of_the_best_weights_are_chosen_and_the_last_kept_beside(train, val, monkeypatch):
    seen = _scripted(monkeypatch, [10.0, 30.0, 30.0, 20.0])
    out = train("best", val, validate_every=2)
    best, last = _load(out), _load(out.with_name("last.pth"))
    assert best["meta"]["validation"] == [[2, 10.0], [4, 30.0], [6, 30.0], [8, 20.0]] and best["meta"]["chosen"] == 4
    assert _same(best["state_dict"], seen[1]) and _same(last["state_dict"], seen[3])
    assert last["meta"] == best["meta"]


def test_without_better_weights_before_there_is_one_checkpoint_and_none_of_an_earlier_training(train, val, monkeypatch):
    _scripted(monkeypatch, [30.0, 20.0, 10.0, 0.0])
    assert (last := train("again", val, validate_every=2).with_name("last.pth")).exists()
    seen = _scripted(monkeypatch, [10.0, 20.0, 30.0, 40.0])
    out = train("again", val, validate_every=2, learning_rate=1e-3)
    assert _load(out)["meta"]["chosen"] == 8 and _same(_load(out)["state_dict"], seen[3]) and not last.exists()
    plain = train("plain")
    assert "chosen" not in _load(plain)["meta"] and not plain.with_name("last.pth").exists()


def test_what_is_measured_is_what_the_checkpoints_score_and_looking_changes_nothing(train, tiles, val):
    out = train("measured", val, iterations=7, validate_every=3)
    looks = _load(out)["meta"]["validation"]
    assert [look[0] for look in looks] == [3, 6, 7]
    assert evaluate(out, val, tiles.parent)["mIoU"] == pytest.approx(dict(looks)[best_of(looks)], abs=0.1)
    last = out.with_name("last.pth") if best_of(looks) != 7 else out
    assert evaluate(last, val, tiles.parent)["mIoU"] == pytest.approx(looks[-1][1], abs=0.1)
    assert _same(_load(train("unlooked", iterations=7))["state_dict"], _load(last)["state_dict"])


@pytest.mark.parametrize("damaged", ["", "iter_4.pth", "best_*.pth"])
def test_a_stopped_training_ends_with_the_choice_and_the_weights_of_an_undisturbed_one(train, val, tmp_path, monkeypatch, damaged):
    with_dropout(monkeypatch)
    settings = {"class_weights": "median_frequency", "validate_every": 1}
    undisturbed = train("undisturbed", val, **settings)
    with interrupted(monkeypatch, TrainingHook, 6):
        train("stopped", val, **settings)
    work = tmp_path / ".stopped"
    for path in work.glob(damaged) if damaged else ():
        os.truncate(path, 1000)
    stopped = train("stopped", val, **settings)
    assert _load(stopped)["meta"]["validation"] == _load(undisturbed)["meta"]["validation"]
    assert _load(stopped)["meta"]["chosen"] == _load(undisturbed)["meta"]["chosen"]
    assert _same(_load(stopped)["state_dict"], _load(undisturbed)["state_dict"])
    assert stopped.with_name("last.pth").exists() == undisturbed.with_name("last.pth").exists()
    assert not work.exists()


def test_a_training_that_goes_back_finds_the_best_weights_of_then(train, val, tmp_path, monkeypatch):
    """Weights that were best after the checkpoint that it goes back to are forgotten, those before are still there."""
    seen = _scripted(monkeypatch, [30.0, 20.0, 20.0, 40.0])  # iterations 1...4; a checkpoint after 2 and after 4
    with interrupted(monkeypatch, TrainingHook, 4):  # the look is done, the checkpoint not yet written
        train("back", val, iterations=5, validate_every=1)
    assert {path.name for path in (tmp_path / ".back").glob("*.pth")} == {"iter_2.pth", "best_1.pth", "best_4.pth"}
    _scripted(monkeypatch, [20.0, 20.0, 20.0])
    out = train("back", val, iterations=5, validate_every=1)
    assert _load(out)["meta"]["validation"] == [[1, 30.0], [2, 20.0], [3, 20.0], [4, 20.0], [5, 20.0]]
    assert _load(out)["meta"]["chosen"] == 1 and _same(_load(out)["state_dict"], seen[0])


def test_tiles_without_a_labelled_pixel_choose_nothing(train, tiles, val):
    table = read_manifest(val)
    write_raster(tiles.parent / "blank.png", np.full((32, 32), 255, np.uint8))
    table["label"] = "blank.png"
    write_manifest(tiles.parent / "blank.parquet", table)
    with pytest.raises(DataError, match="val: the tiles of this split have no labelled pixel"):
        train("blank", tiles.parent / "blank.parquet")


def test_held_out_tiles_are_looked_at_before_the_last_quarter_and_after_it_and_choose_nothing(tiles, val, tmp_path):
    alone = train_on(tiles, tmp_path / "alone.pth", SMALL)
    out = train_on(tiles, tmp_path / "out.pth", SMALL, held_out=val)
    meta = _load(out)["meta"]
    assert [iteration for iteration, _ in meta["held_out"]] == [6, 8]
    assert meta["held_out"][-1][1] == pytest.approx(evaluate(out, val, val.parent)["mIoU"])
    assert gain_of_last_quarter(out) == meta["held_out"][1][1] - meta["held_out"][0][1]
    assert _same(_load(alone)["state_dict"], _load(out)["state_dict"]) and gain_of_last_quarter(alone) is None


def test_what_was_measured_on_held_out_tiles_survives_a_kill(tiles, val, tmp_path, monkeypatch):
    whole = train_on(tiles, tmp_path / "whole.pth", SMALL, held_out=val)
    with interrupted(monkeypatch, TrainingHook, 7):
        train_on(tiles, tmp_path / "killed.pth", SMALL, tmp_path / "work", held_out=val)
    out = train_on(tiles, tmp_path / "killed.pth", SMALL, tmp_path / "work", held_out=val)
    assert _load(out)["meta"]["held_out"] == _load(whole)["meta"]["held_out"]
