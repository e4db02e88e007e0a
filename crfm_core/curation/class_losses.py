"""The critic's loss per class on real tiles, with which the pixel filter and the re-samplings compare synthetic ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from crfm_core import DataError
from crfm_core.data.rasters import IGNORE
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input, tile_batches


@torch.no_grad()
def pixel_losses(critic: Critic, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The critic's cross-entropy per pixel: images uint8 [B,H,W,3], labels uint8 [B,H,W] -> float32 [B,H,W], 0 where ignored.

    Raises DataError for labels that are no class of the critic.
    """
    if (wrong := labels[(labels != IGNORE) & (labels >= len(critic.classes))]).size:
        raise DataError(f"labels hold the class id {wrong[0]}; the critic has the classes 0...{len(critic.classes) - 1} (255 = ignored)")
    device = critic.mean.device
    targets = torch.from_numpy(labels).to(device).long()
    return F.cross_entropy(critic(as_input(images, device)), targets, ignore_index=IGNORE, reduction="none").cpu().numpy()


def class_losses(critic: Critic, manifest: Path | str, root: Path | str, batch_size: int = 16) -> dict:
    """Mean loss of the critic per class over all pixels of a split of real tiles (FreeMask, Yang et al., NeurIPS 2023).

    The mean is over the pixels of all tiles together; ignored pixels do not count. Returns ``losses``, one number per class or None for
    a class that does not occur, and ``pixels``, their counts. On tiles that the critic was trained on the losses are optimistic.
    """
    num_classes = len(critic.classes)
    total, pixels = np.zeros(num_classes), np.zeros(num_classes, dtype=np.int64)
    for _, images, labels in tile_batches(manifest, root, batch_size):
        each, valid = pixel_losses(critic, images, labels), labels != IGNORE
        total += np.bincount(labels[valid], weights=each[valid], minlength=num_classes)
        pixels += np.bincount(labels[valid], minlength=num_classes)
    absent = [name for name, count in zip(critic.classes, pixels, strict=True) if not count]
    if absent:
        print(f"no real pixels of {', '.join(absent)}: their synthetic pixels will all be kept", flush=True)
    losses = [float(total[c] / pixels[c]) if pixels[c] else None for c in range(num_classes)]
    for name, loss, count in zip(critic.classes, losses, pixels, strict=True):
        print(f"{name}: {'no loss' if loss is None else f'mean loss {loss:.4f}'} over {count} pixels", flush=True)
    return {"losses": losses, "pixels": pixels.tolist()}
