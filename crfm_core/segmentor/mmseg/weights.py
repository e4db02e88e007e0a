"""Checkpoints of mmengine and mmsegmentation: read without running code, loaded whole or as a pretrained backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crfm_core import WeightsError
from crfm_core.checkpoints import read_torch_file
from crfm_core.segmentor.mmseg.libraries import lean_imports


def read_mmseg_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint onto the CPU without running code from it: tensors, plain values and mmengine's log histories only.

    Raises WeightsError when the file is missing, cut short, no checkpoint, or holds anything else.
    """
    with torch.serialization.safe_globals(_mmengine_types()):
        checkpoint = read_torch_file(
            path, str(path), "make it (again) by naming it as a target of the workflow, or fetch it from whom you trust"
        )
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__} where a checkpoint's dictionary is expected")
    return checkpoint


def _mmengine_types() -> list:
    """Types that mmengine's training checkpoints hold besides tensors and plain values: log histories of numpy numbers."""
    with lean_imports():
        from mmengine.logging import HistoryBuffer

    makers = [np._core.multiarray._reconstruct, np._core.multiarray.scalar]  # type: ignore[attr-defined]  # what pickles name is private
    before_numpy_2 = [(maker, f"numpy.core.multiarray.{maker.__name__}") for maker in makers]
    numbers = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]

    def method(owner: type, name: str):
        # Histories name their own statistics through getattr, which would lead anywhere.
        if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
            raise TypeError(f"GLOBAL getattr({name})")
        return getattr(HistoryBuffer, name)

    return [HistoryBuffer, (method, "builtins.getattr"), *makers, *before_numpy_2, np.ndarray, np.dtype, *numbers]


def load_weights(network: nn.Module, weights: dict, source: Path | str) -> None:
    """Load a whole state dict. Raises WeightsError, naming ``source``, when anything is missing, left over or of another shape."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise WeightsError(f"{source}: the weights do not fit its own architecture ({reason}); train or fetch it again") from None


def load_backbone(network: Any, path: Path | str) -> None:
    """Load pretrained backbone weights: a state dict of the backbone or of a whole segmentor, in mmsegmentation's names.

    Raises WeightsError when fewer than nine in ten of the backbone's tensors are found, or shapes differ.
    """
    checkpoint = read_mmseg_checkpoint(path)
    weights = checkpoint.get("state_dict", checkpoint)
    prefix = "backbone."
    if any(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    wanted = network.backbone.state_dict()
    found = {name: tensor for name, tensor in weights.items() if name in wanted}
    wrong = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    if wrong or len(found) < 0.9 * len(wanted):
        problem = f"shapes differ, e.g. of {wrong[0]}" if wrong else f"only {len(found)} of its {len(wanted)} tensors are there"
        raise WeightsError(
            f"{path}: does not fit the backbone {type(network.backbone).__name__}: {problem}; give weights of this backbone in "
            "mmsegmentation's names"
        )
    network.backbone.load_state_dict(found, strict=False)
