"""What the machine has: disk, folders that can be written, GPUs and their memory, software."""

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
from crfm_core.planning.preflight.findings import Findings, Work
from crfm_core.planning.preflight.memory import training_size
from crfm_core.planning.rates import Unknown
from crfm_core.planning.workload import Workload
from crfm_core.settings import EmbeddedBase, HubBase

GIB = 2**30


def check_folders(work: Work, found: Findings) -> None:
    """That everything which is written has a place."""
    places = {work.results: "`results`"} | {one.folder: one.key for one in found.fetches}
    for folder, key in places.items():
        with found.listing():
            require_writable(folder, f"set {key} to a folder that you may write to")
    with found.listing():
        try:
            place = tempfile.gettempdir()
        except FileNotFoundError as error:
            raise ResourceError(f"{error.strerror}; set TMPDIR to a folder that you may write to") from None
        require_writable(place, "set TMPDIR to a folder that you may write to")


def check_disk(work: Work, found: Findings) -> None:
    """``disk_gb``, and what the jobs leave by estimate; what goes to one file system is added up."""
    with found.listing():
        require_disk(work.results, work.settings.disk_gb * 1e9)
    needs: dict[int, list[tuple[str, str, float]]] = defaultdict(list)
    for what, folder, key, size in [("what the jobs leave", work.results, "`results`", _left(work))] + [
        (one.what, one.folder, one.key, one.size - _size_of(one.folder)) for one in found.fetches if one.size
    ]:
        needs[existing_parent(folder).stat().st_dev].append((f"{what} in {folder}", key, max(0.0, size)))
    for parts in needs.values():
        total, folder = sum(size for *_, size in parts), parts[0][0].rpartition(" in ")[2]
        free = shutil.disk_usage(existing_parent(folder)).free
        said = ", ".join(f"{what} {_gb(size)}" for what, _, size in parts)
        found.facts.append(f"disk: about {_gb(total)} needed ({said}), {_gb(free)} free")
        if total > free:
            found.problems.append(
                f"{folder}: about {_gb(total)} needed by estimate ({said}), {_gb(free)} free; free some space, set "
                f"{' or '.join(key for _, key, _ in parts)} to another disk, or build fewer tables or one stage's files at a time"
            )


def _left(work: Work) -> float:
    """Bytes that the jobs leave in the results, as far as they are known, and the checkpoints of the largest training meanwhile. What
    stopped jobs of theirs have made already is not needed again."""
    uncut = frozenset((job.names["dataset"], job.names["split"]) for job in work.of("tile_scenes"))
    workload = Workload(work.settings, work.datasets, work.rates, uncut, base_scale(work) or 0.0)
    total = 0.0
    shards: dict[Path, float] = defaultdict(float)
    for job in work.jobs:
        try:
            size = workload.size_of(job).disk
        except Unknown:
            continue
        if job.rule == "synthesise_shard":
            names = [job.names[name] for name in Layout.synthetic_images.wildcards]
            shards[Path(Layout(work.results).synthetic_images(*names))] += size
        else:
            total += size
    total += sum(max(0.0, size - _size_of(folder)) for folder, size in shards.items())
    trainings = [
        workload.checkpoint_bytes(job.names["control"])
        - _size_of(Path(Layout(work.results).unfinished_generator(job.names["dataset"], job.names["control"])))
        for job in work.of("train_generator")
    ]
    return total + max(0.0, *trainings, 0.0)


def _size_of(folder: Path | os.DirEntry) -> float:
    """Bytes of the files in a folder and those below it; 0 where there is none."""
    total = 0.0
    with contextlib.suppress(OSError):  # not there, or a running job's and gone by now
        for entry in os.scandir(folder):
            total += _size_of(entry) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
    return total


def check_gpus(work: Work, found: Findings) -> None:
    """How many GPUs the largest job takes, and the memory that training does. On a cluster neither is known here."""
    largest = max(work.jobs, key=work.gpus, default=None)
    count = work.gpus(largest) if largest else 0
    if not count:
        found.facts.append("GPUs: none needed")
        return
    if work.gpu_limit is not None and count > work.gpu_limit:
        found.problems.append(
            f"{largest.rule} {' '.join(largest.names.values())}: takes {count} GPUs, and a job may be given {work.gpu_limit}; run with "
            f"`--resources gpu={count}` or more, or set fewer `processes`"
        )
    if not work.here:
        found.facts.append(f"GPUs: {count} for the largest job, on the cluster's nodes")
        return
    with found.listing():
        require_gpus(count)
    with found.listing():
        require_leases()
    memory = gpu_memory()
    said = f", {min(memory) / GIB:.1f} GiB each or more" if memory else ""
    found.facts.append(f"GPUs: {count} for the largest job, {len(visible_gpus())} here{said}")
    for job in work.of("train_generator") if memory else ():
        _check_memory(work, found, job.names["control"], work.datasets[job.names["dataset"]].tile.size, min(memory))


def _check_memory(work: Work, found: Findings, name: str, tile: int, available: int) -> None:
    """The same bounds as :func:`crfm_core.generator.memory.require_memory`, which a training itself keeps to."""
    scale, control = base_scale(work), work.settings.controls[name]
    if scale is None or not control.steps:
        return
    size = training_size(control, tile, work.rates.training, work.rates.tile, scale)
    if size is None:
        found.facts.append(f"GPU memory of training {name}: not known, configs/rates.yaml has no numbers of scheme {control.scheme}")
    elif size.constant > available or size.constant + size.activations > 1.1 * available:
        found.problems.append(
            f"controls.{name}: training needs about {(size.constant + size.activations) / GIB:.1f} GiB of GPU memory, the smallest GPU "
            f"here has {available / GIB:.1f}; {memory_advice(control, f'controls.{name}.')}"
        )


def base_scale(work: Work) -> float | None:
    """How many times as many weights as SD3.5-medium's the base model's transformer has; None where that is not known."""
    base = work.settings.base_model
    if isinstance(base, EmbeddedBase):
        return None
    if isinstance(base, HubBase) and not is_fetched(base.repo, base.revision, base.path):
        return 1.0 if base.repo == HubBase(kind="hub").repo else None
    try:
        return transformer_weights(base.path) / (1e9 * work.rates.weights["transformer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a folder that is not whole, which is on the list already
        return None


def check_software(work: Work, found: Findings) -> None:
    """Installed versions against the pins of the environments that the jobs' rules name."""
    pins: dict[str, str] = {}
    for file in dict.fromkeys(work.software[job.rule] for job in work.jobs if job.rule in work.software):
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
        found.warnings.append(f"other versions than were tested: {', '.join(others)}; requirements.txt has the exact ones")
    if pins:
        found.facts.append(f"software: {len(pins)} packages, {len(pins) - len(others) - len(missing)} of the pinned version")
        if any(work.gpus(job) for job in work.jobs) and "torch" in pins and _is_cpu_build():
            found.problems.append(
                f"device: cuda needs torch with CUDA, and torch {version('torch')} is a build for processors alone; set `device: cpu`, or "
                "install a CUDA build of the same version (pytorch.org says how)"
            )


def _is_cpu_build() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 9.95e9 else f"{size / 1e9:.1f} GB"
