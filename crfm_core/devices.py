"""Where models run: threads, the device asked for, and whether the machine has it."""

from __future__ import annotations

import os
import shutil
import subprocess

from crfm_core import ResourceError


def use_threads(count: int) -> None:
    """Give the numerical libraries ``count`` threads; call it before the first computation."""
    import torch

    torch.set_num_threads(count)


def require_gpus(count: int) -> None:
    """Raise ResourceError unless ``nvidia-smi`` lists ``count`` GPUs; needs no torch, so it is cheap at the start of a run."""
    listed = []
    if shutil.which("nvidia-smi"):
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        listed = [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]
    if len(listed) < count:
        raise ResourceError(
            f"device: cuda needs {count} GPU for one job, this machine shows {len(listed)}; set `device: cpu` or fewer `processes`, "
            "or run where the GPUs are"
        )


def resolve(device: str) -> str:
    """The torch device for the configured one. Raises ResourceError when cuda is asked for and torch cannot use it."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "(unset)")
        raise ResourceError(
            f"device: cuda, but torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES={visible}); set `device: cpu`, "
            "or check the driver with nvidia-smi"
        )
    return device
