"""Settings that are right one by one and do not go together, or not with this machine; what settings alone show is refused by them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from crfm_core.planning.preflight.findings import Findings, Work
from crfm_core.settings import EmbeddedBase, HubBase

#: Where compilers of torch.compile's kernels are looked for, by device: the variable that names one, and the usual ones.
COMPILERS = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang", "cc"))}


def check_grid(work: Work, found: Findings) -> None:
    """Tiles that the generator's tokens do not cover."""
    grain = _grain(work)
    for name in work.named("dataset", "build_base_model", "encode_latents", "train_generator", "synthesise_shard") if grain else ():
        if (size := work.datasets[name].tile.size) % grain:
            found.problems.append(
                f"dataset {name}: tile.size: {size} is not divisible by {grain}, the side of one of the generator's tokens; set "
                f"{size // grain * grain or grain} or {(size // grain + 1) * grain}"
            )


def _grain(work: Work) -> int | None:
    """Pixels that a token of the transformer covers along one side; None where the base model does not say it."""
    base = work.settings.base_model
    if isinstance(base, EmbeddedBase):
        return 2 ** (len(base.vae.channels) - 1) * base.transformer.patch_size
    try:
        levels = json.loads(Path(base.path, "vae", "config.json").read_text(encoding="utf-8"))["block_out_channels"]
        patch = json.loads(Path(base.path, "transformer", "config.json").read_text(encoding="utf-8"))["patch_size"]
        return 2 ** (len(levels) - 1) * patch
    except (OSError, ValueError, KeyError, TypeError):
        return 16 if isinstance(base, HubBase) and base.repo == HubBase(kind="hub").repo else None


def check_captions(work: Work, found: Findings) -> None:
    """Prompts that should come with a dataset which has none."""
    for name in work.named("dataset", "caption_tiles") if work.settings.captions.kind == "given" else ():
        source = work.datasets[name].source
        if not source.HAS_PROMPTS:
            found.problems.append(
                f"captions.kind: given, and dataset {name} (source {source.kind}) comes without prompts; set template or vlm, or give the "
                "dataset as a source of kind released"
            )


def check_compiling(work: Work, found: Findings) -> None:
    """Compilers, and what has no effect on a processor."""
    settings = work.settings
    keys = [f"controls.{name}.compile" for name in work.named("control", "train_generator") if settings.controls[name].compile]
    samplers = [name for name in work.named("sampler", "synthesise_shard", "synthesise_scene") if settings.samplers[name].compile]
    keys += [f"samplers.{name}.compile" for name in samplers]
    variable, names = COMPILERS[settings.device]
    compiler = [os.environ[variable].split()[0]] if os.environ.get(variable, "").strip() else names
    if keys and work.here and not any(map(shutil.which, compiler)):
        found.problems.append(
            f"{keys[0]}: torch.compile needs a compiler, and there is no {' or '.join(compiler)} on the PATH; install one, set {variable}, "
            "or leave compile out"
        )
    if settings.device == "cpu":
        for name in samplers:
            if settings.samplers[name].compile == "reduce-overhead":
                found.warnings.append(f"samplers.{name}.compile: reduce-overhead means CUDA graphs, which device: cpu has not")


def check_idle(work: Work, found: Findings) -> None:
    """Settings that nothing heeds."""
    settings = work.settings
    for name in work.named("control", "train_generator"):
        control = settings.controls[name]
        if control.parallel == "fsdp" and control.processes == 1:
            found.warnings.append(f"controls.{name}.parallel: fsdp shares out nothing with processes: 1")
    for name in work.named("segmentor", "train_segmentor"):
        on = {job.names["dataset"] for job in work.of("train_segmentor") if job.names["segmentor"] == name}
        if settings.segmentors[name].validate_every and not any(work.datasets[one].val for one in on):
            found.warnings.append(f"segmentors.{name}.validate_every: no dataset names a split val, so nothing is looked at")
