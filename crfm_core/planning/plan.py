"""What a run still takes, told before it: the unfinished jobs of the workflow, by the times of finished ones or by rates."""

from __future__ import annotations

import heapq
import math
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import Field, ValidationError

from crfm_core import ConfigError
from crfm_core.files import existing_parent
from crfm_core.planning.durations import duration
from crfm_core.planning.workload import Job, Load, Unknown, Workload
from crfm_core.settings import Dataset, Section, Settings

#: What an estimate rests on, the best first.
BASES = ("measured", "scaled", "guess", "not known")
WIDTH = 100  #: widest line

# ---------------------------------------------------------------------------------------------------------------- rates


class Measured(Section):
    """Times on one core, of the embedded networks."""

    where: str
    start: dict[str, float] = Field(description="seconds of a job before and after its work, by rule; other: all rules not named")
    size: dict[str, float] = Field(description="what the times are of: tile, layers, width, tokens, channels")
    work: dict[str, float | dict[str, float]] = Field(description="seconds by kind of work")
    bytes: dict[str, float]


class Counted(Section):
    """Work at SD3.5-medium's size."""

    where: str
    tile: int
    work: dict[str, float | dict[str, float]] = Field(description="TFLOP by kind of work")
    weights: dict[str, float | dict[str, float]] = Field(description="numbers of weights in billions")
    training: dict[str, float | dict[str, float]] = Field(description="what a process of a training holds")


class Speed(Section):
    """TFLOP per second."""

    cpu: float = Field(gt=0, description="of a core, measured")
    share: float = Field(gt=0, le=1, description="of a GPU's peak, assumed")
    gpus: dict[str, float] = Field(min_length=1, description="peaks by a part of the GPU's name; the first stands for others")


class Rates(Section):
    """The file configs/rates.yaml."""

    measured: Measured
    counted: Counted
    speed: Speed


def read_rates(path: Path | str) -> Rates:
    """Read configs/rates.yaml, or another file like it. Raises ConfigError naming the wrong key."""
    try:
        return Rates.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); take the file that came with the workflow") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'all of it'}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(faults[:3])}; take the file that came with the workflow") from None


# ----------------------------------------------------------------------------------------------------------------- jobs


def read_jobs(listing: str, rules: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """The jobs behind a listing of the workflow's files: lines of fields with tabs between them, under a heading that names at least
    output_file, rule and plan ("update pending" for files still to be made).

    Args:
        rules: for each rule ``outputs``, regular expressions of its files with its wildcards as groups, and ``benchmark``, the path
            where a job's time is noted with the wildcards in braces ("" for none).

    Jobs come in the order of ``rules``. Raises ConfigError for a listing of another form, or a file that is none of its rule's.
    """
    lines = [line.split("\t") for line in listing.splitlines() if line.strip()]
    if not lines or not {"output_file", "rule", "plan"} <= set(lines[0]):
        raise ConfigError(f"the workflow's files are not listed in the form expected; it begins with {listing[:80]!r}")
    found: dict[tuple, Job] = {}
    for values in lines[1:]:
        row = dict(zip(lines[0], values, strict=False))
        rule = rules.get(row.get("rule", ""), {"outputs": []})
        match = next(filter(None, (re.fullmatch(pattern, row["output_file"]) for pattern in rule["outputs"])), None)
        if match is None:
            raise ConfigError(f"the workflow lists {row['output_file']} as a file of rule {row.get('rule')}, which makes no such file")
        names = match.groupdict()
        benchmark = Path(rule["benchmark"].format(**names)) if rule["benchmark"] else None
        pending = row["plan"] == "update pending"
        key = (row["rule"], *sorted(names.items()))
        found[key] = Job(row["rule"], names, pending or (key in found and found[key].pending), benchmark)
    order = list(rules)
    return sorted(found.values(), key=lambda job: order.index(job.rule))


# ------------------------------------------------------------------------------------------------------------ estimates


@dataclass(frozen=True)
class Estimate:
    """Seconds of one job (None: not known), what they rest on, and the GPUs that it holds meanwhile."""

    seconds: float | None
    basis: str
    gpus: int = 0
    disk: float | None = None


class Estimator:
    """Times of jobs.

    A job of a kind that this run has finished some of takes as long as they did, in proportion to what each has to do by the rates; a
    kind of which it has finished none takes what the rates say, corrected by other jobs of the rule. Rates are times measured with
    the embedded networks, or for others counted work at a speed that is measured on a CPU and assumed on a GPU.
    """

    def __init__(self, workload: Workload, rates: Rates, gpu_rules: Sequence[str], gpu: str | None = None) -> None:
        self.workload, self.rates, self.gpu_rules = workload, rates, set(gpu_rules)
        self.settings = workload.settings
        known = next((name for name in rates.speed.gpus if gpu and name in gpu), None)
        self.gpu = known or next(iter(rates.speed.gpus))
        self.gpu_is_here = known is not None
        self.finished: list[tuple[Job, float]] = []

    def learn(self, jobs: Sequence[Job]) -> None:
        """Take the times of those of the jobs that are finished, and whose files are therefore of this configuration."""
        for job in jobs:
            seconds = None if job.pending or job.benchmark is None else _seconds_of(job.benchmark)
            if seconds is not None:
                self.finished.append((job, seconds))

    def of(self, job: Job) -> Estimate:
        """The estimate of one job."""
        load, by_rates, basis = None, None, "not known"
        try:
            load = self.workload.of(job)
            by_rates, basis = self._by_rates(job, load)
        except Unknown:
            pass
        gpus = (load.processes if load else 1) if job.rule in self.gpu_rules else 0
        disk = load.disk if load else None
        like = [(one, seconds) for one, seconds in self.finished if one.rule == job.rule]
        same = [(one, seconds) for one, seconds in like if _kind(one) == _kind(job)]
        for some, becomes in ((same, "measured"), (like, "scaled")):
            if (seconds := self._in_proportion(by_rates, some)) is not None:
                return Estimate(seconds, becomes, gpus, disk)
        return Estimate(by_rates, basis, gpus, disk)

    def _in_proportion(self, by_rates: float | None, finished: list[tuple[Job, float]]) -> float | None:
        if not finished:
            return None
        expected = [self._expected(job) for job, _ in finished]
        if by_rates is None or None in expected or not sum(expected):
            return sum(seconds for _, seconds in finished) / len(finished)
        return by_rates * sum(seconds for _, seconds in finished) / sum(expected)

    def _expected(self, job: Job) -> float | None:
        try:
            return self._by_rates(job, self.workload.of(job))[0]
        except Unknown:
            return None

    def _by_rates(self, job: Job, load: Load) -> tuple[float, str]:
        """Seconds by the rates alone, and what those rest on. Raises Unknown where there is no rate."""
        start = self.rates.measured.start
        seconds, basis = start.get(job.rule, start["other"]), "scaled"
        for kind, amount in load.work.items():
            each, rests_on = self._rate(kind, load.tile, job.rule in self.gpu_rules)
            seconds += each * amount / load.processes
            basis = max(basis, rests_on, key=BASES.index)
        return seconds, basis

    def _rate(self, kind: str, tile: int, on_gpu: bool) -> tuple[float, str]:
        measured, counted, speed = self.rates.measured, self.rates.counted, self.rates.speed
        name = kind.partition(" ")[0]
        of_networks = name not in ("draw_scene", "cut", "caption")
        own = _entry(measured.work, kind)
        # the generator's rates are those of the embedded base model, unless the base model is another
        if own is not None and (not of_networks or name in ("fit", "judge") or self._embedded):
            if of_networks and on_gpu:
                raise Unknown("the embedded networks were not measured on a GPU")
            return own * self._relative(name, tile), "scaled"
        if (work := _entry(counted.work, kind)) is None:
            raise Unknown(f"no rate for {kind}")
        area = 1.0 if name in ("prompt", "features") else (tile / counted.tile) ** 2
        per_second = speed.share * speed.gpus[self.gpu] if on_gpu else speed.cpu
        return work * area / per_second, "guess"

    @property
    def _embedded(self) -> bool:
        return self.settings.base_model.kind == "embedded"

    def _relative(self, name: str, tile: int) -> float:
        """The size of a kind of work against the one that was measured."""
        size = self.rates.measured.size
        area = (tile / size["tile"]) ** 2
        if name == "cut":
            return (tile / 512) ** 2
        if name in ("train", "step"):
            base = self.settings.base_model
            tokens = (tile / 2 ** (len(base.vae.channels) - 1) / base.transformer.patch_size) ** 2
            width = base.transformer.heads * base.transformer.head_dim
            return base.transformer.layers / size["layers"] * (width / size["width"]) ** 2 * tokens / size["tokens"]
        if name in ("autoencoder", "gradient", "look", "encode", "decode"):
            return area * (self.settings.base_model.vae.channels[-1] / size["channels"]) ** 2
        return area if name in ("fit", "judge") else 1.0


def _entry(table: Mapping[str, Any], kind: str) -> float | None:
    """The rate of a kind such as ``step triattention``: of both words, or of the first where it is the same for all."""
    first, _, second = kind.partition(" ")
    found = table.get(first)
    return found.get(second) if isinstance(found, dict) else found


#: Wildcards that say what kind of work a job does, beside its rule; the others say on what, and how often.
KINDS = ("control", "sampler", "segmentor", "preset", "filter")


def _kind(job: Job) -> tuple:
    return tuple(job.names.get(name) for name in KINDS)


def _seconds_of(benchmark: Path) -> float | None:
    """Seconds that the workflow noted for a job; None where there are none, or none that can be read."""
    try:
        seconds = pd.to_numeric(pd.read_csv(benchmark, sep="\t")["s"], errors="coerce").mean()
    except (OSError, KeyError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError):
        return None
    return None if math.isnan(seconds) else float(seconds)


# --------------------------------------------------------------------------------------------------------------- a plan


@dataclass
class Stage:
    """The unfinished jobs of one rule."""

    rule: str
    estimates: list[Estimate] = field(default_factory=list)

    @property
    def basis(self) -> str:
        """What its estimates rest on, the best first."""
        return ", ".join(basis for basis in BASES if any(one.basis == basis for one in self.estimates))

    def seconds(self, on_gpu: bool) -> float | None:
        """Seconds of its jobs on GPUs, or on processors, together and times the GPUs they hold, as far as they are known; None where it
        has no such jobs or knows nothing of them."""
        known = [one.seconds * max(1, one.gpus) for one in self.estimates if bool(one.gpus) == on_gpu and one.seconds is not None]
        return sum(known) if known else None

    @property
    def disk(self) -> float | None:
        """Bytes, as far as they are known; None where nothing is."""
        known = [one.disk for one in self.estimates if one.disk is not None]
        return sum(known) if known else None

    def wall(self, cores: int, gpus: int) -> float:
        """Seconds until it is done when nothing else runs, the longest jobs first; what is not known takes none."""
        held = max(1, *(one.gpus for one in self.estimates))
        on_gpu = any(one.gpus for one in self.estimates)
        ends = [0.0] * min(len(self.estimates), max(1, gpus // held if on_gpu else cores))
        for one in sorted(self.estimates, key=lambda one: -(one.seconds or 0)):
            heapq.heapreplace(ends, ends[0] + (one.seconds or 0))
        return max(ends)


@dataclass
class Plan:
    """What is still to be done; ``cores`` and ``gpus`` at once."""

    stages: list[Stage]
    estimator: Estimator
    cores: int
    gpus: int
    splits: list[tuple[str, str]]
    controls: list[str]

    @property
    def jobs(self) -> int:
        return sum(len(stage.estimates) for stage in self.stages)

    def total(self, on_gpu: bool) -> float:
        """Seconds of all that is known."""
        return sum(stage.seconds(on_gpu) or 0.0 for stage in self.stages)

    @property
    def wall(self) -> tuple[float, float]:
        """Seconds by the clock of what is known: when nothing ever waits, and when each stage waits for the one before it."""
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
            return f"Nothing is left to be done: {results} holds all of it.\n"
        on_gpu = any(one.gpus for stage in self.stages for one in stage.estimates)
        lines = [f"Still to be done: scale {settings.scale}, on {settings.device}, results in {results}", ""]
        heads = ["jobs", *["GPU-hours"] * on_gpu, "CPU-hours", "disk", "rests on"]
        lines.append(_line("stage", heads))
        for stage in self.stages:
            times = [_hours_of(stage, kind) for kind in ([True] if on_gpu else []) + [False]]
            lines.append(_line(stage.rule, [str(len(stage.estimates)), *times, _size(stage.disk), stage.basis]))
        sums = [_hours(self.total(kind)) for kind in ([True] if on_gpu else []) + [False]]
        open_ = [stage.rule for stage in self.stages if "not known" in stage.basis]
        lines.append(_line("total", [str(self.jobs), *sums, _size(self.disk), f"without {len(open_)} not known" if open_ else ""]))
        notes = [*self._clock(on_gpu, open_), *self._tiles(), *self._room(), "", *self._bases(on_gpu)]
        wrapped = [part for note in notes for part in textwrap.wrap(note, WIDTH, subsequent_indent="  ") or [""]]
        return "\n".join([*lines, "", *wrapped]) + "\n"

    def _clock(self, on_gpu: bool, unknown: list[str]) -> list[str]:
        least, most = self.wall
        if not least:
            return ["By the clock: not known."]
        machine = f"{_several(self.gpus, 'GPU')} and {_several(self.cores, 'core')}" if on_gpu else _several(self.cores, "core")
        span = duration(most) if least > 0.95 * most else f"between {duration(least)} and {duration(most)}"
        more = f", and what is not known: {', '.join(unknown)}" if unknown else ""
        return [f"By the clock, with {machine}: {span}{more}."]

    def _tiles(self) -> list[str]:
        lines = []
        for name in dict.fromkeys(dataset for dataset, _ in self.splits):
            counts = {split: self.estimator.workload.count(name, split) for dataset, split in self.splits if dataset == name}
            said = [f"{split} {'?' if one.tiles is None else format(one.tiles, ',')} ({one.how})" for split, one in counts.items()]
            lines.append(f"Tiles of {name}: {', '.join(said)}.")
        return lines

    def _room(self) -> list[str]:
        workload = self.estimator.workload
        while_training = max((workload.checkpoints(control) for control in self.controls), default=0.0)
        free = shutil.disk_usage(existing_parent(workload.results)).free
        lines = [f"Disk counts images as if they were not compressed; {_size(free)} are free there."]
        if while_training:
            lines.append(f"Each training of a generator needs up to {_size(while_training)} more for checkpoints, until it ends.")
        if self.disk + while_training > free:
            lines.append("That is less than may be needed: free some space, or set `results` to another disk.")
        if workload.settings.base_model.kind == "hub" and any(stage.rule == "fetch_base_model" for stage in self.stages):
            sizes = workload.weights
            size = 2e9 * (sizes["transformer"] + sizes["text_encoders"] + sizes["autoencoder"])
            lines.append(f"The base model takes about {_size(size)} in {workload.settings.base_model.path} (two bytes a weight).")
        return lines

    def _bases(self, on_gpu: bool) -> list[str]:
        rates, used = self.estimator.rates, {one.basis for stage in self.stages for one in stage.estimates}
        gpu, speed = self.estimator.gpu, rates.speed
        here = "this machine's" if self.estimator.gpu_is_here else "this machine shows none that is known"
        at = f"{speed.cpu:g} TFLOP/s of a core"
        if on_gpu:
            reached = f"{speed.share * speed.gpus[gpu]:.0f} TFLOP/s"
            at = f"{100 * speed.share:.0f} % of the peak of a GPU {gpu} ({here}), {reached}: an assumption"
        said = {
            "measured": "by jobs of the same kind that this run has finished, in proportion to their work.",
            "scaled": f"by times measured on {rates.measured.where}, or by other jobs of the stage here, scaled to the configured sizes.",
            "guess": f"work counted {rates.counted.where}, at {at}; reading, writing and what else the processor does are not in it.",
            "not known": "downloads, and what was never measured.",
        }
        return [f"{basis}: {said[basis]}" for basis in BASES if basis in used]


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
    """The plan of what is left.

    Args:
        jobs: all jobs of the run, finished or not (:func:`read_jobs`).
        gpu_rules: names of the rules whose jobs hold GPUs.
        cores, gpus: how many may be used at once.
        gpu: the GPUs' name; None or one that ``rates`` does not have: the first one there.
    """
    splits = [(job.names["dataset"], job.names["split"]) for job in jobs if job.rule == "tile_scenes"]
    uncut = frozenset((job.names["dataset"], job.names["split"]) for job in jobs if job.rule == "tile_scenes" and job.pending)
    sizes = rates.counted.weights
    workload = Workload(settings, datasets, sizes, rates.measured.bytes, Path(settings.results), uncut)
    estimator = Estimator(workload, rates, gpu_rules, gpu)
    estimator.learn(jobs)
    stages: dict[str, Stage] = {}
    for job in jobs:
        if job.pending:
            stages.setdefault(job.rule, Stage(job.rule)).estimates.append(estimator.of(job))
    controls = [job.names["control"] for job in jobs if job.rule == "train_generator" and job.pending]
    return Plan(list(stages.values()), estimator, max(1, cores), max(1, gpus), splits, controls)


def _several(count: int, name: str) -> str:
    """``1 GPU``, ``8 GPUs``; engines say no limit by a very large number."""
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


def _hours_of(stage: Stage, on_gpu: bool) -> str:
    """Hours; ``?`` and ``3.1+`` where all or some of the jobs are not known, ``-`` where there are none."""
    some = [one.seconds is None for one in stage.estimates if bool(one.gpus) == on_gpu]
    if not some:
        return "-"
    seconds = stage.seconds(on_gpu)
    return "?" if seconds is None else _hours(seconds) + "+" * any(some)


def _line(stage: str, cells: list[str]) -> str:
    """A row: the stage's name, cells of numbers to the right, the last one as it is."""
    return f"{stage:<23}{cells[0]:>6}" + "".join(f"{cell:>11}" for cell in cells[1:-1]) + f"  {cells[-1]}".rstrip()
