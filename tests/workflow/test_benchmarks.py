"""The benchmarks run and compare like with like."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


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


def test_the_benchmark_of_scale_runs_the_real_rules_by_stubs_to_a_mix_with_ten_synthetic_tiles_for_each_real_one(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scale

    snakefile, work, environment = scale.prepare(tmp_path, tiles=64, shards=3)
    files = [f"results/paper/fusu/mixes/{recipe}.parquet" for recipe in ("real", "crfm")]
    arguments = ["--cores", "16", "--resources", "gpu=2", "--no-hooks", "--configfile", scale.PAPER, "large.yaml", "--", *files]
    done = scale.call(work, environment, snakefile, *arguments)
    assert scale.jobs_in(done.said) >= 20 and done.processor > 0 and done.memory > 50
    assert [len(pd.read_parquet(work / file)) for file in files] == [64, 64 * 11]
    scale.print_manifests(work / "results" / "paper")
    scale.print_jobs(work / "results" / "paper")
    scale.print_folders(work / "results" / "paper")
    printed = capsys.readouterr().out
    assert re.search(r"^synthetic/triattention/crfm/all.parquet +640 ", printed, re.MULTILINE)
    assert re.search(r"^gather_shards-triattention-crfm +[\d.]+ +\d+$", printed, re.MULTILINE)
    assert not re.search(r"^ +\d+ fusu/synthetic/triattention/crfm/images$", printed, re.MULTILINE), "images are spread over folders"


def test_the_benchmark_refuses_to_compare_what_differs(synthesis):
    pipeline, plain, critic = synthesis.make(synthesis.SIZES["tiny"], "cpu", torch.float32, "tiny")
    given = synthesis.Given(torch.zeros(1, 64, 64, dtype=torch.long), *(torch.ones(1, *shape) for shape in ((5, 32), (16,), (16, 8, 8))))
    synthesis.check_equal(pipeline, plain, critic, given, 1e-3)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 0.5
    with pytest.raises(AssertionError, match="ours and plain disagree"):
        synthesis.check_equal(pipeline, plain, critic, given, 1e-3)
