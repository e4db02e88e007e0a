"""Test-time augmentation: what a segmentor says of an image in several sizes, as it is and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch.nn.functional as F
from torch import Tensor


def views_of(scales: Sequence[float], flip: bool) -> list[tuple[float, bool]]:
    """What is looked at: (scale, mirrored) of each view."""
    return list(product(scales, (False, True) if flip else (False,)))


def augmented(answer: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    """Mean class probabilities [B,K,H,W] over views of images [B,3,H,W], as mmsegmentation's ``SegTTAModel`` merges them.

    A view is resized bilinearly, and mirrored left to right where asked; its logits, from ``answer``, are brought back to the image's
    orientation and, bilinearly, to its size before they become probabilities.
    """
    height, width = images.shape[-2:]
    views = views_of(scales, flip)
    total = 0
    for scale, mirrored in views:
        # sides are rounded as mmcv's rescaling does
        size = tuple(max(1, int(side * scale + 0.5)) for side in (height, width))
        view = _resized(images, size)
        logits = answer(view.flip(-1)).flip(-1) if mirrored else answer(view)
        total = total + _resized(logits, (height, width)).softmax(dim=1)
    return total / len(views)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)
