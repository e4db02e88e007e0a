"""The benchmarks run and compare like with like."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def synthesis(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import synthesis

    return synthesis


def test_the_benchmark_of_sampling_prints_every_comparison(synthesis, capsys):
    synthesis.main("tiny", "cpu", batch=2, rounds=1, whole=5, compiled=False)
    printed = capsys.readouterr().out
    assert "root mean square" in printed and "TFLOP counted" in printed
    for part in ("added up, 23 steps", "whole runs of 5 steps"):
        summary = printed.partition(part)[2]
        for line in ("ours, images per second: plain sampling", "CRFM k=4 / plain sampling", "plain / ours, CRFM k=4, measured: "):
            assert line in summary


def test_the_benchmark_of_tiling_prints_a_line_for_each_contender():
    command = [sys.executable, BENCHMARKS / "tiling.py", "--side", "1100", "--rounds", "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = ["ours, 1 process", "ours, 2 processes", *["gdal_retile.py"] * bool(shutil.which("gdal_retile.py"))]
    assert [line[:18].strip() for line in printed[1:]] == names
    written = {float(line[18:].split()[3]) for line in printed[1:]}
    assert max(written) < 1.1 * min(written), "what is compared is as large"


def test_the_benchmark_refuses_to_compare_what_differs(synthesis):
    pipeline, plain, critic = synthesis.make(synthesis.SIZES["tiny"], "cpu", torch.float32, "tiny")
    given = synthesis.Given(torch.zeros(1, 64, 64, dtype=torch.long), *(torch.ones(1, *shape) for shape in ((5, 32), (16,), (16, 8, 8))))
    synthesis.check_equal(pipeline, plain, critic, given, 1e-3)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 0.5
    with pytest.raises(AssertionError, match="ours and plain disagree"):
        synthesis.check_equal(pipeline, plain, critic, given, 1e-3)
