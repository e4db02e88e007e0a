"""What is looked at, and what is found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crfm_core import CrfmError
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import Rates
from crfm_core.settings import Dataset, Settings


@dataclass(frozen=True)
class Work:
    """What is left to be done, and where.

    Attributes:
        settings, datasets: the configuration; datasets by name.
        jobs: that are still to be run.
        rates: of configs/rates.yaml, for estimates of disk and memory.
        gpu_rules: names of the rules whose jobs hold GPUs.
        gpu_limit: GPUs that a job may be given at most; None: any number.
        here: whether jobs run on this machine, not on the nodes of a cluster.
        software: by rule, the file of envs/ that names its packages; empty where jobs run in environments of their own.
    """

    settings: Settings
    datasets: Mapping[str, Dataset]
    jobs: Sequence[Job]
    rates: Rates
    gpu_rules: frozenset[str] = frozenset()
    gpu_limit: int | None = None
    here: bool = True
    software: Mapping[str, Path] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return Path(self.settings.results)

    def of(self, *rules: str) -> list[Job]:
        """The jobs of these rules."""
        return [job for job in self.jobs if job.rule in rules]

    def named(self, wildcard: str, *rules: str) -> list[str]:
        """What a wildcard of these rules' jobs stands for, each value once."""
        return list(dict.fromkeys(job.names[wildcard] for job in self.of(*rules)))

    def gpus(self, job: Job) -> int:
        """The GPUs that a job holds."""
        if job.rule not in self.gpu_rules:
            return 0
        if job.rule == "train_generator":
            return self.settings.controls[job.names["control"]].processes
        return self.settings.segmentors[job.names["segmentor"]].processes if job.rule == "train_segmentor" else 1


@dataclass(frozen=True)
class Fetch:
    """A download to come: what, to which folder, the key that names the folder, and about how many bytes (None: not known)."""

    what: str
    folder: Path
    key: str
    size: float | None = None


@dataclass
class Findings:
    """Problems, each with its remedy; what is odd but does not stop a run; what was looked at, with figures; downloads to come."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)

    @contextlib.contextmanager
    def listing(self) -> Iterator[None]:
        """Put what the block raises on the list of problems."""
        try:
            yield
        except CrfmError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename}: cannot be looked at ({error.strerror}); see to it that it can be read")

    def text(self) -> str:
        """The list for a terminal, without what was looked at where there are problems."""
        problems = list(dict.fromkeys(self.problems))
        lines = ["Nothing stands in the way:"] + [f"  {fact}" for fact in self.facts]
        if problems:
            lines = [
                f"{'One thing stands' if len(problems) == 1 else f'{len(problems)} things stand'} in the way; no job has been started:"
            ]
            lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        return "\n".join([*lines, *self.notes()])

    def notes(self) -> list[str]:
        """The warnings, a line each."""
        return [f"  note: {warning}" for warning in dict.fromkeys(self.warnings)]
