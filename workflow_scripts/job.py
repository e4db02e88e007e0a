"""What every script of this folder does around its one call: log to the rule's log, take the rule's threads and GPUs, report faults."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from crfm_core import CrfmError, ResourceError
from crfm_core.devices import lease
from crfm_core.files import full_disk_behind


@contextlib.contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Send all output, that of libraries too, to the rule's log; end with exit status 1 when the work fails.

    Before the script imports anything that looks for GPUs, the job gets as many of the machine's as the rule asks for. The log of a
    rule without output files is what it is run for: when the work is done it goes to the terminal, too.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(snakemake.threads)
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives memory back: large manifests peak a quarter lower
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.stdout.flush()
    terminal = os.dup(1)
    with open(snakemake.log[0], "w", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        with lease(snakemake.resources.get("gpu", 0)) as gpus:
            if gpus:
                print(f"on {socket.gethostname()}, GPU {', '.join(gpus)}", flush=True)
            yield
    except ResourceError as error:
        _report(f"error: {error}", terminal)
    except Exception as error:
        if full := full_disk_behind(error):  # while the log was written, or by a library that writes for itself
            name = getattr(full, "filename", None) or snakemake.log[0]
            _report(f"error: {name}: could not be written whole ({full}); free some space on its disk", terminal)
        _report(f"error: {error}" if isinstance(error, CrfmError) else traceback.format_exc(), terminal)
    if not snakemake.output:
        sys.stdout.flush()
        with open(snakemake.log[0], encoding="utf-8") as log, open(terminal, "w", encoding="utf-8") as out:
            out.write(log.read())


def _report(text: str, terminal: int) -> NoReturn:
    """End the job with exit status 1 and the reason in its log, or on the terminal when the log's disk is full, too."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.write(terminal, f"{text}\n".encode())
    sys.exit(1)
