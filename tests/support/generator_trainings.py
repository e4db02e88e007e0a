"""Small trainings of the generator, and the weights that they write."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_world import World, training_job

from crfm_core.generator import training
from crfm_core.generator.training import train_generator
from crfm_core.settings import Control

STEPS = 7


def control(**changes) -> Control:
    settings = {"steps": STEPS, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-3, "warmup": 2, "ema": 0.9, "checkpoint_every": 3}
    return Control(**(settings | {"mask_init": "copy", "seed": 5} | changes))


def train(world: World, folder: Path, settings: Control, **changes) -> dict[str, torch.Tensor]:
    """Train into ``folder``; the weights that were written."""
    train_generator(training_job(world, folder, settings, **changes))
    return weights_of(folder / "out")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def stop_before_batch(monkeypatch, count: int) -> list[range]:
    """Interrupt training when it asks for its ``count``-th batch from now; the list fills with what it asked for."""
    asked, batch = [], training.draw_batch

    def interrupting(numbers, *arguments):
        asked.append(numbers)
        if len(asked) == count:
            raise KeyboardInterrupt
        return batch(numbers, *arguments)

    monkeypatch.setattr(training, "draw_batch", interrupting)
    return asked
