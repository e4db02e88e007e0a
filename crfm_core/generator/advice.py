"""Which settings lower what a training needs in memory; needs no torch."""

from __future__ import annotations

from crfm_core.settings import Control


def memory_advice(control: Control, prefix: str = "") -> str:
    """The settings of a control scheme that need less memory than it has now, each with the part that it lowers."""
    steps = []
    if control.batch_size > 1:
        steps.append(f"batch_size: 1 with accumulate: {control.accumulate * control.batch_size}, the same batch per update (activations)")
    if control.precision == "no":
        steps.append("precision: bf16 (activations, frozen weights)")
    if not control.gradient_checkpointing:
        steps.append("gradient_checkpointing: true (activations)")
    if control.ema:
        steps.append("ema: null (averaged weights)")
    if control.optimiser == "adamw" and control.parallel == "ddp":
        steps.append("optimiser: adamw_8bit (optimiser state, to a quarter)")
    branch = "image" if "image" in control.trained else "mask" if control.initialisation == "copy" else None
    if not control.lora and branch:
        steps.append(f"lora: {{branches: [{branch}]}} (weights, gradients, optimiser state)")
    shared = "weights, gradients and optimiser state are divided by their number"
    if control.parallel == "fsdp":
        steps.append(f"processes: {2 * control.processes} or more ({shared})")
    else:
        eased, least = (" and optimiser: adamw", 4) if control.optimiser == "adamw_8bit" else ("", 2)
        steps.append(f"parallel: fsdp{eased} with processes: {least * control.processes} or more ({shared})")
    return "set " + ", or ".join(f"{prefix}{step}" for step in steps)
