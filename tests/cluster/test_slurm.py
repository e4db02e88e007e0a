"""The workflow on a real SLURM: the whole chain through its profile, GPUs, retries, cancelling, and a node that goes away."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from slurm_cluster import Cluster, cluster, missing_programs, places
from workflow_runs import folder_dataset, write_scene

COMMAND = [
    sys.executable,
    "-m",
    "snakemake",
    "--snakefile",
    str(ROOT / "Snakefile"),
    "--workflow-profile",
    str(ROOT / "profiles" / "slurm"),
]
QUICK = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10"]

#: What the log of the whole chain shows of the queue.
COLUMNS = "JobID:6,Partition:11,State:10,NumCPUs:5,MinMemory:12,TimeLimit:12,tres-per-job:14,tres-per-node:15,Comment:60"

#: The rules that ask for a GPU where `device: cuda` is set; here they compute on the CPU beside the GPU they are given.
ON_GPUS = ("encode_prompts", "encode_latents", "train_generator", "train_segmentor", "evaluate_segmentor", "synthesise_shard")

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing_programs()), reason=f"SLURM is not whole here: no {', '.join(missing_programs())} (slurm-wlm, munge)"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def heed_interrupts() -> None:
    """What is started from a background shell ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """The workflow through the profile, beside the test."""

    def __init__(self, slurm: Cluster, folder: Path, *arguments: str, config: str = "smallest.yaml"):
        self.slurm, self.said = slurm, folder / "said.log"
        self.earlier = set(slurm.jobs())
        environment = slurm.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.said.open("wb") as out:
            command = [*COMMAND, *arguments, "--configfile", config, *QUICK]
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, preexec_fn=heed_interrupts
            )

    def jobs(self) -> dict[str, dict[str, str]]:
        """What the controller knows of this run's jobs, by their number."""
        return {number: job for number, job in self.slurm.jobs().items() if number not in self.earlier}

    def rules(self) -> list[str]:
        return [job["Rule"] for job in self.jobs().values()]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended before: {self.said.read_text()[-5000:]}"
            assert time.monotonic() < end, f"what was waited for did not happen: {self.said.read_text()[-5000:]}"
            time.sleep(0.2)

    def end(self, seconds: float = 600) -> tuple[int, str]:
        """Exit status and everything it said."""
        try:
            status = self.process.wait(seconds)
        finally:
            self.process.kill()
        return status, self.said.read_text()


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes, sort_keys=False))


def test_the_whole_chain_runs_through_the_profile_and_no_two_jobs_share_a_gpu(slurm, small, capsys):
    run = Run(slurm, small, "--set-resources", *(f"{rule}:gpu=1" for rule in ON_GPUS), "--default-resources", "gpu_partition=gpu")
    held: dict[str, set[int]] = {}
    most, lines = 0, []
    while run.process.poll() is None:
        running = {number: job for number, job in run.jobs().items() if job["JobState"] == "RUNNING" and job["Gpus"]}
        now = {number: places(job["Gpus"]) for number, job in running.items()}
        assert sum(map(len, now.values())) == len(set().union(*now.values())), f"a GPU is given twice: {now}"
        if set(now) - set(held):
            lines += [slurm.ask("squeue", f"--Format={COLUMNS}"), f"GPUs of running jobs: {now}\n"]
        held |= now
        most = max(most, len(now))
        time.sleep(0.5)
    status, said = run.end()
    with capsys.disabled():
        print("\n" + "".join(lines))
    assert status == 0, said[-5000:]
    jobs = run.jobs()
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}
    assert {jobs[number]["Rule"] for number in held} == set(ON_GPUS)
    assert {job["Partition"] for job in jobs.values()} == {"cpu"}, "where the workflow runs on CPUs, no rule asks for the other partition"
    assert most >= 2, "jobs with GPUs ran side by side"
    assert {"splits_check_splits_draw_data_sheet", "report_make_report_make_table"} <= set(run.rules()), "small jobs went as one"
    logs = (small / "results" / "logs" / "small").glob("synthesise_shard-*.log")
    assert all(re.search(rf"^on {slurm.host}, GPU \d$", log.read_text(), re.MULTILINE) for log in logs)
    assert (small / "results" / "report.html").is_file()
    assert not list((small / "results").rglob("*unfinished"))


def test_a_failing_job_is_tried_again_with_more_memory_and_time_and_reported(slurm, small):
    folder_dataset(small)
    for index, split in enumerate(("train", "test", "reference")):
        write_scene(small / "scenes" / split / "images" / f"s{index}.png", index, 64, (3,))
        write_scene(small / "scenes" / split / "labels" / f"s{index}.png", index, 48 if split == "test" else 64)
    status, said = Run(slurm, small, "results/small/scenes.parquet", "--retries", "1").end()
    assert status != 0 and re.search(r"error: \S*test/labels/s1\.png: 48x48 pixels, but its image .* has 64x64", said)
    tries = [job for job in slurm.jobs().values() if job["JobState"] == "FAILED" and job["Rule"] == "list_scenes"]
    assert [(job["MinMemoryNode"], job["TimeLimit"]) for job in tries] == [("2000M", "01:00:00"), ("4000M", "02:00:00")]


def test_stopping_the_workflow_cancels_its_jobs(slurm, small):
    rewrite(small / "small_world.yaml", source={"kind": "embedded", "scenes": {"train": 10**4, "test": 1, "reference": 1, "held_out": 1}})
    run = Run(slurm, small, "results/small/scenes.parquet")
    run.wait_for(lambda: any(job["JobState"] == "RUNNING" for job in run.jobs().values()))
    run.process.send_signal(signal.SIGINT)
    status, _ = run.end(240)
    assert status != 0
    deadline = time.monotonic() + 240
    while {job["JobState"] for job in run.jobs().values()} != {"CANCELLED"}:
        assert time.monotonic() < deadline, slurm.ask("squeue")
        time.sleep(0.5)


def test_a_killed_job_is_tried_again_and_continues_and_a_drained_node_is_survived_by_a_rerun(slurm, small):
    long = {"steps": 3000, "batch_size": 2, "learning_rate": 1e-3, "mask_init": "copy", "checkpoint_every": 50}
    rewrite(small / "smallest.yaml", controls={"triattention": long})
    target, work = "results/small/generators/triattention", small / "results" / "small" / "generators" / "triattention.unfinished"
    run = Run(slurm, small, target)

    def training(state: str) -> list[str]:
        return [number for number, job in run.jobs().items() if (job["Rule"], job["JobState"]) == ("train_generator", state)]

    run.wait_for(lambda: any(work.glob("checkpoint-*.pt")))
    slurm.ask("scancel", "--signal=KILL", "--full", *training("RUNNING"))
    run.wait_for(lambda: bool(training("CANCELLED") + training("FAILED")) and bool(training("RUNNING")))
    log = small / "results" / "logs" / "small" / "train_generator-triattention.log"
    run.wait_for(lambda: log.is_file() and "continuing" in log.read_text())  # the log of an earlier try is removed
    slurm.set_node("DRAIN")
    try:
        slurm.ask("scancel", *training("RUNNING"))  # it is tried again, on a node that takes no jobs
        run.wait_for(lambda: bool(training("PENDING")))
        run.process.send_signal(signal.SIGINT)
        assert run.end(240)[0] != 0
    finally:
        slurm.set_node("RESUME")
    status, said = Run(slurm, small, target).end()
    assert status == 0, said[-5000:]
    assert "continuing" in log.read_text() and (small / target / "model_index.json").is_file() and not work.exists()


@pytest.mark.parametrize(
    ("site", "partition", "asked"), [([], "cpu", "TresPerJob"), (["gpu_gres=gpu", "gpu_partition=gpu"], "gpu", "TresPerNode")]
)
def test_gpus_are_asked_for_as_the_site_has_them_and_not_looked_for_on_the_login_node(slurm, small, site, partition, asked):
    rewrite(small / "smallest.yaml", device="cuda")
    said = Run(slurm, small, "preflight").end()[1]
    assert "no job was started" in said and "torch with CUDA" in said and "this machine shows 0" not in said
    run = Run(slurm, small, "results/small/prompts/train.json", "--no-hooks", "--retries", "0", "--default-resources", "nodes=1", *site)
    status, said = run.end()
    assert status != 0 and "device: cuda, but torch" in said, "there is no GPU behind what SLURM hands out here"
    jobs = {job["Rule"]: job for job in run.jobs().values()}
    with_gpu, without = jobs["encode_prompts"], jobs["tile_scenes"]
    assert (with_gpu["Partition"], with_gpu[asked]) == (partition, "gres:gpu:1"), "per job by --gpus, per node by --gres"
    assert without["Partition"] == "cpu" and not {"TresPerJob", "TresPerNode"} & set(without)
