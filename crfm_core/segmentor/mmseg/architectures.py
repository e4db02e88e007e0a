"""The architectures that are known by name, as mmsegmentation's configurations of a network. What they leave out is its default."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def _head(kind: str, num_classes: int, weight: float = 1.0, **settings: Any) -> dict:
    """A decode head with cross-entropy over all pixels; ignored pixels add nothing, so a tile counts by its other pixels."""
    loss = {"type": "CrossEntropyLoss", "loss_weight": weight}
    # plain BN, because SyncBN needs several processes
    return {"type": kind, "num_classes": num_classes, "norm_cfg": {"type": "BN"}, "loss_decode": loss, **settings}


def _segformer(num_classes: int, width: int, layers: list[int], heads: list[int], head_width: int, drop: float) -> dict:
    """SegFormer (Xie et al., NeurIPS 2021): a Mix Vision Transformer and an all-MLP head."""
    backbone = {"type": "MixVisionTransformer", "embed_dims": width, "num_layers": layers, "num_heads": heads, "drop_path_rate": drop}
    widths = [width * n for n in heads]
    head = _head("SegformerHead", num_classes, in_channels=widths, in_index=[0, 1, 2, 3], channels=head_width, dropout_ratio=drop)
    return {"backbone": backbone, "decode_head": head}


def _unet_tiny(num_classes: int) -> dict:
    """A small U-Net (Ronneberger et al., 2015) at half resolution: convolutions only, so it errs differently from a transformer."""
    backbone = {
        "type": "UNet",
        "base_channels": 16,
        "num_stages": 4,  # a fifth costs two thirds more time and gains nothing on small tiles
        "strides": (2, 1, 1, 1),
        "enc_num_convs": (1, 2, 2, 2),
        "dec_num_convs": (1, 1, 1),
        "downsamples": (True, True, True),
        "enc_dilations": (1, 1, 1, 1),
        "dec_dilations": (1, 1, 1),
    }
    layers = {"in_channels": 16, "in_index": 3, "channels": 16, "num_convs": 0, "concat_input": False, "dropout_ratio": 0.0}
    return {"backbone": backbone, "decode_head": _head("FCNHead", num_classes, **layers)}


def _auxiliary(num_classes: int, in_channels: int) -> dict:
    """The head on the third stage, for training only."""
    layers = {"in_channels": in_channels, "in_index": 2, "channels": 256, "num_convs": 1, "concat_input": False}
    return _head("FCNHead", num_classes, 0.4, **layers)


def _on_resnet50(num_classes: int, kind: str, **settings: Any) -> dict:
    """A head on the last stage of ResNet-50-v1c at stride 8, and an auxiliary head."""
    backbone = {"type": "ResNetV1c", "depth": 50, "dilations": (1, 1, 2, 4), "strides": (1, 2, 1, 1), "contract_dilation": True}
    head = _head(kind, num_classes, in_channels=2048, in_index=3, channels=512, **settings)
    return {"backbone": backbone, "decode_head": head, "auxiliary_head": _auxiliary(num_classes, 1024)}


def _pspnet_r50(num_classes: int) -> dict:
    """PSPNet (Zhao et al., CVPR 2017), as in TISynth's recipe."""
    return _on_resnet50(num_classes, "PSPHead")


def _deeplabv3plus_r50(num_classes: int) -> dict:
    """DeepLabv3+ (Chen et al., ECCV 2018)."""
    return _on_resnet50(num_classes, "DepthwiseSeparableASPPHead", c1_in_channels=256, c1_channels=48, dilations=(1, 12, 24, 36))


def _upernet_convnext_t(num_classes: int) -> dict:
    """UPerNet (Xiao et al., ECCV 2018) on ConvNeXt-T with an auxiliary head, as mmsegmentation trains it."""
    widths = [96, 192, 384, 768]
    backbone = {"type": "ConvNeXt", "arch": "tiny", "drop_path_rate": 0.4, "layer_scale_init_value": 1.0}
    head = _head("UPerHead", num_classes, in_channels=widths, in_index=[0, 1, 2, 3], channels=512)
    return {"backbone": backbone, "decode_head": head, "auxiliary_head": _auxiliary(num_classes, widths[2])}


#: Name of an architecture to its configuration for K classes. A new one is one function and one entry here.
ARCHITECTURES: dict[str, Callable[[int], dict]] = {
    "segformer_tiny": partial(_segformer, width=16, layers=[1, 1, 1, 1], heads=[1, 2, 4, 8], head_width=64, drop=0.0),
    "unet_tiny": _unet_tiny,
    "pspnet_r50": _pspnet_r50,
    "segformer_b2": partial(_segformer, width=64, layers=[3, 4, 6, 3], heads=[1, 2, 5, 8], head_width=256, drop=0.1),
    "upernet_convnext_t": _upernet_convnext_t,
    "deeplabv3plus_r50": _deeplabv3plus_r50,
}
