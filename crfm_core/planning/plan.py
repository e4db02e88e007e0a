"""What a run still takes: the unfinished jobs of the workflow, estimated by the times of finished ones or by rates."""

from __future__ import annotations

import heapq
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from crfm_core.files import existing_parent
from crfm_core.planning.durations import duration
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import Rates
from crfm_core.planning.workload import Workload
from crfm_core.settings import Dataset, Settings

#: What an estimate is based on, the best first.
BASES = ("measured", "scaled", "guess", "not known")
#: Wildcards that tell variants of a rule's work apart; the others say on what it is done, and how often.
VARIANTS = ("control", "sampler", "segmentor", "preset", "filter")
TEXT_WIDTH = 100  #: widest line


@dataclass(frozen=True)
class Estimate:
    """Seconds of one job (None: not known), their basis, the GPUs that it holds meanwhile, and bytes that it leaves on the disk."""

    seconds: float | None
    basis: str
    gpus: int = 0
    disk: float | None = None


class Estimator:
    """Times of jobs.

    A job takes as long as finished jobs of this run of the same variant did, in proportion to their sizes by the rates; where there
    are none, as other jobs of the rule; else what the rates say. Rates are times measured with the embedded networks, or counted work
    at a speed that is measured on a CPU and assumed on a GPU.
    """

    def __init__(self, workload: Workload, gpu_rules: Sequence[str], gpu: str | None = None) -> None:
        self.workload, self.rates, self.settings = workload, workload.rates, workload.settings
        self.gpu_rules = set(gpu_rules)
        known = next((name for name in self.rates.speed.gpus if gpu and name in gpu), None)
        self.gpu = known or next(iter(self.rates.speed.gpus))
        self.gpu_is_here = known is not None
        self.finished: list[tuple[Job, float]] = []

    def learn(self, jobs: Sequence[Job]) -> None:
        """Take the times of finished jobs; only their files are of this configuration."""
        for job in jobs:
            seconds = None if job.pending or job.benchmark is None else _seconds_of(job.benchmark)
            if seconds is not None:
                self.finished.append((job, seconds))

    def estimate(self, job: Job) -> Estimate:
        """The estimate of one job."""
        gpus = job.processes(self.settings) if job.rule in self.gpu_rules else 0
        seconds, basis = self._by_rates(job)
        disk = self.workload.bytes_of(job)
        of_rule = [(other, took) for other, took in self.finished if other.rule == job.rule]
        of_variant = [(other, took) for other, took in of_rule if _variant(other) == _variant(job)]
        for finished, known_by in ((of_variant, "measured"), (of_rule, "scaled")):
            if finished:
                took = sum(took for _, took in finished)
                known = [expected for other, _ in finished if (expected := self._by_rates(other)[0]) is not None]
                total = sum(known) if len(known) == len(finished) else 0.0
                return Estimate(took / len(finished) if seconds is None or not total else seconds * took / total, known_by, gpus, disk)
        return Estimate(seconds, basis, gpus, disk)

    def _by_rates(self, job: Job) -> tuple[float | None, str]:
        return self.workload.seconds_of(job, self.gpu if job.rule in self.gpu_rules else None)


def _variant(job: Job) -> tuple:
    return tuple(job.names.get(name) for name in VARIANTS)


def _seconds_of(benchmark: Path) -> float | None:
    """Seconds that the workflow noted for a job; None where there are none, or none that can be read."""
    try:
        seconds = pd.to_numeric(pd.read_csv(benchmark, sep="\t")["s"], errors="coerce").mean()
    except (OSError, KeyError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError):
        return None
    return None if math.isnan(seconds) else float(seconds)


# --------------------------------------------------------------------------------------------------------------- a plan


@dataclass
class PlannedStage:
    """The unfinished jobs of one rule."""

    rule: str
    estimates: list[Estimate] = field(default_factory=list)

    @property
    def basis(self) -> str:
        """What its estimates are based on, the best first."""
        return ", ".join(basis for basis in BASES if any(one.basis == basis for one in self.estimates))

    def seconds(self, on_gpu: bool) -> float | None:
        """Seconds of its jobs on GPUs (times the GPUs they hold), or on processors, as far as they are known; None where it has no such
        jobs or none of a known time."""
        known = [one.seconds * max(1, one.gpus) for one in self.estimates if bool(one.gpus) == on_gpu and one.seconds is not None]
        return sum(known) if known else None

    @property
    def disk(self) -> float | None:
        """Bytes, as far as they are known; None where nothing is."""
        known = [one.disk for one in self.estimates if one.disk is not None]
        return sum(known) if known else None

    def wall(self, cores: int, gpus: int) -> float:
        """Seconds until it is done when nothing else runs, the longest jobs first; jobs of an unknown time take none."""
        held = max(1, *(one.gpus for one in self.estimates))
        on_gpu = any(one.gpus for one in self.estimates)
        ends = [0.0] * min(len(self.estimates), max(1, gpus // held if on_gpu else cores))
        for one in sorted(self.estimates, key=lambda one: -(one.seconds or 0)):
            heapq.heapreplace(ends, ends[0] + (one.seconds or 0))
        return max(ends)


@dataclass
class Plan:
    """What is still to be done; ``cores`` and ``gpus`` at once."""

    stages: list[PlannedStage]
    estimator: Estimator
    cores: int
    gpus: int
    splits: list[tuple[str, str]]
    controls: list[str]
    models: list[str]

    @property
    def jobs(self) -> int:
        return sum(len(stage.estimates) for stage in self.stages)

    def total(self, on_gpu: bool) -> float:
        """Seconds of all that is known."""
        return sum(stage.seconds(on_gpu) or 0.0 for stage in self.stages)

    @property
    def wall(self) -> tuple[float, float]:
        """Wall time of what is known, in seconds: when nothing ever waits, and when each stage waits for the one before it."""
        longest = max((one.seconds or 0.0 for stage in self.stages for one in stage.estimates), default=0.0)
        least = max(self.total(True) / self.gpus, self.total(False) / self.cores, longest)
        return least, sum(stage.wall(self.cores, self.gpus) for stage in self.stages)

    @property
    def disk(self) -> float:
        return sum(stage.disk or 0.0 for stage in self.stages)

    def text(self) -> str:
        """The plan for a terminal."""
        settings, results = self.estimator.settings, self.estimator.workload.results
        if not self.jobs:
            return f"Nothing to do: {results} is complete.\n"
        on_gpu = any(one.gpus for stage in self.stages for one in stage.estimates)
        kinds = [True, False] if on_gpu else [False]
        lines = [f"Still to do: scale {settings.scale}, device {settings.device}, results in {results}", ""]
        lines.append(_line("stage", ["jobs", *["GPU-hours"] * on_gpu, "CPU-hours", "disk", "based on"]))
        for stage in self.stages:
            times = [_hours_of(stage, kind) for kind in kinds]
            lines.append(_line(stage.rule, [str(len(stage.estimates)), *times, _size(stage.disk), stage.basis]))
        unknown = [stage.rule for stage in self.stages if "not known" in stage.basis]
        without = f"without {len(unknown)} not known" if unknown else ""
        lines.append(_line("total", [str(self.jobs), *(_hours(self.total(kind)) for kind in kinds), _size(self.disk), without]))
        notes = [*self._wall_note(on_gpu, unknown), *self._tile_notes(), *self._disk_notes(), "", *self._basis_notes(on_gpu)]
        wrapped = [part for note in notes for part in textwrap.wrap(note, TEXT_WIDTH, subsequent_indent="  ") or [""]]
        return "\n".join([*lines, "", *wrapped]) + "\n"

    def _wall_note(self, on_gpu: bool, unknown: list[str]) -> list[str]:
        least, most = self.wall
        if not least:
            return ["Wall time: not known."]
        machine = f"{_several(self.gpus, 'GPU')} and {_several(self.cores, 'core')}" if on_gpu else _several(self.cores, "core")
        span = duration(most) if least > 0.95 * most else f"between {duration(least)} and {duration(most)}"
        more = f", and what is not known: {', '.join(unknown)}" if unknown else ""
        return [f"Wall time with {machine}: {span}{more}."]

    def _tile_notes(self) -> list[str]:
        lines = []
        for name in dict.fromkeys(dataset for dataset, _ in self.splits):
            counts = {split: self.estimator.workload.tile_count(name, split) for dataset, split in self.splits if dataset == name}
            parts = [f"{split} {'?' if one.tiles is None else format(one.tiles, ',')} ({one.basis})" for split, one in counts.items()]
            lines.append(f"Tiles of {name}: {', '.join(parts)}.")
        return lines

    def _disk_notes(self) -> list[str]:
        workload = self.estimator.workload
        while_training = max((workload.checkpoint_bytes(control) for control in self.controls), default=0.0)
        free = shutil.disk_usage(existing_parent(workload.results)).free
        lines = [f"Disk: images are counted uncompressed; {_size(free)} are free."]
        if while_training:
            lines.append(f"Each training of a generator needs up to {_size(while_training)} more for checkpoints, until it ends.")
        if self.disk + while_training > free:
            lines.append("That may not be enough: free some space, or set `results` to another disk.")
        if workload.settings.base_model.kind == "hub" and "base_model" in self.models:
            lines.append(f"The base model takes about {_size(workload.rates.base_model_bytes)} in {workload.settings.base_model.path}.")
        return lines

    def _basis_notes(self, on_gpu: bool) -> list[str]:
        rates, used = self.estimator.rates, {one.basis for stage in self.stages for one in stage.estimates}
        gpu, speed = self.estimator.gpu, rates.speed
        at = f"{speed.core:g} TFLOP/s of a core"
        if on_gpu:
            which, peak = "the one here" if self.estimator.gpu_is_here else "no known GPU is here", speed.gpus[gpu]
            at = f"{speed.share * peak:.0f} TFLOP/s: {100 * speed.share:.0f} % of the peak of a GPU {gpu} ({which}), an assumption"
        notes = {
            "measured": "times of finished jobs of the same kind in this run, in proportion to their work.",
            "scaled": f"times measured on {rates.measured}, or of other jobs of the stage here, scaled to the configured sizes.",
            "guess": f"work counted {rates.counted}, at {at}; reading, writing and other work of the processor are not included.",
            "not known": "downloads, and work that was never measured.",
        }
        return [f"{basis}: {notes[basis]}" for basis in BASES if basis in used]


def make_plan(
    jobs: Sequence[Job],
    settings: Settings,
    datasets: Mapping[str, Dataset],
    rates: Rates,
    gpu_rules: Sequence[str],
    cores: int,
    gpus: int,
    gpu: str | None = None,
) -> Plan:
    """The plan of the jobs that are left.

    Args:
        jobs: all jobs of the run, finished or not (:func:`crfm_core.planning.jobs.read_jobs`).
        gpu_rules: names of the rules whose jobs hold GPUs.
        cores, gpus: how many may be used at once.
        gpu: the GPUs' name; None or one that ``rates`` does not have: the first one there.
    """
    splits = [(job.names["dataset"], job.names["split"]) for job in jobs if job.rule == "tile_scenes"]
    uncut = frozenset((job.names["dataset"], job.names["split"]) for job in jobs if job.rule == "tile_scenes" and job.pending)
    estimator = Estimator(Workload(settings, datasets, rates, uncut), gpu_rules, gpu)
    estimator.learn(jobs)
    stages: dict[str, PlannedStage] = {}
    for job in jobs:
        if job.pending:
            stages.setdefault(job.rule, PlannedStage(job.rule)).estimates.append(estimator.estimate(job))
    controls = [job.names["control"] for job in jobs if job.rule == "train_generator" and job.pending]
    models = [job.names["model"] for job in jobs if job.rule == "fetch_model" and job.pending]
    return Plan(list(stages.values()), estimator, max(1, cores), max(1, gpus), splits, controls, models)


def _several(count: int, name: str) -> str:
    """``1 GPU``, ``8 GPUs``; a very large number means that there is no limit."""
    return f"{count if count < 10**6 else 'any number of'} {name}{'s' if count != 1 else ''}"


def _hours(seconds: float) -> str:
    """``1,240``, ``12.3``, ``0.02``, ``<0.01``."""
    value = seconds / 3600
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.01 else "<0.01"


def _size(count: float | None) -> str:
    """``12 GB``, ``3.1 GB``, ``40 MB``; ``-`` for less than a megabyte."""
    if count is None:
        return "?"
    if count < 1e6:
        return "-"
    value, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"


def _hours_of(stage: PlannedStage, on_gpu: bool) -> str:
    """Hours; ``?`` and ``3.1+`` where all or some of the jobs are not known, ``-`` where there are none."""
    unknown = [one.seconds is None for one in stage.estimates if bool(one.gpus) == on_gpu]
    if not unknown:
        return "-"
    seconds = stage.seconds(on_gpu)
    return "?" if seconds is None else _hours(seconds) + "+" * any(unknown)


def _line(stage: str, cells: list[str]) -> str:
    """A row: the stage's name, cells of numbers to the right, the last one as it is."""
    return f"{stage:<23}{cells[0]:>6}" + "".join(f"{cell:>11}" for cell in cells[1:-1]) + f"  {cells[-1]}".rstrip()
