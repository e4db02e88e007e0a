"""What a segmentor makes of tiles: predictions, scores over a split, agreement of synthetic images with their masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.segmentor.critic import Critic, load_critic


def tile_batches(manifest: Path | str, root: Path | str, batch_size: int) -> Iterator[tuple[pd.DataFrame, np.ndarray, np.ndarray]]:
    """A manifest's rows in order, in batches of one size of tile: (rows, images uint8 [B,H,W,3], labels uint8 [B,H,W])."""
    table = read_manifest(manifest)
    files = zip(paths_of(manifest, table, "image", root), paths_of(manifest, table, "label", root), strict=True)
    rows, images, labels = [], [], []
    for row, (image_path, label_path) in enumerate(files):
        image, label = read_rgb(image_path), read_label(label_path)
        if image.shape[:2] != label.shape:
            raise DataError(f"{label_path}: size {label.shape} differs from that of its image {image.shape[:2]}")
        if rows and (len(rows) == batch_size or label.shape != labels[-1].shape):
            yield table.iloc[rows], np.stack(images), np.stack(labels)
            rows, images, labels = [], [], []
        rows, images, labels = [*rows, row], [*images, image], [*labels, label]
    yield table.iloc[rows], np.stack(images), np.stack(labels)


def as_input(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B,H,W,3] -> float [B,3,H,W] in [0,1], what a critic takes."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def predict(critic: Critic, images: np.ndarray, batch_size: int = 16) -> np.ndarray:
    """Most likely class per pixel: images uint8 [N,H,W,3] -> labels uint8 [N,H,W]."""
    device = critic.mean.device
    batches = (as_input(images[start : start + batch_size], device) for start in range(0, len(images), batch_size))
    return np.concatenate([critic(batch).argmax(dim=1).to(torch.uint8).cpu().numpy() for batch in batches])


def agreement(critic: Critic, manifest: Path | str, root: Path | str, batch_size: int = 16) -> dict:
    """Scores of the critic's predictions against the labels of a manifest's tiles.

    For synthetic tiles the labels are the masks they were made for. Returns :meth:`ConfusionMatrix.scores` of one matrix over all
    tiles, with ``classes``, the number of ``tiles``, and ``per_tile``: the mIoU of each in the manifest's order (None if all ignored).
    """
    total, per_tile = ConfusionMatrix(len(critic.classes)), []
    for rows, images, labels in tile_batches(manifest, root, batch_size):
        for tile_id, prediction, label in zip(rows.tile_id, predict(critic, images, batch_size), labels, strict=True):
            try:
                single = ConfusionMatrix(len(critic.classes)).update(prediction, label)
            except DataError as error:
                raise DataError(f"{manifest}: row {tile_id}: {error}") from None
            total.merge(single)
            per_tile.append(single.scores()["mIoU"])
    return {"classes": critic.classes, "tiles": len(per_tile), **total.scores(), "per_tile": per_tile}


def evaluate(checkpoint: Path | str, manifest: Path | str, root: Path | str, device: str = "cpu", batch_size: int = 16) -> dict:
    """Scores of a checkpoint over a whole split, as :func:`agreement` without the single tiles."""
    scores = agreement(load_critic(checkpoint, device), manifest, root, batch_size)
    del scores["per_tile"]
    return scores
