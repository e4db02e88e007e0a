"""What every script of this folder does around its one call: log to the rule's log, take the rule's threads and GPUs, report faults."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from crfm_core import CrfmError
from crfm_core.devices import lease


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
    except CrfmError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    if not snakemake.output:
        sys.stdout.flush()
        with open(snakemake.log[0], encoding="utf-8") as log, open(terminal, "w", encoding="utf-8") as out:
            out.write(log.read())
