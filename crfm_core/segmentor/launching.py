"""Training a segmentor in as many processes as its settings say: here, or several that are started for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import crfm_core
from crfm_core import CrfmError
from crfm_core.files import exclusive, read_json, write_json
from crfm_core.segmentor.processes import RENDEZVOUS
from crfm_core.settings import Segmentor

#: Seconds between two looks at whether a process has ended.
PATIENCE = 0.1


class TrainingJob(BaseModel):
    """The arguments of :func:`crfm_core.segmentor.training.train_segmentor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest: Path
    root: Path
    out: Path
    work: Path
    segmentor: Segmentor
    classes: list[str]
    palette: list[tuple[int, int, int]]
    iterations: int
    seed: int
    device: str = "cpu"
    val: Path | None = None
    pretrained: Path | None = None
    scratch: Path | None = None

    def run(self) -> None:
        """Train, as one of the processes."""
        from crfm_core.segmentor.training import train_segmentor  # slow to import, and where several are started not needed

        train_segmentor(**{name: getattr(self, name) for name in type(self).model_fields})


def launch_training(job: TrainingJob, threads: int = 1) -> None:
    """Train here, or in several processes on this machine where ``job.segmentor.processes`` asks for them.

    Args:
        threads: of the whole job; each process takes its part.

    Raises what :func:`crfm_core.segmentor.training.train_segmentor` raises, also from the process that failed first. However this process
    ends, those that it started end with it.
    """
    count = job.segmentor.processes
    if count == 1:
        job.run()
        return
    with exclusive(job.work):
        pass  # processes of an earlier run that are still alive end first: waiting inside the processes would look like a hang
    with tempfile.TemporaryDirectory() as folder:
        fault = Path(folder) / "fault.json"
        shared = {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(max(1, threads // count)), RENDEZVOUS: f"file://{folder}/rendezvous"}
        if Path("/sys/class/net/lo").exists():
            shared["GLOO_SOCKET_IFNAME"] = "lo"  # they are all here, whatever the machine's name resolves to
        command = [sys.executable, "-m", "crfm_core.segmentor", job.model_dump_json(), str(fault), str(os.getpid())]
        started: list[subprocess.Popen] = []
        try:
            for rank in range(count):
                started.append(subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            status = _first_failure(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if fault.is_file():
            said = read_json(fault)
            raise getattr(crfm_core, said["kind"])(said["message"])
    if status:
        raise CrfmError(f"training in {count} processes failed (exit status {status}); what the first of them said stands above")


def _first_failure(processes: list[subprocess.Popen]) -> int:
    """Wait until all processes have ended well, or one has not: its exit status, else 0."""
    while True:
        ended = [process.poll() for process in processes]
        if failed := [status for status in ended if status]:
            return failed[0]
        if None not in ended:
            return 0
        time.sleep(PATIENCE)


def run_process(job: str, fault: str, parent: str) -> None:
    """One of several processes: train by ``job``, JSON of a :class:`TrainingJob`.

    A fault is left in the file ``fault`` for the process ``parent``, that started this one and with which it ends.
    """
    with contextlib.suppress(AttributeError, OSError):  # only Linux can ask for it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        sys.exit(1)  # it has ended meanwhile
    try:
        TrainingJob.model_validate_json(job).run()
    except CrfmError as error:
        if not Path(fault).exists():
            write_json(fault, {"kind": type(error).__name__, "message": str(error)})
        sys.exit(1)
