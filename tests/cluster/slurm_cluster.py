"""A SLURM of one node on the loopback interface, with four pretended GPUs, for as long as a test needs it.

It takes nothing from the machine's own SLURM, if there is one, runs as any user, keeps no accounts (as on clusters without
slurmdbd), and is gone with its folder. The GPUs are device files every machine has: SLURM hands them out and never looks at them.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: What Debian's packages slurm-wlm and munge install.
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "munged")

GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")

CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MpiDefault=none
MinJobAge=7200
ReturnToService=2
KillWait=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=UNLIMITED State=UP
PartitionName=gpu Nodes={host} MaxTime=UNLIMITED State=UP
"""


def program(name: str) -> str | None:
    """Where a program is; daemons lie outside the PATH of ordinary users."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if program(name) is None]


@dataclass(frozen=True)
class Cluster:
    """A running cluster; programs called with ``environment`` talk to it."""

    folder: Path
    host: str
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """What a program of SLURM says. Raises CalledProcessError when it fails, TimeoutExpired where the controller is dead."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True, timeout=60).stdout

    def jobs(self) -> dict[str, dict[str, str]]:
        """All jobs that the controller remembers by their number: state, rule, GPUs by their place in the node, ..."""
        found = {}
        for text in self.ask("scontrol", "--details", "--oneliner", "show", "job").splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", text))
            if "JobId" in fields:
                gpus = re.search(r"GRES=gpu\S*\(IDX:([\d,-]+)\)", text)
                rule = re.search(r"rule_(\w+?)(?:_wildcards_|\s|$)|group_(\w+)", fields.get("Comment", ""))
                fields["Rule"] = next(filter(None, rule.groups()), "") if rule else ""
                found[fields["JobId"]] = fields | {"Gpus": gpus[1] if gpus else ""}
        return found

    def set_node(self, state: str) -> None:
        self.ask("scontrol", "update", f"NodeName={self.host}", f"State={state}", "Reason=test")


def places(text: str) -> set[int]:
    """Places that SLURM writes as "0-1,3"."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start munged, slurmctld and slurmd below ``folder``, wait until the node is idle, and stop them at the end, however it comes."""
    for name in ("bin", "state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munged asks for it
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(2)
    values = {"host": host, "user": getpass.getuser(), "folder": folder, "controller": ports[0], "daemon": ports[1], "gpus": len(GPUS)}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(**values))
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={file}\n" for file in GPUS))
    wrapper = folder / "bin" / "srun"  # the job steps of the workflow engine's plugin drop SLURM_CONF
    wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {program("srun")} "$@"\n')
    wrapper.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
    environment |= {"SLURM_CONF": str(configuration), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}:/usr/sbin"}
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munged = [
        "munged",
        "--foreground",
        "--force",
        f"--socket={folder}/munge.socket",
        f"--key-file={key}",
        f"--log-file={folder}/munged.log",
    ]
    munged += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"]
    daemons = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]
    running: list[subprocess.Popen] = []
    try:
        for name, *arguments in daemons:
            with (folder / f"{name}.out").open("wb") as out:
                command = [program(name) or name, *arguments]
                running.append(
                    subprocess.Popen(
                        command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
                    )
                )
            if name == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        here = Cluster(folder, host, environment)
        _wait(lambda: _idle(here), folder)
        yield here
    finally:
        for daemon in reversed(running):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def end_with_parent() -> None:
    """Let a program end when the tests do, also when these are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _idle(here: Cluster) -> bool:
    try:
        return here.ask("sinfo", "--noheader", "--format=%T").split()[:1] == ["idle"]
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False


def _wait(condition: Callable[[], bool], folder: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(
                f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in (*folder.glob("*.log"), *folder.glob("*.out"))
            )
            raise TimeoutError(f"the cluster did not start\n{logs}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
