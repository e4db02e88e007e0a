"""What preflight checks, and what it finds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crfm_core import CrfmError
from crfm_core.layout import Layout
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import Rates
from crfm_core.settings import Dataset, Settings


@dataclass(frozen=True)
class PendingRun:
    """The jobs that are still to be run, and where.

    Attributes:
        settings, datasets: the configuration; datasets by name.
        jobs: those still to be run.
        rates: of configs/rates.yaml, for estimates of disk and memory.
        gpu_rules: names of the rules whose jobs hold GPUs.
        gpu_limit: most GPUs that a job may be given; None: any number.
        local: whether jobs run on this machine, not on the nodes of a cluster.
        software: by rule, the file of envs/ that names its packages; empty where jobs run in environments of their own.
    """

    settings: Settings
    datasets: Mapping[str, Dataset]
    jobs: Sequence[Job]
    rates: Rates
    gpu_rules: frozenset[str] = frozenset()
    gpu_limit: int | None = None
    local: bool = True
    software: Mapping[str, Path] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return Path(self.settings.results)

    @property
    def layout(self) -> Layout:
        return Layout(self.results)

    def of(self, *rules: str) -> list[Job]:
        """The jobs of these rules."""
        return [job for job in self.jobs if job.rule in rules]

    def named(self, wildcard: str, *rules: str) -> list[str]:
        """The values of a wildcard in these rules' jobs, each once."""
        return list(dict.fromkeys(job.names[wildcard] for job in self.of(*rules)))

    def gpus(self, job: Job) -> int:
        """The GPUs that a job holds."""
        return job.processes(self.settings) if job.rule in self.gpu_rules else 0


@dataclass(frozen=True)
class PendingDownload:
    """A download to come: what, to which folder, the key that names the folder, and about how many bytes (None: not known)."""

    what: str
    folder: Path
    key: str
    size: float | None = None


@dataclass
class CheckResults:
    """Problems, each with its remedy; warnings, which stop nothing; facts that were checked; downloads to come."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    downloads: list[PendingDownload] = field(default_factory=list)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Add an error of the block to the problems."""
        try:
            yield
        except CrfmError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")

    def text(self) -> str:
        """The results for a terminal; facts only where there are no problems."""
        problems = list(dict.fromkeys(self.problems))
        if problems:
            lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; no job was started:"]
            lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        else:
            lines = ["Preflight passed:", *(f"  {fact}" for fact in self.facts)]
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """The warnings, a line each."""
        return [f"  note: {warning}" for warning in dict.fromkeys(self.warnings)]


def path_problems(key: str, path: str | None, remedy: str, file: bool = False) -> list[str]:
    """What is wrong with a path of the configuration: nothing, or that it leads nowhere. None: no path is configured."""
    if path is None or (Path(path).is_file() if file else Path(path).exists()):
        return []
    return [f"{key}: no such file{'' if file else ' or folder'}: {path} (from {Path.cwd()}); give {remedy}"]
