"""What a run cost, from the files in which the workflow engine notes each job's time and memory."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crfm_core import DataError
from crfm_core.experiment import Experiment
from crfm_core.planning.durations import duration, hours
from crfm_core.reporting.findings import Finding, listed
from crfm_core.settings import Settings

NAMED_STAGES = 3  #: stages named in the summary


@dataclass
class StageCost:
    """All jobs of one rule: clock and processor time in seconds, GPU time in seconds times GPUs, largest memory of a job in MB."""

    name: str
    on_gpu: bool = False
    jobs: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    gpu: float = 0.0
    memory: float = 0.0


def read_costs(folder: Path, gpu_stages: Collection[str], settings: Settings) -> list[StageCost]:
    """Stages from the files STAGE.tsv or STAGE-....tsv below a folder, in the order in which they ended.

    ``gpu_stages`` names those whose jobs hold a GPU; a training of several processes holds as many. Raises DataError for a file that
    is no such table.
    """
    stages: dict[str, StageCost] = {}
    for path in sorted(folder.rglob("*.tsv"), key=lambda path: (path.stat().st_mtime, path.name)):
        rule, _, rest = path.stem.partition("-")
        if rule == "make_report":  # that of an earlier page
            continue
        try:
            table = pd.read_csv(path, sep="\t", na_values="-")
        except pd.errors.EmptyDataError:  # of a job that was killed
            continue
        except (pd.errors.ParserError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: no table of time and memory ({error}); delete it") from None
        columns = table.reindex(columns=["s", "cpu_time", "max_rss"])
        seconds, cpu, memory = columns.apply(pd.to_numeric, errors="coerce").mean().fillna(0)  # over repeats; 0: too short to be measured
        stage = stages.setdefault(rule, StageCost(rule.replace("_", " "), rule in gpu_stages))
        stage.jobs += 1
        stage.seconds += seconds
        stage.cpu += cpu
        stage.gpu += seconds * _gpus(rule, rest, settings) if stage.on_gpu else 0.0
        stage.memory = max(stage.memory, memory)
    return list(stages.values())


def recipe_seconds(experiment: Experiment, dataset: str, recipe: str, segmentor: str) -> float:
    """Clock seconds of all jobs that one segmentor of a recipe rests on, one after another: its own training (the mean over seeds), and
    where the recipe needs them the generator, its samples, and the critic that steers, filters or labels. NaN where a time is not noted.
    """
    settings, one = experiment.settings, experiment.settings.recipes[recipe]
    folder = Path(experiment.results.benchmarks()) / dataset
    seconds = _mean_seconds([folder / f"train_segmentor-{recipe}-{segmentor}-{seed}.tsv" for seed in settings.seeds])
    needed: list[Path] = []
    if one.samples:
        control, sampler = one.samples
        needed.append(folder / f"train_generator-{control}.tsv")
        needed += [
            folder / f"synthesise_shard-{control}-{sampler}-{shard}-of-{settings.shards}.tsv" for shard in range(1, settings.shards + 1)
        ]
        needed += [folder / "build_base_model.tsv"] if settings.base_model.IS_BUILT else []
    critic = settings.critic
    if experiment.needs_critic(recipe) and not critic.path:
        needed.append(folder / f"train_segmentor-{critic.recipe}-{critic.segmentor}-{critic.seed}.tsv")
    return seconds + sum(_mean_seconds([path]) for path in needed)


def _mean_seconds(paths: list[Path]) -> float:
    """The mean clock time that files of single jobs note; NaN where one is missing or notes none."""
    try:
        tables = [pd.read_csv(path, sep="\t", na_values="-") for path in paths]
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError):
        return math.nan
    return float(np.mean([pd.to_numeric(table["s"], errors="coerce").mean() if "s" in table else math.nan for table in tables]))


def _gpus(rule: str, rest: str, settings: Settings) -> int:
    """GPUs of a job; ``rest`` is what its file's name says after the rule."""
    if rule == "train_generator" and rest in settings.controls:
        return settings.controls[rest].processes
    if rule == "train_segmentor":
        named = [name for name in settings.segmentors if re.search(rf"-{re.escape(name)}-\d+$", rest)]
        return settings.segmentors[max(named, key=len)].processes if named else 1
    return 1


def cost_finding(stages: list[StageCost]) -> Finding:
    """What all stages took together, and which took most of it."""
    question = "What did it cost?"
    if not stages:
        return Finding(question, "Not known: no stage has left its time", "open")
    totals = {kind: sum(getattr(stage, kind) for stage in stages) for kind in ("gpu", "cpu", "seconds")}
    kind, unit = ("gpu", "GPU-hours") if totals["gpu"] else ("cpu", "CPU-hours") if totals["cpu"] else ("seconds", "hours")
    jobs, clock = sum(stage.jobs for stage in stages), duration(totals["seconds"])
    sentences = [f"{jobs} jobs took {clock} one after another; run in parallel, they took less."]
    if kind == "gpu":
        sentences.append(f"In addition {hours(totals['cpu'])} CPU-hours of processor time.")
    if totals["cpu"]:  # the engine looks at a long job every half minute, and what follows the last look is not noted
        sentences.append("CPU-hours are sampled: they leave out up to the last half minute of every job.")
    most = sorted(stages, key=lambda stage: -getattr(stage, kind))[:NAMED_STAGES]
    shares = [f"{stage.name} ({100 * getattr(stage, kind) / totals[kind]:.0f} %)" for stage in most if getattr(stage, kind) > 0]
    if shares:
        sentences.append(f"Most of it: {listed(shares)}.")
    return Finding(question, f"{hours(totals[kind])} {unit}", "open", sentences)
