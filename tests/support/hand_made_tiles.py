"""Tiles whose images say what a critic's loss or prediction is, so that what curation makes of them can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from segmentor_tiles import CLASSES

from crfm_core.data.rasters import write_raster
from crfm_core.manifest import write_manifest
from crfm_core.segmentor.critic import as_critic


def write_by_hand(manifest: Path, images: list[np.ndarray], labels: list[np.ndarray], **columns) -> Path:
    """Write these tiles and their manifest; return its path."""
    rows = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        paths = {kind: f"{manifest.stem}/{kind}s/t{i}.png" for kind in ("image", "label")}
        write_raster(manifest.parent / paths["image"], np.asarray(image, np.uint8))
        write_raster(manifest.parent / paths["label"], np.asarray(label, np.uint8))
        pixels = np.bincount(label[label != 255], minlength=len(CLASSES))
        rows.append({
            "tile_id": f"t{i}", "dataset": "d", "split": "train", "scene": "s", "row": 0, "col": 4 * i, "width": label.shape[1],
            "height": label.shape[0], **paths, "crs": "", "transform": [], "classes": np.flatnonzero(pixels).tolist(),
            "pixels": pixels.tolist(), "digest": str(i), **{name: values[i] for name, values in columns.items()},
        })  # fmt: skip
    write_manifest(manifest, rows)
    return manifest


class LossInTheImage(torch.nn.Module):
    """A network whose loss is written in the image: red is ten times the loss for the class that green names."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        loss, label = images[:, 0] * 255 / 10, (images[:, 1] * 255).round().long()
        logits = torch.full((len(images), 3, *images.shape[2:]), -100.0)
        logits.scatter_(1, label[:, None], -loss[:, None])
        return logits.scatter_(1, (label[:, None] + 1) % 3, torch.log1p(-torch.exp(-loss))[:, None])


class ClassInTheImage(torch.nn.Module):
    """A network that finds the class that green names."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((images[:, 1] * 255).round().long(), 3).permute(0, 3, 1, 2).float()


def by_loss():
    return as_critic(LossInTheImage(), CLASSES)


def image_of(losses: list, labels: list) -> np.ndarray:
    """The image that says so: losses in tenths and classes, [H,W] each."""
    return np.stack([np.array(losses), np.array(labels), np.zeros_like(labels)], axis=-1)


def tiles_of(manifest: Path, *tiles: tuple, **columns) -> Path:
    labels = [np.array(labels, np.uint8) for _, labels in tiles]
    images = [image_of(losses, np.where(one == 255, 0, one)) for (losses, _), one in zip(tiles, labels, strict=True)]
    return write_by_hand(manifest, images, labels, **columns)
