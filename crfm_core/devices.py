"""Where models run: threads, the torch device, and which of the machine's GPUs a job uses.

Jobs that run side by side on one machine know how many GPUs they may use but not which. :func:`lease` assigns them by file locks, which
the kernel releases when their holder dies, however it dies. The locks lie in a folder of the user's in the machine's temporary folder,
or in the one that CRFM_LEASES names; only jobs that use the same folder see each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from crfm_core import ResourceError
from crfm_core.files import require_writable

if TYPE_CHECKING:
    import torch

#: Seconds between two looks at GPUs that are in use.
PATIENCE = 0.25


def use_threads(count: int) -> None:
    """Let torch use ``count`` threads; call it before the first computation."""
    import torch

    torch.set_num_threads(count)


def visible_gpus() -> dict[str, str]:
    """The GPUs this process may use: a name for each, equal in all processes of the machine, and its entry for CUDA_VISIBLE_DEVICES.

    They are those of CUDA_VISIBLE_DEVICES as far as CUDA reads it (up to the first entry, like -1, that names no device), or all
    that ``nvidia-smi -L`` lists, a partitioned GPU by its parts. Where there is an nvidia-smi, indices are named by the UUID behind
    them, so that a job with "0" and one without the variable give the same card the same name; indices count in PCI order, unless
    CUDA_DEVICE_ORDER says otherwise: then they are the names. Inside a SLURM job the names hold its id, because there
    every job may call its GPU 0.
    """
    cards = _listed()
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        entries = [part for card in cards for part in card[1:] or card]
    else:
        entries = list(takewhile(re.compile(r"\d+|(GPU|MIG)-\S+").fullmatch, (entry.strip() for entry in variable.split(","))))
    job = os.environ.get("SLURM_JOB_ID")
    gpus: dict[str, str] = {}
    for entry in entries:
        name = f"slurm-{job}-{_uuid_of(entry, cards)}" if job else _uuid_of(entry, cards)
        gpus.setdefault(re.sub(r"[^\w-]", "_", name), entry)
    return gpus


def require_gpus(count: int) -> None:
    """Raise ResourceError unless this process may use ``count`` GPUs; needs no torch, so it is cheap at the start of a run."""
    if count and (found := len(visible_gpus())) < count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ResourceError(
            f"device: cuda needs {count} GPU for one job, this machine shows {found}; set `device: cpu` or fewer `processes`, "
            "or run where the GPUs are" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else "")
        )


@contextlib.contextmanager
def lease(count: int) -> Iterator[list[str]]:
    """Give this process ``count`` GPUs that no other lease holds; wait until that many are free, and take all of them or none.

    Inside the block CUDA_VISIBLE_DEVICES names them, for this process and those it starts. Enter it before torch first uses CUDA,
    which reads the variable once, and never inside another lease. Programs started in the block do not hold the lease; forked children
    do until it ends, or, if this process is killed, until they die too, as they may still use the GPUs.

    Yields: the GPUs' entries of CUDA_VISIBLE_DEVICES, [] for ``count`` 0, which changes nothing.
    Raises: ResourceError when there are fewer than ``count`` GPUs at all, or the folder of the locks is not this user's.
    """
    require_gpus(count)
    if not count:
        yield []
        return
    gpus, folder = visible_gpus(), _lease_folder()
    held = _take(gpus, count, folder)
    if not held:
        print(f"Waiting for {count} of the GPUs {', '.join(gpus.values())}, which other jobs use", flush=True)
    while not held:
        time.sleep(PATIENCE)
        held = _take(gpus, count, folder)
    try:
        # By default CUDA counts the fastest GPU first; indices must mean the same to every job.
        order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        with _environment(CUDA_VISIBLE_DEVICES=",".join(held), CUDA_DEVICE_ORDER=order):
            yield list(held)
    finally:
        for handle in held.values():
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing it would leave the lock with forked children
            handle.close()


def gpu_names() -> list[str]:
    """Names of this machine's GPUs by nvidia-smi; none where there is no GPU or no driver."""
    return _nvidia_smi("--query-gpu=name", "--format=csv,noheader").splitlines()


def gpu_memory() -> list[int]:
    """Bytes of memory of each GPU that this process may use, by nvidia-smi; without those it does not know, and without parts of a
    partitioned GPU."""
    answer = _nvidia_smi("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
    found = dict(re.findall(r"^(\S+), (\d+)$", answer, re.MULTILINE))
    cards = _listed()
    uuids = [_uuid_of(entry, cards) for entry in visible_gpus().values()]
    return [int(found[uuid]) << 20 for uuid in uuids if uuid in found]


def require_leases() -> None:
    """Raise ResourceError unless the folder of the GPU locks can be used; nothing is created."""
    folder = _lease_path()
    require_writable(folder, "set CRFM_LEASES to a folder of yours")
    if folder.exists():
        _check_own(folder)


def _listed() -> list[list[str]]:
    """UUIDs that ``nvidia-smi -L`` lists, in PCI order: for each GPU its own, then those of its partitions."""
    cards: list[list[str]] = []
    for kind, uuid in re.findall(r"^\s*(GPU|MIG) .*\(UUID: (\S+)\)", _nvidia_smi("-L", partial=True), re.MULTILINE):
        if kind == "GPU":
            cards.append([uuid])
        else:
            cards[-1].append(uuid)
    return cards


def _nvidia_smi(*arguments: str, partial: bool = False) -> str:
    """What nvidia-smi prints; "" where there is none, and unless ``partial`` also when it fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    answer = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False)
    return answer.stdout if partial or answer.returncode == 0 else ""


def _uuid_of(entry: str, cards: list[list[str]]) -> str:
    """The UUID that an entry of CUDA_VISIBLE_DEVICES stands for, an index or the beginning of one; the entry itself where unknown."""
    if entry.isdigit():
        in_pci_order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") == "PCI_BUS_ID"
        return cards[int(entry)][0] if in_pci_order and int(entry) < len(cards) else entry
    found = [uuid for card in cards for uuid in card if uuid.startswith(entry)]
    return found[0] if len(found) == 1 else entry


def _lease_folder() -> Path:
    """The folder of the locks, created if missing. Raises ResourceError when it cannot be created or is another user's."""
    folder = _lease_path()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot hold the locks of GPUs ({error}); set CRFM_LEASES to a folder of yours") from None
    _check_own(folder)
    return folder


def _lease_path() -> Path:
    return Path(os.environ.get("CRFM_LEASES") or Path(tempfile.gettempdir()) / f"crfm-leases-{os.geteuid()}")


def _check_own(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ResourceError(f"{folder}: the folder of the locks of GPUs is not yours; set CRFM_LEASES to one that is")


def _take(gpus: dict[str, str], count: int, folder: Path) -> dict[str, IO]:
    """Open locks of ``count`` free GPUs by their entries, or none. One process does this at a time, so that no two wait for each other."""
    taken: dict[str, IO] = {}
    with (folder / "taking.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for name, entry in gpus.items():
            handle = (folder / f"{name}.lock").open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                continue
            taken[entry] = handle
            if len(taken) == count:
                return taken
        for lock in taken.values():
            lock.close()
    return {}


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def resolve(device: str) -> str:
    """The torch device for the configured one. Raises ResourceError for cuda when torch cannot use it."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "(unset)")
        raise ResourceError(
            f"device: cuda, but torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES={visible}); set `device: cpu`, "
            "or check the driver with nvidia-smi"
        )
    return device


def compute_dtype(device: str) -> torch.dtype:
    """What networks compute in when they are not trained: float32 on a CPU, bfloat16 on a GPU."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16
