"""mmsegmentation without its compiled operators: the import, the model configurations, and weights read without running code."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfm_core import ConfigError, WeightsError

if TYPE_CHECKING:
    from mmengine.config import ConfigDict
    from mmseg.models import BaseSegmentor
    from torch import nn

#: Normalisation of every segmentor: ImageNet, for RGB in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

#: Images are padded to a multiple of this before a network sees them (its deepest feature map is 32 times smaller).
DIVISOR = 32


class _NoOperators(types.ModuleType):
    """Stands in for mmcv's compiled module while mmsegmentation is imported: any operator exists, none can be called."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            raise ConfigError(f"the operator {name} needs the full mmcv (mmcv-lite is installed); choose another architecture")

        return refuse


@functools.cache
def load_mmseg() -> None:
    """Import mmsegmentation and register its models; a second call does nothing.

    mmcv-lite has no compiled operators, yet mmsegmentation imports them. A stand-in is there while it does and gone
    afterwards, because mmengine looks the module up again when a Runner is built. With the full mmcv nothing is stood in.
    """
    stand_in = "mmcv._ext"
    missing = importlib.util.find_spec(stand_in) is None
    if missing:
        sys.modules[stand_in] = _NoOperators(stand_in)
    try:
        import mmseg.models  # noqa: F401
    finally:
        if missing:
            del sys.modules[stand_in]


# ------------------------------------------------------------------------------------------------------------ networks


def _batch_norm() -> dict:
    # A fresh one for each use: builders modify what they are given. Plain BN, because SyncBN needs several processes.
    return {"type": "BN", "requires_grad": True}


def _head(kind: str, num_classes: int, weight: float = 1.0, **settings: Any) -> dict:
    """A decode head with cross-entropy over all pixels; ignored pixels add nothing, so a tile counts by what is left of it."""
    loss = {"type": "CrossEntropyLoss", "loss_weight": weight}
    return {"type": kind, "num_classes": num_classes, "norm_cfg": _batch_norm(), "align_corners": False, "loss_decode": loss, **settings}


def _segformer(num_classes: int, width: int, layers: list[int], heads: list[int], head_width: int, drop: float) -> dict:
    """SegFormer (Xie et al., NeurIPS 2021): a Mix Vision Transformer and an all-MLP head."""
    backbone = {
        "type": "MixVisionTransformer",
        "in_channels": 3,
        "embed_dims": width,
        "num_stages": 4,
        "num_layers": layers,
        "num_heads": heads,
        "patch_sizes": [7, 3, 3, 3],
        "sr_ratios": [8, 4, 2, 1],
        "out_indices": (0, 1, 2, 3),
        "mlp_ratio": 4,
        "qkv_bias": True,
        "drop_rate": 0.0,
        "attn_drop_rate": 0.0,
        "drop_path_rate": drop,
    }
    widths = [width * n for n in heads]
    head = _head("SegformerHead", num_classes, in_channels=widths, in_index=[0, 1, 2, 3], channels=head_width, dropout_ratio=drop)
    return {"backbone": backbone, "decode_head": head}


def _segformer_tiny(num_classes: int) -> dict:
    return _segformer(num_classes, width=16, layers=[1, 1, 1, 1], heads=[1, 2, 4, 8], head_width=64, drop=0.0)


def _segformer_b2(num_classes: int) -> dict:
    return _segformer(num_classes, width=64, layers=[3, 4, 6, 3], heads=[1, 2, 5, 8], head_width=256, drop=0.1)


def _unet_tiny(num_classes: int) -> dict:
    """A small U-Net (Ronneberger et al., 2015) at half resolution: convolutions only, so it errs differently from a transformer."""
    width, stages = 16, 5
    backbone = {
        "type": "UNet",
        "base_channels": width,
        "num_stages": stages,
        "strides": (2, *(1,) * (stages - 1)),
        "enc_num_convs": (1, *(2,) * (stages - 1)),
        "dec_num_convs": (1,) * (stages - 1),
        "downsamples": (True,) * (stages - 1),
        "enc_dilations": (1,) * stages,
        "dec_dilations": (1,) * (stages - 1),
        "norm_cfg": _batch_norm(),
    }
    head = _head(
        "FCNHead", num_classes, in_channels=width, in_index=stages - 1, channels=width, num_convs=0, concat_input=False, dropout_ratio=0.0
    )
    return {"backbone": backbone, "decode_head": head}


def _pspnet_r50(num_classes: int) -> dict:
    """PSPNet (Zhao et al., CVPR 2017) on ResNet-50-v1c at stride 8 with an auxiliary head, as in TISynth's recipe."""
    backbone = {
        "type": "ResNetV1c",
        "depth": 50,
        "num_stages": 4,
        "out_indices": (0, 1, 2, 3),
        "dilations": (1, 1, 2, 4),
        "strides": (1, 2, 1, 1),
        "norm_cfg": _batch_norm(),
        "norm_eval": False,
        "style": "pytorch",
        "contract_dilation": True,
    }
    head = _head("PSPHead", num_classes, in_channels=2048, in_index=3, channels=512, pool_scales=(1, 2, 3, 6), dropout_ratio=0.1)
    auxiliary = _head(
        "FCNHead", num_classes, 0.4, in_channels=1024, in_index=2, channels=256, num_convs=1, concat_input=False, dropout_ratio=0.1
    )
    return {"backbone": backbone, "decode_head": head, "auxiliary_head": auxiliary}


#: Name of an architecture to its configuration for K classes. A new one is one function and one entry here.
ARCHITECTURES = {
    "segformer_tiny": _segformer_tiny,
    "unet_tiny": _unet_tiny,
    "pspnet_r50": _pspnet_r50,
    "segformer_b2": _segformer_b2,
}


def model_config(architecture: str, num_classes: int) -> ConfigDict:
    """mmengine configuration of an EncoderDecoder that takes RGB in 0...255 and normalises it itself while training.

    Raises ConfigError for an unknown architecture.
    """
    from mmengine.config import ConfigDict

    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture: unknown name {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    preprocessor = {
        "type": "SegDataPreProcessor",
        "mean": [255 * value for value in MEAN],
        "std": [255 * value for value in STD],
        "size_divisor": DIVISOR,
        "pad_val": 0,
        "seg_pad_val": 255,
    }
    network = ARCHITECTURES[architecture](num_classes)
    return ConfigDict(type="EncoderDecoder", data_preprocessor=preprocessor, train_cfg={}, test_cfg={"mode": "whole"}, **network)


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
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; make it by naming it as a target of the workflow, or fetch it")
    try:
        with torch.serialization.safe_globals(_mmengine_types()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds more than weights ({foreign[1]}) and is not loaded" if foreign else f"is damaged ({type(error).__name__})"
        raise WeightsError(f"{path}: {reason}; delete it and make it again, or fetch it from whom you trust") from None
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
