"""Networks of mmsegmentation: built from configurations, and weights that are read without running code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfm_core import ConfigError, WeightsError
from crfm_core.checkpoints import read_torch_file
from crfm_core.segmentor.architectures import ARCHITECTURES
from crfm_core.segmentor.libraries import load_mmseg

if TYPE_CHECKING:
    from mmengine.config import ConfigDict
    from mmseg.models import BaseSegmentor
    from torch import nn

#: Normalisation of every segmentor: ImageNet, for RGB in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

#: Images are padded to a multiple of this before a network sees them (its deepest feature map is 32 times smaller).
DIVISOR = 32


@dataclass(frozen=True)
class Preparation:
    """What happens to RGB images in [0, 1] before a network sees them.

    ``mean`` and ``std`` are in that scale and in the order of the network's channels: one value per channel, or one for all.
    ``bgr`` turns the channels round first. Images are padded below and on the right, with ``pad_value`` after normalisation, to
    at least ``size`` (height, width) and to a multiple of ``divisor``.
    """

    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    bgr: bool = False
    size: tuple[int, int] = (0, 0)
    divisor: int = 1
    pad_value: float = 0.0


# ------------------------------------------------------------------------------------------------------------ networks


def model_config(architecture: str, num_classes: int) -> ConfigDict:
    """mmengine configuration of an EncoderDecoder that takes RGB in 0...255 and normalises it itself while training.

    Raises ConfigError for an unknown architecture.
    """
    from mmengine.config import ConfigDict

    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture: unknown name {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    network = ARCHITECTURES[architecture](num_classes)
    images = preprocessor(Preparation())
    return ConfigDict(type="EncoderDecoder", data_preprocessor=images, train_cfg={}, test_cfg={"mode": "whole"}, **network)


def preprocessor(images: Preparation) -> dict[str, Any]:
    """mmsegmentation's description of how RGB images in 0...255 are prepared, padded to a multiple of :data:`DIVISOR`."""
    return {
        "type": "SegDataPreProcessor",
        "mean": [255 * value for value in images.mean],
        "std": [255 * value for value in images.std],
        "bgr_to_rgb": images.bgr,  # or the other way round
        "size_divisor": DIVISOR,
        "test_cfg": {"size_divisor": DIVISOR},
        "pad_val": 0,
        "seg_pad_val": 255,
    }


def build_model(architecture: str, num_classes: int) -> BaseSegmentor:
    """The network with random weights (from torch's generator), in training mode."""
    return build_network(model_config(architecture, num_classes))


def build_network(config: ConfigDict) -> BaseSegmentor:
    """The network of a configuration that is trusted: building it calls whatever ``type`` names."""
    load_mmseg()
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope("mmseg"):
        warnings.simplefilter("ignore")  # mmsegmentation warns about its own deprecated builders
        return MODELS.build(config)


# ------------------------------------------------------------------------------------------------------------- weights


def _mmengine_types() -> list:
    """Types that mmengine's training checkpoints hold besides tensors and plain values: log histories of numpy numbers."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    makers = [np._core.multiarray._reconstruct, np._core.multiarray.scalar]
    before_numpy_2 = [(maker, f"numpy.core.multiarray.{maker.__name__}") for maker in makers]
    numbers = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]

    def method(owner: type, name: str):
        # Histories name their own statistics through getattr, which would lead anywhere.
        if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
            raise TypeError(f"GLOBAL getattr({name})")
        return getattr(HistoryBuffer, name)

    return [HistoryBuffer, (method, "builtins.getattr"), *makers, *before_numpy_2, np.ndarray, np.dtype, *numbers]


def read_checkpoint(path: Path | str) -> dict:
    """Read a checkpoint onto the CPU without running code from it: tensors, plain values and mmengine's log histories only.

    Raises WeightsError when the file is missing, cut short, no checkpoint, or holds anything else.
    """
    import torch

    load_mmseg()
    with torch.serialization.safe_globals(_mmengine_types()):
        checkpoint = read_torch_file(
            path, str(path), "make it (again) by naming it as a target of the workflow, or fetch it from whom you trust"
        )
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__} where a checkpoint's dictionary is expected")
    return checkpoint


def load_weights(network: nn.Module, weights: dict, source: Path | str) -> None:
    """Load a whole state dict. Raises WeightsError, naming ``source``, when anything is missing, left over or of another shape."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise WeightsError(f"{source}: the weights do not fit its own architecture ({reason}); train or fetch it again") from None


def load_backbone(model: BaseSegmentor, path: Path | str) -> None:
    """Load pretrained backbone weights: a state dict of the backbone or of a whole segmentor, in mmsegmentation's names.

    Raises WeightsError when fewer than nine in ten of the backbone's tensors are found, or shapes differ.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("state_dict", checkpoint)
    prefix = "backbone."
    if any(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    wanted = model.backbone.state_dict()
    found = {name: tensor for name, tensor in weights.items() if name in wanted}
    wrong = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    if wrong or len(found) < 0.9 * len(wanted):
        problem = f"shapes differ, e.g. of {wrong[0]}" if wrong else f"only {len(found)} of its {len(wanted)} tensors are there"
        raise WeightsError(f"{path}: does not fit the backbone {type(model.backbone).__name__}: {problem}")
    model.backbone.load_state_dict(found, strict=False)
