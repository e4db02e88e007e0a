"""Settings that conflict with each other, with a dataset or with this machine; conflicts that settings alone show are refused by them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from crfm_core.planning.preflight.checks import CheckResults, PendingRun
from crfm_core.settings import EmbeddedBase, HubBase

#: Compilers for the kernels of torch.compile, by device: the variable that names one, and the usual ones.
COMPILERS = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang", "cc"))}


def check_tile_size(run: PendingRun, found: CheckResults) -> None:
    """That the generator's tokens cover a tile."""
    side = _token_side(run)
    if side is None:
        return
    for name in run.named("dataset", "build_base_model", "encode_latents", "encode_set_latents", "train_generator", "synthesise_shard"):
        if (size := run.datasets[name].tile.size) % side:
            found.problems.append(
                f"dataset {name}: tile.size: {size} is not divisible by {side}, the side of a token of the generator; set "
                f"{size // side * side or side} or {(size // side + 1) * side}"
            )


def _token_side(run: PendingRun) -> int | None:
    """Pixels that a token of the transformer covers along one side; None where the base model does not say it."""
    base = run.settings.base_model
    if isinstance(base, EmbeddedBase):
        return 2 ** (len(base.vae.channels) - 1) * base.transformer.patch_size
    try:
        levels = json.loads(Path(base.path, "vae", "config.json").read_text(encoding="utf-8"))["block_out_channels"]
        patch = json.loads(Path(base.path, "transformer", "config.json").read_text(encoding="utf-8"))["patch_size"]
        return 2 ** (len(levels) - 1) * patch
    except (OSError, ValueError, KeyError, TypeError):
        return 16 if isinstance(base, HubBase) and base.repo == HubBase(kind="hub").repo else None


def check_captions(run: PendingRun, found: CheckResults) -> None:
    """That datasets bring the prompts that the configuration takes from them."""
    for name in run.named("dataset", "caption_tiles") if run.settings.captions.kind == "given" else ():
        source = run.datasets[name].source
        if not source.HAS_PROMPTS:
            found.problems.append(
                f"captions.kind: given, and dataset {name} (source {source.kind}) has no prompts; set template or vlm, or use a source "
                "of kind released"
            )


def check_compilers(run: PendingRun, found: CheckResults) -> None:
    """That torch.compile finds a compiler."""
    settings = run.settings
    keys = [f"controls.{name}.compile" for name in run.named("control", "train_generator") if settings.controls[name].compile]
    samplers = run.named("sampler", "synthesise_shard", "synthesise_scene")
    keys += [f"samplers.{name}.compile" for name in samplers if settings.samplers[name].compile]
    variable, names = COMPILERS[settings.device]
    compiler = [os.environ[variable].split()[0]] if os.environ.get(variable, "").strip() else names
    if keys and run.local and not any(map(shutil.which, compiler)):
        found.problems.append(
            f"{keys[0]}: torch.compile needs a compiler, and there is no {' or '.join(compiler)} on the PATH; install one, set {variable}, "
            "or leave compile out"
        )


def check_unused_settings(run: PendingRun, found: CheckResults) -> None:
    """Settings without effect."""
    settings, unused = run.settings, []
    for name in run.named("control", "train_generator"):
        if settings.controls[name].parallel == "fsdp" and settings.controls[name].processes == 1:
            unused.append(f"controls.{name}.parallel: fsdp (there is one process)")
        datasets = {job.names["dataset"] for job in run.of("train_generator") if job.names["control"] == name}
        default = type(settings.controls[name]).model_fields["validation_share"].default
        if settings.controls[name].validation_share != default and all(
            run.datasets[one].val or not settings.controls[name].validate_every for one in datasets
        ):
            unused.append(f"controls.{name}.validation_share (every dataset names a split val, or validate_every is not set)")
    for name in run.named("segmentor", "train_segmentor"):
        datasets = {job.names["dataset"] for job in run.of("train_segmentor") if job.names["segmentor"] == name}
        if settings.segmentors[name].validate_every and not any(run.datasets[one].val for one in datasets):
            unused.append(f"segmentors.{name}.validate_every (no dataset names a split val)")
    for name in run.named("sampler", "synthesise_shard", "synthesise_scene"):
        if settings.device == "cpu" and settings.samplers[name].compile == "reduce-overhead":
            unused.append(f"samplers.{name}.compile: reduce-overhead (CUDA graphs need a GPU)")
    for name in run.named("dataset", "synthesise_shard"):
        if settings.comparison and not run.datasets[name].held_out_split:
            unused.append(f"comparison (dataset {name} names no split held_out or val; generators are not validated, either)")
    if unused:
        found.warnings.append(f"unused settings: {', '.join(unused)}")
