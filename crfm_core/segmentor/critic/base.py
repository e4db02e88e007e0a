"""A critic: a segmentor as a frozen, differentiable function from images to logits; of any torch module, for use from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crfm_core.segmentor.preparation import OWN, Preparation


class Critic(nn.Module):
    """images float [B,3,H,W] in [0,1] -> logits [B,K,H,W]; weights frozen, in eval mode, differentiable in the images.

    Args:
        network: what turns prepared images into logits; taken as it is and frozen in place.
        classes: names of the K classes in the order of their ids.
        preparation: what the network was trained with; the default is that of segmentors trained by this workflow.
        answer: (network, prepared images [B,3,h,w]) -> logits [B,K,h',w'], enlarged bilinearly to [h,w] if they are smaller; the
            default is mmsegmentation's ``encode_decode`` of the whole image.

    The network computes in the type of its weights; logits have the type of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Any,
        classes: Sequence[str],
        preparation: Preparation = OWN,
        answer: Callable[[Any, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.network = network
        self.classes = list(classes)
        self.preparation = preparation
        self.answer = answer or _encode_decode
        self.register_buffer("mean", torch.tensor(preparation.mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preparation.std, dtype=torch.float32).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Critic:
        """Stay in eval mode, also when a module that holds the critic is set to train."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the size of the images. Raises ValueError when the network does not give one map per class."""
        height, width = images.shape[-2:]
        how = self.preparation
        inputs = ((images.flip(1) if how.bgr else images) - self.mean) / self.std
        bottom, right = (padded - side for padded, side in zip(how.padded_size(height, width), (height, width), strict=True))
        inputs = F.pad(inputs, (0, right, 0, bottom), value=how.pad_value)
        dtype = next((weight.dtype for weight in self.parameters() if weight.is_floating_point()), images.dtype)
        logits = self.answer(self.network, inputs.to(dtype))
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[1] != len(self.classes):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"critic: the network gave {found}; it must give logits [B, {len(self.classes)}, h, w], one map per class")
        if logits.shape[-2:] != inputs.shape[-2:]:
            logits = F.interpolate(logits, inputs.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width].to(images.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """The same as calling the critic."""
        return self(images)


def _encode_decode(network: Any, inputs: Tensor) -> Tensor:
    return network.encode_decode(inputs, [{"img_shape": inputs.shape[2:]}])


def as_critic(
    network: nn.Module | Callable[[Tensor], Tensor],
    classes: Sequence[str],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    **preparation: Any,
) -> Critic:
    """A critic of a torch module, or of anything that is called with images, or has ``logits(images)``, and gives logits [B,K,h,w].

    ``mean`` and ``std`` are those of the images the network takes, per channel and for RGB in [0, 1]; the default leaves the images
    as they are. Further arguments as in :class:`crfm_core.segmentor.preparation.Preparation`. The module is frozen and set to eval in
    place.

        >>> critic = as_critic(my_unet, ["soil", "water"], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    """
    return Critic(network, classes, Preparation(tuple(mean), tuple(std), **preparation), _logits_of)


def _logits_of(network: Any, inputs: Tensor) -> Tensor:
    """The logits of anything that has a method, or an output, of that name, or that returns them."""
    answer = getattr(network, "logits", network)(inputs)
    return getattr(answer, "logits", answer)
