"""Work in several processes of this machine: one launcher for all of it, and what its processes say to each other."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

import crfm_core
from crfm_core import ConfigError, CrfmError
from crfm_core.files import exclusive, read_json, work_folder, write_json

Value = TypeVar("Value")

#: The environment variable that names the file by which the processes find each other.
RENDEZVOUS = "CRFM_RENDEZVOUS"
#: Seconds between two looks at whether a process has ended.
POLL_INTERVAL = 0.1


class ParallelJob(BaseModel):
    """Work that one or several processes do together; its fields are its arguments, which reach the processes as JSON.

    Attributes:
        work: folder of resumable state, which one run of the job holds at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    work: Path

    @property
    def processes(self) -> int:
        """How many processes share the work."""
        raise NotImplementedError

    def run(self) -> None:
        """Do the work, as one of its processes; inside, :func:`process_group` connects them."""
        raise NotImplementedError


def launch(job: ParallelJob, threads: int = 1) -> None:
    """Run a job here, or in several processes on this machine where ``job.processes`` is above 1.

    Args:
        threads: of the whole job; each process takes its part.

    Raises what ``job.run`` raises, also from the process that failed first. However this process ends, those that it started end with it.
    """
    if job.processes == 1:
        job.run()
        return
    with exclusive(job.work):
        pass  # processes of an earlier run that are still alive end first: waiting inside the processes would look like a hang
    with tempfile.TemporaryDirectory() as folder:
        fault = Path(folder) / "fault.json"
        shared = {
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(job.processes)),
            "OMP_NUM_THREADS": str(max(1, threads // job.processes)),
            RENDEZVOUS: f"file://{folder}/rendezvous",
        }
        if Path("/sys/class/net/lo").exists():
            shared["GLOO_SOCKET_IFNAME"] = "lo"  # they are all here, whatever the machine's name resolves to
        kind = f"{type(job).__module__}:{type(job).__qualname__}"
        command = [sys.executable, "-m", "crfm_core.distributed", kind, job.model_dump_json(), str(fault), str(os.getpid())]
        started: list[subprocess.Popen] = []
        try:
            for rank in range(job.processes):
                started.append(subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            status = _first_failure(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if fault.is_file():
            found = read_json(fault)
            raise getattr(crfm_core, found["kind"])(found["message"])
    if status:
        raise CrfmError(f"training in {job.processes} processes failed (exit status {status}); the log above holds the first one's error")


def _first_failure(processes: list[subprocess.Popen]) -> int:
    """Wait until all processes have ended well, or one has not: its exit status, else 0."""
    while True:
        ended = [process.poll() for process in processes]
        if failed := [status for status in ended if status]:
            return failed[0]
        if None not in ended:
            return 0
        time.sleep(POLL_INTERVAL)


def _run_process(kind: str, job: str, fault: str, parent: str) -> None:
    """One of several processes: run the job of class ``kind`` ("module:class") with these fields (JSON).

    A fault is left in the file ``fault`` for the process ``parent``, which started this one and with which it ends.
    """
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        sys.exit(1)  # it has ended meanwhile
    module, name = kind.split(":")
    try:
        getattr(importlib.import_module(module), name).model_validate_json(job).run()
    except CrfmError as error:
        if not Path(fault).exists():
            write_json(fault, {"kind": type(error).__name__, "message": str(error)})
        sys.exit(1)


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Process ``rank`` of ``size`` that work together, on ``device`` ("cpu", "cuda" or "cuda:1"). Alone, it sends nothing."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> range:
        """The positions in a batch of all processes that are this one's."""
        own = batch_size // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Value) -> Value:
        """The main process's value, in all processes."""
        box: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, value: torch.Tensor) -> float:
        """The mean over the processes of a number, which lies on their device."""
        value = value.detach()
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value) / self.size

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """The sum over the processes of an array of whole numbers."""
        if self.size == 1:
            return counts
        summed = torch.from_numpy(counts).to(self.device)
        dist.all_reduce(summed)
        return summed.cpu().numpy()

    @contextlib.contextmanager
    def work_folder(self, folder: Path | str, fingerprint: str) -> Iterator[Path]:
        """:func:`crfm_core.files.work_folder`, held by the main process for all."""
        if not self.is_main:
            self.barrier()
            yield Path(folder)
            return
        with work_folder(folder, fingerprint) as held:
            self.barrier()
            yield held


@contextlib.contextmanager
def process_group(size: int, device: str) -> Iterator[ProcessGroup]:
    """Connect this process with the others of its job, each on a GPU of its own where ``device`` is "cuda".

    :func:`launch` starts them; torchrun could. Raises ConfigError when they are not ``size``.
    """
    if size == 1:
        yield ProcessGroup(device=device)
        return
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) != size:
        raise ConfigError(f"processes: {size}, but {started} was started; use crfm_core.distributed.launch, or set processes: 1")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    # the others wait while the main process measures, writes tens of gigabytes, or reads a slow disk
    dist.init_process_group(
        "gloo" if device == "cpu" else "cuda:nccl,cpu:gloo",  # gloo gathers what FSDP keeps on the CPU
        init_method=os.environ.get(RENDEZVOUS, "env://"),
        rank=int(os.environ["RANK"]),
        world_size=size,
        timeout=timedelta(hours=1),
    )
    yield ProcessGroup(dist.get_rank(), size, device)
    dist.barrier()
    dist.destroy_process_group()  # after a fault the process ends, and asking the others would only hang


if __name__ == "__main__":
    _run_process(*sys.argv[1:])
