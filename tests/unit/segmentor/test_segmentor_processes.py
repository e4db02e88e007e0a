"""Training a segmentor in several processes: the draws of one, equal weights everywhere, one that writes, and faults that are raised."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from segmentor_tiles import CLASSES, PALETTE, write_tiles

from crfm_core import ConfigError
from crfm_core.distributed import ProcessGroup, launch
from crfm_core.files import exclusive
from crfm_core.segmentor.dataset import WeightedDraws
from crfm_core.segmentor.training import SegmentorTraining, train_segmentor
from crfm_core.settings import Segmentor

#: A network without batch norm, so that it learns the same from a batch as from its two halves.
NETWORK = """
norm_cfg = dict(type='GN', num_groups=4)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='MixVisionTransformer', embed_dims=8, num_stages=2, num_layers=[1, 1], num_heads=[1, 2], patch_sizes=[7, 3],
        sr_ratios=[8, 4], strides=[4, 2], out_indices=(0, 1)),
    decode_head=dict(
        type='SegformerHead', in_channels=[8, 16], in_index=[0, 1], channels=16, dropout_ratio=0.0, num_classes=2, norm_cfg=norm_cfg,
        align_corners=False))
"""

#: Read by each Python that starts; in the processes of a training it writes down what each draws and ends with.
RECORDER = """
import os
if "RANK" in os.environ:
    import json, pathlib, torch
    from crfm_core.segmentor import dataset
    from crfm_core.segmentor.mmseg import running
    out = pathlib.Path(os.environ["RECORDS"]) / os.environ["RANK"]
    train, take, seen = running.TrainingRunner.train, dataset.Tiles.__getitem__, []

    def recorded(self):
        model = train(self)
        torch.save(self.network.state_dict(), out.with_suffix(".pth"))
        out.with_suffix(".json").write_text(json.dumps(seen))
        return model

    def noted(self, draw):
        seen.append([draw.number, draw.row])
        return take(self, draw)

    running.TrainingRunner.train, dataset.Tiles.__getitem__ = recorded, noted
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_tiles(folder / "train.parquet", 12)
    write_tiles(folder / "val.parquet", 5, seed=1, prefix="v")
    (folder / "network.py").write_text(NETWORK)
    return folder


def job(folder: Path, name: str, processes: int, **settings) -> SegmentorTraining:
    iterations = settings.pop("iterations", 6)
    defaults = {"optimiser": "SGD", "learning_rate": 0.05, "batch_size": 4, "checkpoint_every": 2, "class_weights": "median_frequency"}
    segmentor = Segmentor(config=str(folder / "network.py"), iterations=iterations, processes=processes, **defaults | settings)
    return SegmentorTraining(
        manifest=folder / "train.parquet",
        root=folder,
        out=folder / name / "checkpoint.pth",
        work=folder / f".{name}",
        segmentor=segmentor,
        classes=CLASSES,
        palette=PALETTE,
        iterations=iterations,
        seed=0,
        val=folder / "val.parquet",
    )


def stored(job: SegmentorTraining) -> dict:
    return torch.load(job.out, weights_only=True)


def test_processes_share_the_draws_of_one():
    weights = np.array([3.0, 1.0, 0.0, 1.5])
    whole = list(islice(WeightedDraws(weights, 0), 48))
    for count in (1, 2, 3):
        shares = [islice(WeightedDraws(weights, 0, 12, 6, ProcessGroup(rank, count).share(6)), 36 // count) for rank in range(count)]
        batches = [[list(islice(share, 6 // count)) for _ in range(6)] for share in map(iter, shares)]
        together = [draw for parts in zip(*batches, strict=True) for part in parts for draw in part]
        assert together == whole[12:]


def test_two_processes_learn_what_one_does(folder, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("RECORDS", str(tmp_path))
    one = job(folder, "one", 1)
    launch(one)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    two = job(folder, "two", 2)
    launch(two, threads=2)

    ended = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert ended[0].keys() == ended[1].keys() and all(torch.equal(tensor, ended[1][name]) for name, tensor in ended[0].items())
    drawn = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    whole = [[draw.number, draw.row] for draw in islice(WeightedDraws(np.ones(12), 0), 24)]
    assert sorted(drawn[0] + drawn[1]) == whole and [number % 4 for number, _ in drawn[1]] == [2, 3] * 6

    for name, tensor in stored(one)["state_dict"].items():
        torch.testing.assert_close(stored(two)["state_dict"][name], tensor, rtol=1e-4, atol=1e-5)
    looks = [np.array(stored(run)["meta"]["validation"]) for run in (one, two)]
    np.testing.assert_allclose(looks[0], looks[1], atol=0.5)  # a pixel between two classes may fall to the other
    assert not (folder / ".two").exists()


def test_what_goes_wrong_in_the_processes_is_raised_here(folder):
    wild = job(folder, "wild", 2, learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"training diverged: loss is (nan|inf) at iteration \d; lower learning_rate or lengthen warmup"):
        launch(wild)
    assert not wild.out.exists()


def test_settings_that_need_other_processes_are_refused(folder):
    with pytest.raises(ConfigError, match=r"processes: 2, but 1 was started; use crfm_core\.distributed\.launch"):
        job(folder, "alone", 2).run()
    with pytest.raises(ConfigError, match="batch_size: 2 is too few for batch normalisation; allowed: 4 or more"):
        train_segmentor(job(folder, "narrow", 2, batch_size=2))


@pytest.mark.slow
def test_a_training_in_processes_that_was_killed_ends_with_the_weights_of_an_undisturbed_one(folder, tmp_path):
    settings = {"iterations": 60, "checkpoint_every": 5}
    undisturbed, killed = job(folder, "undisturbed", 2, **settings), job(folder, "killed", 2, **settings)
    launch(undisturbed)
    (tmp_path / "job.json").write_text(killed.model_dump_json())
    program = """
        import sys
        from crfm_core.distributed import launch
        from crfm_core.segmentor.training import SegmentorTraining
        launch(SegmentorTraining.model_validate_json(open(sys.argv[1]).read()))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "job.json")]
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(killed.work.glob("iter_*.pth")):
        assert running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    with exclusive(killed.work):  # what it started has ended, too, and not by coming to the end
        assert not killed.out.exists() and list(killed.work.glob("iter_*.pth"))
    launch(killed)
    assert stored(killed)["meta"]["validation"] == stored(undisturbed)["meta"]["validation"]
    for name, tensor in stored(undisturbed)["state_dict"].items():
        assert torch.equal(stored(killed)["state_dict"][name], tensor)
