"""A generator trained by several processes: the weights of one, and no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from generator_trainings import control, train, weights_of
from paths import SUPPORT
from tiny_world import training_job
from unlabelled_tiles import write_unlabelled

from crfm_core import ConfigError, WeightsError
from crfm_core.distributed import launch
from crfm_core.files import read_json
from crfm_core.generator.training import train_generator

LONG = {"steps": 40, "checkpoint_every": 5}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of one process that takes the batches of two."""
    return train(world, tmp_path_factory.mktemp("alone"), control(batch_size=4, **LONG))


def test_two_processes_killed_and_started_again_end_with_the_weights_of_one(world, alone, tmp_path, capfd):
    settings = control(processes=2, **LONG)
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(launch, training_job(world, tmp_path, settings), threads=2)
        while not list((tmp_path / "work").glob("checkpoint-*.pt")):
            assert not killed.done(), killed.result()
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            process.kill()
        assert "training in 2 processes failed" in str(killed.exception())
    launch(training_job(world, tmp_path, settings), threads=2)
    assert "continuing from step" in capfd.readouterr().out
    assert close(weights_of(tmp_path / "out"), alone)


def test_two_processes_that_share_the_weights_out_end_with_the_weights_of_one(world, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT / "sharding_on_cpu"), prepend=os.pathsep)
    launch(training_job(world, tmp_path, control(processes=2, parallel="fsdp", **LONG)), threads=2)
    assert close(weights_of(tmp_path / "out"), alone)


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [("ddp", {"scheme": "siamese"}), ("fsdp", {"lora": {"rank": 2, "alpha": 4, "branches": ["image"]}})],
)
def test_two_processes_whose_batches_miss_masks_and_that_look_at_held_out_tiles_end_with_the_weights_of_one(
    world, tmp_path, monkeypatch, parallel, changes
):
    if "lora" in changes:
        pytest.importorskip("peft")
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT / "sharding_on_cpu") if parallel == "fsdp" else "", prepend=os.pathsep)
    # one sample per process and micro-step: some have a mask in one process alone, some in none
    missing = {"mask_dropout": 0.4, "unlabelled_share": 0.3, "validate_every": 4, "steps": 10, "checkpoint_every": 5} | changes
    unlabelled = write_unlabelled(world, tmp_path / "unlabelled")
    one = train(world, tmp_path / "one", control(batch_size=2, **missing), unlabelled=unlabelled)
    job = training_job(world, tmp_path, control(batch_size=1, processes=2, parallel=parallel, **missing), unlabelled=unlabelled)
    launch(job, threads=2)
    assert close(weights_of(tmp_path / "out"), one)
    alone, together = (read_json(folder / "out" / "training.json")["validation"] for folder in (tmp_path / "one", tmp_path))
    assert alone["step"] == together["step"] and alone["tiles"] == together["tiles"] and len(together["history"]) == 3
    assert together["loss_mask_ignored"] == pytest.approx(alone["loss_mask_ignored"], rel=1e-4)


def test_a_fault_in_one_of_the_processes_ends_them_all_and_is_raised_here(world, tmp_path):
    diverging = control(processes=2, learning_rate=1e30, warmup=0, schedule="constant", ema=None, clip_norm=1e30)
    with pytest.raises(WeightsError, match=r"generator: at step \d+ the loss became .*; lower learning_rate"):
        launch(training_job(world, tmp_path, diverging), threads=2)
    assert not (tmp_path / "out").exists()


def test_processes_end_with_the_one_that_started_them(world, tmp_path):
    job = training_job(world, tmp_path, control(processes=2, **LONG | {"steps": 100_000}))
    program = "import sys; from crfm_core import distributed; from crfm_core.generator.training import GeneratorTraining as Job;"
    program += "distributed.launch(Job.model_validate_json(sys.argv[1]), threads=2)"
    launcher = subprocess.Popen([sys.executable, "-c", program, job.model_dump_json()])
    while not list((tmp_path / "work").glob("checkpoint-*.pt")):
        assert launcher.poll() is None
        time.sleep(0.05)
    started = psutil.Process(launcher.pid).children(recursive=True)
    assert len(started) == 2
    launcher.kill()
    launcher.wait()
    assert psutil.wait_procs(started, timeout=60)[1] == []
    assert not (tmp_path / "out").exists()


def test_a_job_of_two_processes_is_not_done_by_one(world, tmp_path):
    with pytest.raises(ConfigError, match=r"processes: 2, but 1 was started; use crfm_core\.distributed\.launch"):
        train_generator(training_job(world, tmp_path, control(processes=2)))
