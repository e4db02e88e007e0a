"""Images larger than what a network was trained on: overlapping windows, whose values are averaged where they overlap."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from crfm_core import ConfigError
from crfm_core.data.windows import window_offsets
from crfm_core.segmentor.critic import Critic
from crfm_core.settings import Evaluation


def window_and_stride(evaluation: Evaluation, tile_size: int) -> tuple[int, int]:
    """Side of a window and distance between windows in pixels. ConfigError when the distance would leave gaps."""
    window = evaluation.window or tile_size
    stride = evaluation.stride or max(1, 2 * window // 3)
    if stride > window:
        raise ConfigError(f"evaluation.stride: {stride} with windows of {window} pixels leaves gaps; allowed: 1...{window}")
    return window, stride


class Canvas:
    """The weighted mean of overlapping windows' values: [..., H, W] with ``leading`` dimensions before the last two."""

    def __init__(self, leading: tuple[int, ...], height: int, width: int, device: torch.device | str) -> None:
        self.total = torch.zeros(*leading, height, width, device=device)
        self.weight = torch.zeros(height, width, device=device)

    def add(self, top: int, left: int, values: Tensor, weights: Tensor | None = None) -> None:
        """Add one window's values [..., h, w] with weights [h, w], by default 1."""
        rows, cols = slice(top, top + values.shape[-2]), slice(left, left + values.shape[-1])
        self.total[..., rows, cols] += values if weights is None else values * weights
        self.weight[rows, cols] += 1 if weights is None else weights

    def mean(self) -> Tensor:
        """The mean [..., H, W]; NaN where no window was."""
        return self.total / self.weight

    def take(self, rows: int) -> Tensor:
        """The mean of the first ``rows`` rows, which leave the canvas: the others move up, and empty ones follow them."""
        done = self.total[..., :rows, :] / self.weight[:rows]
        for part in (self.total, self.weight):
            kept = part[..., rows:, :].clone()  # source and destination may overlap
            part[..., : kept.shape[-2], :] = kept
            part[..., kept.shape[-2] :, :] = 0
        return done


def slide(critic: Critic, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits [B,K,H,W] of images [B,3,H,W] from overlapping windows, averaged by count as mmsegmentation's ``slide_inference`` does.

    A window is an image of its own: a critic that pads to a multiple of 32 pads each. An image smaller than a window is one window.
    """
    height, width = images.shape[-2:]
    tops, lefts = window_offsets(height, min(window, height), stride), window_offsets(width, min(window, width), stride)
    canvas = Canvas((len(images), len(critic.classes)), height, width, images.device)
    for top, left in product(tops, lefts):
        canvas.add(top, left, critic(images[..., top : top + window, left : left + window]))
    return canvas.mean()
