"""Looks at held-out tiles while training: which tiles, the weights of the lowest loss, an early end, and that a kill changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from generator_trainings import control, train
from unlabelled_tiles import write_unlabelled

from crfm_core.files import read_json
from crfm_core.generator import training
from crfm_core.generator.best_weights import BestWeights
from crfm_core.generator.held_out import choose_held_out, first_by_hash
from crfm_core.generator.resuming import read_checkpoint
from crfm_core.generator.validation import open_checkpoint
from crfm_core.manifest import read_manifest


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def found(folder) -> dict:
    return read_json(folder / "out" / "training.json")["validation"]


def script_losses(monkeypatch, losses: dict[int, float]) -> None:
    """Let looks after so many updates find these losses."""
    look = training.look

    def scripted(step, best, *arguments):
        monkeypatch.setattr(training, "losses_by_level", lambda *inputs: iter([(0.5, losses[step])]))
        look(step, best, *arguments)

    monkeypatch.setattr(training, "look", scripted)


def interrupt_before(monkeypatch, count: int) -> None:
    asked, batch = [], training.draw_batch

    def interrupting(*arguments):
        asked.append(arguments[0])
        if len(asked) == count:
            raise KeyboardInterrupt
        return batch(*arguments)

    monkeypatch.setattr(training, "draw_batch", interrupting)


SCHEDULE = {"schedule": "constant", "warmup": 0, "validate_every": 1, "batch_size": 2, "accumulate": 1}


@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_early_stop_keeps_the_weights_of_the_lowest_loss(world, tmp_path, monkeypatch, ema):
    script_losses(monkeypatch, {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 0.1})
    stopped = train(world, tmp_path / "stopped", control(patience=2, ema=ema, **SCHEDULE))
    assert [look["step"] for look in found(tmp_path / "stopped")["history"]] == [1, 2, 3, 4], "an equal loss is no lower one"
    assert found(tmp_path / "stopped")["step"] == 2
    assert same(stopped, train(world, tmp_path / "shorter", control(steps=2, ema=ema, **SCHEDULE)))


@pytest.mark.parametrize("killed_at", [3, 5])
@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_training_ends_with_the_same_weights_and_history(world, tmp_path, monkeypatch, killed_at, every):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 1.2, 6: 0.1, 7: 0.1}
    settings = control(patience=3, ema=0.9, checkpoint_every=every, **SCHEDULE)
    script_losses(monkeypatch, losses)
    whole = train(world, tmp_path / "whole", settings)
    interrupt_before(monkeypatch, killed_at)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "parts", settings)
    assert same(whole, train(world, tmp_path / "parts", settings))
    assert found(tmp_path / "parts") == found(tmp_path / "whole") and found(tmp_path / "whole")["step"] == 2


def test_a_training_killed_after_its_stop_does_not_go_on(world, tmp_path, monkeypatch):
    script_losses(monkeypatch, {1: 1.0, 2: 2.0})
    settings = control(patience=1, checkpoint_every=1, ema=None, **SCHEDULE)
    saved = training.save_generator
    monkeypatch.setattr(training, "save_generator", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path, settings)
    state = read_checkpoint(tmp_path / "work" / "checkpoint-2.pt")
    pipeline = open_checkpoint(tmp_path / "work" / "checkpoint-2.pt", world.base, settings, 3)
    monkeypatch.setattr(training, "save_generator", saved)
    interrupt_before(monkeypatch, 1)
    assert same(train(world, tmp_path, settings), pipeline.transformer.state_dict())
    assert state["best"]["history"] == found(tmp_path)["history"] == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_looking_changes_nothing_of_what_is_trained(world, tmp_path):
    """The validation tiles are others than the training's, so that the batches stay."""
    others = write_unlabelled(world, tmp_path / "others", masks=True)
    settings = control(steps=4)
    plain = train(world, tmp_path / "plain", settings)
    looked = train(world, tmp_path / "looked", control(steps=4, validate_every=4), validation=others)
    assert same(plain, looked)
    report = found(tmp_path / "looked")
    assert (report["left_out"], report["tiles"]) == (False, ["u0", "u1", "u2", "u3"])
    assert report["step"] == 4 and 0 < report["loss"] != report["loss_mask_ignored"] > 0


def test_a_share_of_the_training_tiles_is_left_out_and_never_trained_on(world, tmp_path, monkeypatch):
    drawn, batch = [], training.draw_batch

    def noting(*arguments):
        drawn.append(batch(*arguments))
        return drawn[-1]

    monkeypatch.setattr(training, "draw_batch", noting)
    train(world, tmp_path, control(validate_every=3, validation_share=0.4))
    ids = list(read_manifest(world.captions).tile_id)
    left_out = found(tmp_path)["tiles"]
    assert len(left_out) == 2 and found(tmp_path)["left_out"]
    assert {ids[row] for one in drawn for row in one.rows} == {*ids} - {*left_out}
    assert [look["step"] for look in found(tmp_path)["history"]] == [3, 6, 7], "the last weights are looked at, too"


def test_held_out_tiles_follow_from_their_ids_at_least_one_never_all_and_not_too_many():
    ids = [f"tile{number}" for number in range(1000)]
    assert [len(choose_held_out(ids[:count], 0.125)) for count in (1, 2, 3, 16, 48, 1000)] == [0, 1, 1, 2, 6, 64]
    assert len(choose_held_out(ids[:4], 0.99)) == 3
    chosen = {ids[row] for row in choose_held_out(ids[:48], 0.125)}
    turned = ids[:48][::-1]
    assert {turned[row] for row in choose_held_out(turned, 0.125)} == chosen
    assert len(first_by_hash(ids)) == 64 and first_by_hash(ids[:5]) == [0, 1, 2, 3, 4]


def test_without_a_tile_to_look_at_training_goes_by_steps_and_says_so(world, tmp_path, capsys):
    files = write_unlabelled(world, tmp_path / "single", masks=True, count=1).model_dump()
    by_steps = train(world, tmp_path / "plain", control(), **files)
    assert same(by_steps, train(world, tmp_path / "looking", control(validate_every=2, patience=1), **files))
    assert "no held-out tile to look at: training goes by steps" in capsys.readouterr().out
    assert "validation" not in read_json(tmp_path / "looking" / "out" / "training.json")


def test_a_loss_that_is_no_number_is_never_the_best():
    best = BestWeights(patience=2)
    assert not best.add(1, math.nan) and best.chosen is None and not best.over
    assert best.add(2, 5.0) and not best.add(3, math.inf) and not best.over
    assert not best.add(4, math.nan) and best.over and best.chosen == {"step": 2, "loss": 5.0}
    assert not BestWeights(patience=None).over
