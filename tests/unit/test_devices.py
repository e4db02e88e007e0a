"""Leases of GPUs: every job gets its own, whoever dies returns them, and the identifiers CUDA and SLURM use are understood."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT

from crfm_core import ResourceError
from crfm_core.devices import gpu_memory, lease, require_gpus, require_leases, visible_gpus

#: Holds COUNT GPUs for SECONDS, or until the file "stop" is there, with a marker per GPU that must not exist already.
HOLD = """
import os, sys, time
from crfm_core.devices import lease
name, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with lease(count) as gpus:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(gpus)
    markers = [f"gpu-{gpu}" for gpu in gpus]
    for marker in markers:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    open(f"holding-{name}", "w").write(",".join(gpus))
    end = time.monotonic() + seconds
    while time.monotonic() < end and not os.path.exists("stop"):
        time.sleep(0.02)
    for marker in markers:
        os.remove(marker)
open(f"done-{name}", "w").write(",".join(gpus))
"""


@pytest.fixture(autouse=True)
def leases(tmp_path, monkeypatch) -> Path:
    """Locks of the test's own, on a machine without nvidia-smi and outside SLURM."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CRFM_LEASES", str(tmp_path / "leases"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "leases"


@pytest.fixture
def jobs(tmp_path):
    """Starts a job with the environment it is given; none outlives the test."""
    started = []

    def start(name: str, count: int = 1, seconds: float = 300, visible: str = "0,1,2,3", program: str = HOLD, **environment: str):
        command = [sys.executable, "-c", program, name, str(count), str(seconds)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": str(ROOT)} | environment
        with open(tmp_path / f"log-{name}", "w") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(path: Path, text: str = "", seconds: float = 300) -> str:
    """The file's content, once it is there and holds ``text``."""
    end = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"{path.name} did not come, or without {text!r}"
        time.sleep(0.02)
    return path.read_text()


def succeed(*processes: subprocess.Popen) -> None:
    assert [process.wait(300) for process in processes] == [0] * len(processes)


def nvidia_smi(folder: Path, listing: str, told: str = "") -> None:
    """Put an nvidia-smi on the path that lists these GPUs, and answers to queries what it is ``told``."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then /bin/cat <<END\n{listing}\nEND\nelse /bin/cat <<END\n{told}\nEND\nfi\n')
    program.chmod(0o755)


CARDS = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa-0)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb-1)"""
PARTS = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa-0)
  MIG 3g.71gb     Device  0: (UUID: MIG-cccc-0)
  MIG 3g.71gb     Device  1: (UUID: MIG-dddd-1)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb-1)"""

# ------------------------------------------------------------------------------------------------------ several processes


def test_eight_jobs_on_four_gpus_are_all_served_and_never_two_on_one(jobs, tmp_path):
    succeed(*(jobs(str(number), seconds=0.3) for number in range(8)))
    given = [(tmp_path / f"done-{number}").read_text() for number in range(8)]
    assert len(given) == 8 and set(given) == {"0", "1", "2", "3"}


def test_killed_jobs_leave_their_gpus_to_those_that_wait(jobs, tmp_path):
    holders = [jobs(f"killed{number}") for number in range(4)]
    held = {wait_for(tmp_path / f"holding-killed{number}") for number in range(4)}
    assert held == {"0", "1", "2", "3"}
    waiting = [jobs(f"next{number}", seconds=0) for number in range(4)]
    for number in range(4):
        wait_for(tmp_path / f"log-next{number}", "Waiting for 1 of the GPUs 0, 1, 2, 3")
    assert not list(tmp_path.glob("holding-next*"))
    for marker in tmp_path.glob("gpu-*"):
        marker.unlink()  # the killed will not
    for holder in holders:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    succeed(*waiting)


def test_jobs_that_want_several_get_all_at_once_and_do_not_block_each_other(jobs, tmp_path):
    succeed(*(jobs(str(number), count=3, seconds=0.1) for number in range(4)))
    for number in range(4):
        assert len(set((tmp_path / f"done-{number}").read_text().split(","))) == 3


def test_a_job_that_waits_for_several_takes_none_meanwhile(jobs, tmp_path):
    jobs("first", count=2)
    wait_for(tmp_path / "holding-first")
    jobs("second", count=3)
    wait_for(tmp_path / "log-second", "Waiting for 3 of the GPUs")
    succeed(jobs("third", count=2, seconds=0))
    assert not (tmp_path / "holding-second").exists()
    (tmp_path / "stop").touch()
    wait_for(tmp_path / "done-second")


@pytest.mark.parametrize(("ids", "together"), [(("7", "8"), True), (("7", "7"), False)])
def test_a_slurm_job_knows_its_gpus_apart_from_those_of_others_by_the_same_index(jobs, tmp_path, ids, together):
    jobs("first", visible="0", SLURM_JOB_ID=ids[0])
    wait_for(tmp_path / "holding-first")
    (tmp_path / "gpu-0").unlink()  # another card in the other SLURM job
    jobs("second", visible="0", SLURM_JOB_ID=ids[1])
    if together:
        wait_for(tmp_path / "holding-second")
    else:
        wait_for(tmp_path / "log-second", "Waiting for 1 of the GPUs 0")
        assert not (tmp_path / "holding-second").exists()


@pytest.mark.parametrize("visible", ["0", "GPU-aaaa-0", "GPU-aa"])
def test_an_index_and_a_uuid_of_one_card_are_one(jobs, tmp_path, monkeypatch, visible):
    nvidia_smi(tmp_path, CARDS)
    jobs("given", visible=visible)
    wait_for(tmp_path / "holding-given")
    with lease(1) as gpus:
        assert gpus == ["GPU-bbbb-1"]


def test_a_program_started_in_the_lease_does_not_keep_it(jobs, tmp_path):
    start = HOLD.replace(
        "    end =",
        "    import subprocess\n    child = subprocess.Popen(['/bin/sleep', '600'])\n    print(child.pid, flush=True)\n    end =",
    )
    job = jobs("parent", visible="0", program=start)
    wait_for(tmp_path / "holding-parent")
    child = int(wait_for(tmp_path / "log-parent", "\n"))
    try:
        job.kill()
        job.wait()
        (tmp_path / "gpu-0").unlink()
        succeed(jobs("next", visible="0", seconds=0))
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_keeps_the_lease_only_if_its_parent_was_killed(jobs, tmp_path):
    start = HOLD.replace(
        "    end =", "    child = os.fork()\n    if not child:\n        time.sleep(600)\n    print(child, flush=True)\n    end ="
    )
    ended = jobs("ended", visible="0", seconds=0.5, program=start)
    succeed(ended)
    killed = jobs("killed", visible="0", program=start)
    wait_for(tmp_path / "holding-killed")
    children = [int(wait_for(tmp_path / f"log-{name}", "\n").split()[-1]) for name in ("ended", "killed")]
    try:
        killed.kill()
        killed.wait()
        (tmp_path / "gpu-0").unlink()
        following = jobs("next", visible="0", seconds=0)
        with pytest.raises(subprocess.TimeoutExpired):
            following.wait(2)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
    succeed(following)


def test_two_scripts_of_the_workflow_get_different_gpus_and_faults_go_to_their_logs(jobs, tmp_path):
    script = """
import os, sys, time
from types import SimpleNamespace
from job import job
name, gpu = sys.argv[1], int(sys.argv[2])
resources = {"gpu": gpu} if gpu else {}
with job(SimpleNamespace(threads=1, log=[f"{name}.log"], output=["made"], resources=resources)):
    if gpu == 1:
        open(f"holding-{name}", "w").write(os.environ["CUDA_VISIBLE_DEVICES"])
        while len([entry for entry in os.listdir() if entry.startswith("holding")]) < 2:
            time.sleep(0.05)
    print("visible:", os.environ["CUDA_VISIBLE_DEVICES"])
"""
    path = f"{ROOT}:{ROOT / 'workflow_scripts'}"
    pair = [jobs(name, visible="GPU-a,MIG-b", program=script, PYTHONPATH=path) for name in ("one", "two")]
    succeed(*pair)
    assert {wait_for(tmp_path / f"holding-{name}") for name in ("one", "two")} == {"GPU-a", "MIG-b"}
    succeed(jobs("none", count=0, visible="5,6", program=script, PYTHONPATH=path))
    assert (tmp_path / "none.log").read_text() == "visible: 5,6\n"
    greedy = jobs("greedy", count=3, visible="5,6", program=script, PYTHONPATH=path)
    assert greedy.wait(300) == 1
    assert (tmp_path / "greedy.log").read_text().startswith("error: device: cuda needs 3 GPU for one job, this machine shows 2;")


def test_a_full_disk_is_not_taken_for_a_damaged_model(jobs, tmp_path):
    """Which would have to be made again; it is what opening one says when its words find no room."""
    script = """
from types import SimpleNamespace
from job import job
from crfm_core import WeightsError
with job(SimpleNamespace(threads=1, log=["it.log"], output=["made"], resources={})):
    try:
        open("/dev/full", "w", buffering=1).write("loading\\n")
    except OSError as error:
        raise WeightsError(f"model: cannot be opened ({error}); copy or make it again") from None
"""
    assert jobs("it", program=script, PYTHONPATH=f"{ROOT}:{ROOT / 'workflow_scripts'}").wait(300) == 1
    said = (tmp_path / "it.log").read_text()
    assert said == "error: it.log: could not be written whole ([Errno 28] No space left on device); free some space on its disk\n"


# -------------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    ("given", "entries"),
    [
        ("0,1,2", ["0", "1", "2"]),
        (" 3, 1", ["3", "1"]),
        ("GPU-8932f937-d72c,MIG-GPU-8932/1/2", ["GPU-8932f937-d72c", "MIG-GPU-8932/1/2"]),
        ("0,-1,2", ["0"]),
        ("1,1,2", ["1", "2"]),
        ("", []),
        ("NoDevFiles", []),
        (None, []),
    ],
)
def test_the_visible_gpus_are_those_cuda_would_see(monkeypatch, given, entries):
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert list(visible_gpus().values()) == entries
    require_gpus(len(entries))
    with pytest.raises(ResourceError, match=f"needs {len(entries) + 1} GPU for one job, this machine shows {len(entries)}; set `device"):
        require_gpus(len(entries) + 1)


@pytest.mark.parametrize(
    ("listing", "entries"),
    [(CARDS, ["GPU-aaaa-0", "GPU-bbbb-1"]), (PARTS, ["MIG-cccc-0", "MIG-dddd-1", "GPU-bbbb-1"]), ("No devices found.", [])],
)
def test_without_a_choice_the_gpus_are_those_of_the_machine_or_their_parts(tmp_path, listing, entries):
    nvidia_smi(tmp_path, listing)
    assert list(visible_gpus().values()) == entries


def test_indices_that_do_not_count_in_pci_order_keep_their_own_names(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-bbbb-1")
    assert visible_gpus() == {"GPU-bbbb-1": "1"}
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert visible_gpus() == {"1": "1", "GPU-bbbb-1": "GPU-bbbb-1"}


@pytest.mark.parametrize(
    ("visible", "cards", "told", "mib"),
    [
        (None, CARDS, "GPU-aaaa-0, 81559\nGPU-bbbb-1, 24564", [81559, 24564]),
        ("1", CARDS, "GPU-aaaa-0, 81559\nGPU-bbbb-1, 24564", [24564]),
        (None, PARTS, "GPU-aaaa-0, 81559\nGPU-bbbb-1, 24564", [24564]),
        (None, CARDS, "GPU-aaaa-0, [N/A]\nGPU-bbbb-1, 24564", [24564]),
        ("0", CARDS, "Unable to determine the device handle", []),
    ],
)
def test_memory_is_that_of_the_gpus_a_process_may_use_as_far_as_it_is_told(tmp_path, monkeypatch, visible, cards, told, mib):
    assert gpu_memory() == [], "no nvidia-smi"
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvidia_smi(tmp_path, cards, told)
    assert gpu_memory() == [size * 2**20 for size in mib]


def test_whether_locks_can_be_kept_is_seen_without_making_any(tmp_path, leases, monkeypatch):
    require_leases()
    assert not leases.exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("CRFM_LEASES", str(tmp_path / "file" / "leases"))
    with pytest.raises(ResourceError, match=r"file/leases: cannot be written to .*; set CRFM_LEASES to a folder of yours"):
        require_leases()


@pytest.mark.parametrize("before", [None, "FASTEST_FIRST"])
def test_the_environment_is_as_before_after_the_lease_also_after_a_fault(monkeypatch, before):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    if before:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", before)
    with contextlib.suppress(KeyError), lease(2) as gpus:
        assert gpus == ["4", "5"]
        inside = (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"])
        assert inside == ("4,5", before or "PCI_BUS_ID")
        raise KeyError
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("CUDA_DEVICE_ORDER")) == ("4,5,6", before)
    with lease(3) as gpus:
        assert gpus == ["4", "5", "6"], "nothing is held any more"


def test_no_gpus_are_free_and_cost_nothing(leases):
    with lease(0) as gpus:
        assert gpus == [] and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert not leases.exists()


def test_a_machine_without_enough_gpus_is_said_at_once(monkeypatch):
    with pytest.raises(ResourceError, match="needs 1 GPU for one job, this machine shows 0"), lease(1):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ResourceError, match=r"needs 4 GPU .* shows 2; .* \(CUDA_VISIBLE_DEVICES=0,1\)"), lease(4):
        pass


def test_the_locks_lie_in_a_folder_that_only_its_user_can_enter(leases, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with lease(1):
        assert leases.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(leases)
    for name, fault in (("link", "is not yours"), ("file", "cannot hold the locks"), ("file/below", "cannot hold the locks")):
        monkeypatch.setenv("CRFM_LEASES", str(tmp_path / name))
        with pytest.raises(ResourceError, match=f"{name}.*{fault}.*set CRFM_LEASES"), lease(1):
            pass
    monkeypatch.setenv("CRFM_LEASES", str(leases))
    found = leases.lstat()
    monkeypatch.setattr(Path, "lstat", lambda self: SimpleNamespace(st_mode=found.st_mode, st_uid=found.st_uid + 1))
    with pytest.raises(ResourceError, match="is not yours; set CRFM_LEASES"), lease(1):
        pass
