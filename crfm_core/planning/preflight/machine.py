"""The machine: disk, writable folders, GPUs and their memory, software."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from crfm_core import ResourceError
from crfm_core.checkpoints import transformer_weights
from crfm_core.devices import gpu_memory, require_gpus, require_leases, visible_gpus
from crfm_core.files import existing_parent, require_disk, require_writable
from crfm_core.generator.advice import memory_advice
from crfm_core.hub import is_fetched
from crfm_core.layout import Layout
from crfm_core.planning.preflight.checks import CheckResults, PendingRun
from crfm_core.planning.preflight.memory import training_size
from crfm_core.planning.workload import Workload
from crfm_core.settings import EmbeddedBase, HubBase

_GIB = 2**30


def check_folders(run: PendingRun, found: CheckResults) -> None:
    """That all folders which are written to can be."""
    places = {run.results: "`results`"} | {one.folder: one.key for one in found.downloads}
    with found.collect():
        try:
            places[Path(tempfile.gettempdir())] = "TMPDIR"
        except FileNotFoundError as error:
            raise ResourceError(f"{error.strerror}; set TMPDIR to a folder that you may write to") from None
    for folder, key in places.items():
        with found.collect():
            require_writable(folder, f"set {key} to a folder that you may write to")


def check_disk(run: PendingRun, found: CheckResults) -> None:
    """``disk_gb``, and the estimated size of what the jobs leave, added up for each file system."""
    with found.collect():
        require_disk(run.results, run.settings.disk_gb * 1e9)
    needs: dict[int, list[tuple[str, str, float]]] = defaultdict(list)
    for what, folder, key, size in [("results", run.results, "`results`", _bytes_left(run))] + [
        (one.what, one.folder, one.key, one.size - _size_of(one.folder)) for one in found.downloads if one.size
    ]:
        needs[existing_parent(folder).stat().st_dev].append((f"{what} in {folder}", key, max(0.0, size)))
    for parts in needs.values():
        total, place = sum(size for *_, size in parts), parts[0][0].rpartition(" in ")[2]
        free = shutil.disk_usage(existing_parent(place)).free
        details = ", ".join(f"{what} {_gb(size)}" for what, _, size in parts)
        found.facts.append(f"disk: an estimated {_gb(total)} needed ({details}), {_gb(free)} free")
        if total > free:
            found.problems.append(
                f"{place}: an estimated {_gb(total)} needed ({details}), {_gb(free)} free; free some space, set "
                f"{' or '.join(key for _, key, _ in parts)} to another disk, or build fewer tables or one stage's files at a time"
            )


def _bytes_left(run: PendingRun) -> float:
    """Bytes that the jobs will add to the results, as far as they are known, with the checkpoints of the largest training; files that
    stopped jobs have left count as there."""
    uncut = frozenset((job.names["dataset"], job.names["split"]) for job in run.of("tile_scenes"))
    workload = Workload(run.settings, run.datasets, run.rates, uncut, base_scale(run) or 0.0)
    total = 0.0
    shards: dict[Path, float] = defaultdict(float)
    for job in run.jobs:
        size = workload.bytes_of(job) or 0.0
        if job.rule == "synthesise_shard":
            names = [job.names[name] for name in Layout.synthetic_images.wildcards]
            shards[Path(run.layout.synthetic_images(*names))] += size
        else:
            total += size
    total += sum(max(0.0, size - _size_of(folder)) for folder, size in shards.items())
    trainings = [
        workload.checkpoint_bytes(job.names["control"])
        - _size_of(Path(run.layout.unfinished_generator(job.names["dataset"], job.names["control"])))
        for job in run.of("train_generator")
    ]
    return total + max(0.0, *trainings, 0.0)


def _size_of(folder: Path | str) -> float:
    """Bytes of the files in a folder and those below it; 0 where there is none."""
    total = 0.0
    with contextlib.suppress(OSError):  # not there, or a running job's and gone by now
        for entry in os.scandir(os.fspath(folder)):
            total += _size_of(entry.path) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
    return total


def check_gpus(run: PendingRun, found: CheckResults) -> None:
    """The GPUs of the largest job, and their memory for training. On a cluster neither can be checked here."""
    largest = max(run.jobs, key=run.gpus, default=None)
    if largest is None or not (count := run.gpus(largest)):
        found.facts.append("GPUs: none needed")
        return
    if run.gpu_limit is not None and count > run.gpu_limit:
        found.problems.append(
            f"{largest.rule} {' '.join(largest.names.values())}: takes {count} GPUs, and a job may have {run.gpu_limit}; run with "
            f"`--resources gpu={count}` or more, or set fewer `processes`"
        )
    if not run.local:
        found.facts.append(f"GPUs: {count} for the largest job, on the cluster's nodes")
        return
    with found.collect():
        require_gpus(count)
    with found.collect():
        require_leases()
    memory = gpu_memory()
    details = f", {min(memory) / _GIB:.1f} GiB each or more" if memory else ""
    found.facts.append(f"GPUs: {count} for the largest job, {len(visible_gpus())} here{details}")
    for job in run.of("train_generator") if memory else ():
        _check_memory(run, found, job.names["control"], run.datasets[job.names["dataset"]].tile.size, min(memory))


def _check_memory(run: PendingRun, found: CheckResults, name: str, tile: int, available: int) -> None:
    """The same bounds as :func:`crfm_core.generator.memory.require_memory`, which training itself applies."""
    scale, control = base_scale(run), run.settings.controls[name]
    if scale is None or not control.steps:
        return
    size = training_size(control, tile, run.rates, scale)
    if size is None:
        found.facts.append(f"GPU memory of training {name}: not known, configs/rates.yaml has no numbers of scheme {control.scheme}")
    elif size.constant > available or size.constant + size.activations > 1.1 * available:
        found.problems.append(
            f"controls.{name}: training needs about {(size.constant + size.activations) / _GIB:.1f} GiB of GPU memory, the smallest GPU "
            f"here has {available / _GIB:.1f}; {memory_advice(control, f'controls.{name}.')}"
        )


def base_scale(run: PendingRun) -> float | None:
    """How many times as many weights as SD3.5-medium's the base model's transformer has; None where that is not known."""
    base = run.settings.base_model
    if isinstance(base, EmbeddedBase):
        return None
    if isinstance(base, HubBase) and not is_fetched(base.repo, base.revision, base.path):
        return 1.0 if base.repo == HubBase(kind="hub").repo else None
    try:
        return transformer_weights(base.path) / (1e9 * run.rates.weights.transformer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an incomplete folder, already among the problems
        return None


def check_software(run: PendingRun, found: CheckResults) -> None:
    """Installed versions against the pins of the environments that the jobs' rules name."""
    pins: dict[str, str] = {}
    for file in dict.fromkeys(run.software[job.rule] for job in run.jobs if job.rule in run.software):
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]:
            if isinstance(entry, dict):
                pins |= dict(pin.split("==") for pin in entry["pip"])
    others, missing = [], []
    for name, pinned in pins.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            missing.append(f"{name}=={pinned}")
            continue
        if installed.split("+")[0] != pinned:  # torch 2.13.0+cu126 is a build of 2.13.0
            others.append(f"{name} {installed} instead of {pinned}")
    if missing:
        found.problems.append(f"packages: {', '.join(missing)} not installed; run `pip install {' '.join(missing)}`")
    if others:
        found.warnings.append(f"untested versions: {', '.join(others)}; requirements.txt has the exact ones")
    if pins:
        found.facts.append(f"software: {len(pins)} packages, {len(pins) - len(others) - len(missing)} of the pinned version")
        if any(run.gpus(job) for job in run.jobs) and "torch" in pins and _is_cpu_build():
            found.problems.append(
                f"device: cuda needs torch with CUDA, and torch {version('torch')} is a CPU build; set `device: cpu`, or "
                "install a CUDA build of the same version (pytorch.org says how)"
            )


def _is_cpu_build() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 9.95e9 else f"{size / 1e9:.1f} GB"
