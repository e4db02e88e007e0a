"""Parts of networks that mmsegmentation as it is installed lacks: ConvNeXt, and cross-entropy with class weights and ignored pixels.

Importing this module imports mmsegmentation and registers all its parts and these (:func:`crfm_core.segmentor.mmseg.networks.load_mmseg`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crfm_core.segmentor.mmseg.libraries import mmseg_imports

with mmseg_imports():
    from mmcv.cnn.bricks import DropPath
    from mmengine.model import BaseModule
    from mmseg.models.losses import CrossEntropyLoss
    from mmseg.registry import MODELS

#: Blocks and channels of the four stages of each published size (Liu et al., CVPR 2022).
CONVNEXT_SIZES = {
    "tiny": ([3, 3, 9, 3], [96, 192, 384, 768]),
    "small": ([3, 3, 27, 3], [96, 192, 384, 768]),
    "base": ([3, 3, 27, 3], [128, 256, 512, 1024]),
    "large": ([3, 3, 27, 3], [192, 384, 768, 1536]),
    "xlarge": ([3, 3, 27, 3], [256, 512, 1024, 2048]),
}


class _LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [B,C,H,W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(BaseModule):
    def __init__(self, channels: int, drop_path: float, layer_scale: float):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
        y = self.pointwise_conv2(F.gelu(self.pointwise_conv1(y)))
        y = y if self.gamma is None else self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


@MODELS.register_module()
class ConvNeXt(BaseModule):
    """ConvNeXt (Liu et al., CVPR 2022) as a backbone: images [B,3,H,W] -> layer-normed maps, [B,C,H/4,W/4] ... [B,C,H/32,W/32].

    mmsegmentation's own configurations take it from mmpretrain (``mmpretrain.ConvNeXt``). This one has the same arguments as far as they
    use them and the same names of weights, so that checkpoints and pretrained files made there fit.

    Args:
        arch: a name in :data:`CONVNEXT_SIZES`, or {"depths": [...], "channels": [...]}.
        drop_path_rate: share of samples that skip the last block; it grows to it from 0.
        layer_scale_init_value: of each block's scale per channel; 0: none.
        out_indices: stages whose maps are returned.
        gap_before_final_norm: must be False, a mean over the image is no map.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        gap_before_final_norm: bool = False,
        init_cfg: dict | list | None = None,
    ):
        # a scale of 1 in _Block and in the norms is what they are made with
        super().__init__(init_cfg or {"type": "TruncNormal", "layer": ["Conv2d", "Linear"], "std": 0.02, "bias": 0.0})
        if gap_before_final_norm:
            raise ValueError("gap_before_final_norm must be False: a segmentor needs maps")
        if isinstance(arch, str) and arch not in CONVNEXT_SIZES:
            raise ValueError(f"arch: {arch!r} is unknown; allowed: {', '.join(CONVNEXT_SIZES)}, or depths and channels")
        depths, channels = CONVNEXT_SIZES[arch] if isinstance(arch, str) else (arch["depths"], arch["channels"])
        self.out_indices = list(out_indices)
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        drops = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        for stage, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            norm = _LayerNorm2d(width if stage == 0 else channels[stage - 1], eps=1e-6)
            layers = [nn.Conv2d(in_channels, width, 4, 4), norm] if stage == 0 else [norm, nn.Conv2d(channels[stage - 1], width, 2, 2)]
            self.downsample_layers.append(nn.Sequential(*layers))
            self.stages.append(nn.Sequential(*[_Block(width, next(drops), layer_scale_init_value) for _ in range(depth)]))
            if stage in self.out_indices:
                self.add_module(f"norm{stage}", _LayerNorm2d(width, eps=1e-6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = blocks(downsample(x))
            if stage in self.out_indices:
                maps.append(getattr(self, f"norm{stage}")(x))
        return tuple(maps)


@MODELS.register_module()
class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """mmsegmentation's CrossEntropyLoss with class weights that allows ignored pixels; its own reads a weight for them, too.

    The sum of the weighted losses is divided by the number of all pixels, or with ``avg_non_ignore`` by the sum of the weights of
    those that are not ignored.
    """

    def forward(self, cls_score: Tensor, label: Tensor, weight: Tensor | None = None, avg_factor: Any = None, **more) -> Tensor:
        """Logits [B,K,H,W] and labels [B,H,W] -> a number."""
        more = {"ignore_index": 255} | more
        if avg_factor is None and self.reduction == "mean":
            valid = label != more["ignore_index"]
            weights = torch.tensor(self.class_weight, dtype=torch.float32, device=label.device)
            avg_factor = weights[label * valid].mul(valid).sum() if self.avg_non_ignore else label.numel()
        return super().forward(cls_score.float(), label, weight, avg_factor, **more)
