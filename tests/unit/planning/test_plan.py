"""What a run still takes: the jobs are the workflow's own, and the times follow from what was measured, or say that they guess."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
from paths import CONFIGS, ROOT
from planned_jobs import RATES, planned, shard, without_scheme

from crfm_core.planning.jobs import Job

COMMAND = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
HOUR = 3600


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """What the workflow says in ``folder``."""
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([*COMMAND, *arguments], cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr + done.stdout  # what is printed stands last


def counted(said: str, heading: str) -> dict[str, int]:
    """Names and numbers of the lines after a heading, without sums, and without `all`, which does nothing."""
    table = said[said.rindex(heading) :]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)\b", table, re.MULTILINE) if name not in ("total", "all")}


def agreed(folder: Path, *arguments: str) -> tuple[str, dict[str, int]]:
    """What the plan says and its jobs, which must be those of a dry run of the same configuration."""
    said = run(folder, "plan", *arguments)
    jobs = counted(said, "Still to do")
    assert jobs == counted(run(folder, "--dry-run", *arguments), "Job stats:")
    return said, jobs


@pytest.fixture
def small(tmp_path) -> Path:
    """A working folder with the smallest configuration."""
    for file in CONFIGS.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_papers_scale_is_planned_in_seconds_with_the_jobs_of_a_dry_run(tmp_path):
    before = os.times()
    arguments = ("--configfile", str(ROOT / "configs" / "paper.yaml"), "--config", "disk_gb=0.1", "shards=5")
    said = run(tmp_path, "plan", *arguments, "--resources", "gpu=8")
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 15, "of the processor"
    assert counted(said, "Still to do") == counted(run(tmp_path, "--dry-run", *arguments), "Job stats:")
    assert re.search(r"synthesise_shard +20 ", said) and "GPU-hours" in said and "with 8 GPUs and 2 cores" in said
    assert re.search(r"train_generator +2 .* guess", said) and re.search(r"fetch_dataset +2 +- +\? .*not known", said)
    assert "Tiles of loveda5k: train 5,000 (as selected), val 6,676 (published number of scenes)" in said
    assert not list(tmp_path.glob("results*")) and not list(tmp_path.glob("models"))


def test_a_plan_tells_what_is_left_and_makes_nothing(small):
    arguments = ("--configfile", "smallest.yaml")
    run(small, "results/small/captions/train.parquet", "results/small/tiles/test.parquet", *arguments)
    made = files(small / "results")
    said, left = agreed(small, *arguments)
    assert "list_scenes" not in left and (left["tile_scenes"], left["caption_tiles"]) == (2, 1)
    counted = "train 8 (cut), test 8 (cut), held_out 8 (of scenes to draw), reference 8 (of scenes to draw)"
    assert counted in " ".join(said.split())
    assert re.search(r"^tile_scenes +2 .* measured$", said, re.MULTILINE)
    assert files(small / "results") == made

    (small / "results" / "small" / "tiles" / "train.parquet").unlink()
    _, left = agreed(small, *arguments)
    assert (left["tile_scenes"], left["caption_tiles"]) == (3, 2)

    # a job that was stopped leaves this mark, and its files may be fragments
    mark = urlsafe_b64encode(b"results/small/scenes.parquet").decode()
    (small / ".snakemake" / "incomplete").mkdir(exist_ok=True)
    (small / ".snakemake" / "incomplete" / mark).touch()
    _, left = agreed(small, *arguments)
    assert left["list_scenes"] == 1 and left["tile_scenes"] == 4


def test_the_engines_report_shows_what_is_done_and_needs_no_network(small):
    target, offline = "results/small/data_sheet", dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    run(small, target, "--configfile", "smallest.yaml")
    run(small, target, "--configfile", "smallest.yaml", "--report", "run.html", **offline)
    page = (small / "run.html").read_text(encoding="utf-8")
    for said in ("Data sheet of <em>small</em>", "What a run of scale smallest made", "index.html"):
        assert said in page
    assert "<script src=" not in page and "<link href=" not in page


# ------------------------------------------------------------------------------------------------------------------ times


def test_jobs_take_as_long_as_finished_ones_of_their_kind(tmp_path):
    jobs = [shard(tmp_path, 1, pending=False, seconds=1800), *(shard(tmp_path, number) for number in (2, 3))]
    plan = planned(jobs, tmp_path)
    (stage,) = plan.stages
    assert [one.seconds for one in stage.estimates] == pytest.approx([1800, 1800])
    assert stage.basis == "measured" and plan.total(False) == pytest.approx(HOUR)
    assert re.search(r"^synthesise_shard +2 +1\.00 .* measured$", plan.text(), re.MULTILINE)
    assert "finished" in plan.text() and "between" not in plan.text()
    assert plan.wall == pytest.approx((1800, 1800))


def test_another_kind_of_the_same_stage_is_scaled_by_what_it_has_to_do(tmp_path):
    jobs = [shard(tmp_path, 1, "plain", pending=False, seconds=1000), shard(tmp_path, 2, "crfm"), shard(tmp_path, 3, "plain")]
    plan = planned(jobs, tmp_path)
    corrected, plain = plan.stages[0].estimates
    assert (corrected.basis, plain.basis) == ("scaled", "measured")
    assert plain.seconds == pytest.approx(1000) and 3 * plain.seconds < corrected.seconds < 20 * plain.seconds


def test_the_time_of_a_job_that_has_to_be_done_again_does_not_count(tmp_path):
    """It may have been noted under another configuration."""
    plan = planned([shard(tmp_path, 1, seconds=10**6)], tmp_path)
    assert plan.stages[0].basis == "scaled" and plan.total(False) < HOUR


@pytest.mark.parametrize("content", ["", "s\n", "s\n-\n", "no table"])
def test_a_time_that_cannot_be_read_is_none(tmp_path, content):
    job = shard(tmp_path, 1, pending=False, seconds=1)
    job.benchmark.write_text(content)
    assert planned([job, shard(tmp_path, 2)], tmp_path).stages[0].basis == "scaled"


TRAINING = Job("train_generator", {"dataset": "fusu4k", "control": "triattention"})


@pytest.mark.parametrize(
    ("gpu", "peak", "said"),
    [
        (None, 989, "40 % of the peak of a GPU H100 (no known GPU is here)"),
        ("NVIDIA GeForce RTX 4090", 165, "40 % of the peak of a GPU RTX 4090 (the one here)"),
    ],
)
def test_what_was_never_measured_is_counted_work_at_a_stated_speed_and_called_a_guess(tmp_path, gpu, peak, said):
    plan = planned([TRAINING], tmp_path, "configs/paper.yaml", gpu_rules=["train_generator"], gpu=gpu)
    assert plan.stages[0].basis == "guess"
    assert plan.total(True) == pytest.approx(200_000 * 2 * (12.99 + 4.33) / (0.4 * peak), rel=1e-3)
    assert said in " ".join(plan.text().split()) and plan.total(False) == 0


def test_several_processes_hold_as_many_gpus_for_a_shorter_time(tmp_path):
    changes = {"controls.triattention.processes": 8, "controls.triattention.steps": 25_000}
    arguments = {"name": "configs/paper.yaml", "gpu_rules": ["train_generator"], "gpus": 8}
    alone, shared = planned([TRAINING], tmp_path, **arguments), planned([TRAINING], tmp_path, changes=changes, **arguments)
    assert shared.stages[0].estimates[0].gpus == 8
    assert shared.total(True) == pytest.approx(alone.total(True), rel=0.01)
    assert shared.wall[1] == pytest.approx(alone.wall[1] / 8, rel=0.01)


def test_networks_that_were_measured_on_a_processor_alone_have_no_time_on_a_gpu(tmp_path):
    plan = planned([shard(tmp_path, 1)], tmp_path, changes={"device": "cuda"}, gpu_rules=["synthesise_shard"])
    assert plan.stages[0].basis == "not known" and re.search(r"^synthesise_shard +1 +\? +- ", plan.text(), re.MULTILINE)
    assert "without 1 not known" in plan.text() and "Wall time: not known." in plan.text()


@pytest.mark.parametrize(
    ("path", "value", "factor"),
    [
        ("controls.triattention.steps", 2800, 2),
        ("controls.triattention.accumulate", 4, 4),
        ("base_model.transformer.layers", 6, 2),
        ("base_model.transformer.heads", 6, 4),
        ("base_model.transformer.patch_size", 2, 4),
    ],
)
def test_rates_are_scaled_by_the_configured_sizes(tmp_path, path, value, factor):
    job = Job("train_generator", {"dataset": "embedded", "control": "triattention"})
    once, more = (planned([job], tmp_path, changes=changes).total(False) - RATES.start for changes in (None, {path: value}))
    each = RATES.jobs["train_generator"].seconds
    assert once == pytest.approx(1400 * 16 * each) and more == pytest.approx(factor * once)


def test_the_wall_time_lies_between_no_waiting_and_stage_after_stage(tmp_path):
    jobs = [shard(tmp_path, 1, pending=False, seconds=60), *(shard(tmp_path, number) for number in range(2, 5))]
    jobs += [Job("train_generator", {"dataset": "embedded", "control": "triattention"})]
    plan = planned(jobs, tmp_path, cores=2)
    training = plan.stages[1].estimates[0].seconds
    # three shards in two lots, beside the training or before it
    assert plan.wall == pytest.approx((max(training, (180 + training) / 2), 120 + training))
    assert "Wall time with 2 cores: between" in plan.text()


def test_nothing_left_is_said_in_one_line(tmp_path):
    assert planned([shard(tmp_path, 1, pending=False)], tmp_path).text() == f"Nothing to do: {tmp_path} is complete.\n"


def test_a_full_disk_is_foreseen(tmp_path):
    jobs = [Job("synthesise_shard", shard(tmp_path, 1).names | {"dataset": "fusu4k", "sampler": "plain"})]
    enough = planned(jobs, tmp_path, "configs/paper.yaml", {"shards": 10**4})
    assert "may not be enough" not in enough.text()
    short = planned(jobs, tmp_path, "configs/paper.yaml", {"shards": 1, "recipes.triattention.synthetic_per_real": 10**7})
    assert "That may not be enough: free some space, or set `results` to another disk." in short.text()


@pytest.mark.parametrize(("name", "basis"), [("config.yaml", "scaled"), ("configs/paper.yaml", "not known")])
def test_a_control_scheme_without_rates_is_not_known_and_stops_no_plan(tmp_path, name, basis):
    """That of the embedded networks takes the same time for all schemes."""
    dataset = "embedded" if name == "config.yaml" else "fusu4k"
    jobs = [Job("train_generator", {"dataset": dataset, "control": "triattention"}), shard(tmp_path, 1)]
    jobs[1] = Job(jobs[1].rule, jobs[1].names | {"dataset": dataset})
    plan = planned(jobs, tmp_path, name, rates=without_scheme("triattention"))
    assert [stage.basis for stage in plan.stages] == [basis, basis]
    assert re.search(rf"^train_generator .* {basis}$", plan.text(), re.MULTILINE)
