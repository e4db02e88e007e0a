"""What training a generator takes on a GPU, from the numbers of weights alone: counted once on the meta device, and noted in the rates."""

from __future__ import annotations

from dataclasses import dataclass

from crfm_core.planning.rates import Rates
from crfm_core.settings import Control


@dataclass(frozen=True)
class TrainingSize:
    """Bytes of one process: what is there all the time, and what autograd keeps besides for one micro-step."""

    constant: float
    activations: float


def training_size(control: Control, tile: int, rates: Rates, scale: float = 1.0) -> TrainingSize | None:
    """The size of a training: as :func:`crfm_core.generator.memory.training_memory` counts it, activations at most a tenth above that.

    ``scale`` says how many times as many weights as SD3.5-medium the base model has. None where the rates have no numbers of the control
    scheme.
    """
    if not all(control.scheme in numbers for numbers in rates.training.values()):
        return None
    sizes = {name: 1e9 * numbers[control.scheme] for name, numbers in rates.training.items()}
    low_rank = control.lora.branches if control.lora else []
    updates = len(low_rank) * sizes["low_rank"] * control.lora.rank if control.lora else 0.0
    whole = sum(sizes[branch] for branch in control.trained if branch not in low_rank)
    trained = whole + updates
    frozen = sizes["weights"] + updates - trained
    weights = 4 * trained + (2 if control.precision == "bf16" else 4) * frozen
    state = 8 if control.optimiser == "adamw" else 2 + 8 / 256
    held = weights + (4 + state + (4 if control.ema else 0)) * trained
    copies = 1e-9 * sizes["kept"] * whole if control.precision == "bf16" else 0.0
    kept = sizes["kept_checkpointing"] if control.gradient_checkpointing else copies
    each = sizes["image_kept_checkpointing" if control.gradient_checkpointing else "image_kept"]
    if control.parallel == "fsdp" and control.processes > 1:
        held /= control.processes
        kept = 3 * sizes["block"] * (2 if control.precision == "bf16" else 4)
    activations = kept + each * control.batch_size * (tile / rates.tile) ** 2
    return TrainingSize(scale * (held + 4e9 * rates.weights.table), scale * activations)
