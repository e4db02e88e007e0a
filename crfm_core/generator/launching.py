"""Training in as many processes as the control scheme's settings say: here, or started by accelerate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from crfm_core import CrfmError
from crfm_core.files import exclusive
from crfm_core.generator.training import TrainingJob, train_generator


def launch_training(job: TrainingJob, configuration: Path, threads: int = 1) -> None:
    """Run :func:`train_generator`, in several processes by ``accelerate launch`` where ``job.control.processes`` asks for them.

    Args:
        configuration: accelerate's configuration file, how the processes share the work.
        threads: of the whole job; each process takes its part.
    """
    processes = job.control.processes
    if processes == 1:
        train_generator(job)
        return
    with exclusive(job.work):
        pass  # processes of an earlier run that are still alive end first: waiting inside the processes would look like a hang
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration, "--num_processes", processes]
    command += ["--main_process_port", 0, "--num_cpu_threads_per_process", max(1, threads // processes)]
    command += ["-m", "crfm_core.generator", job.model_dump_json()]
    if subprocess.run([str(part) for part in command], check=False).returncode:
        raise CrfmError(f"training in {processes} processes failed; what the first of them said stands above")
