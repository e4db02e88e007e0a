"""Segmentors on tiles: predictions with test-time augmentation, scores over a split, agreement of synthetic images with their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.segmentor.critic import Critic, load_critic
from crfm_core.segmentor.sliding import slide, window_and_stride
from crfm_core.settings import Evaluation

T = TypeVar("T")


def tile_batches(manifest: Path | str, root: Path | str, batch_size: int) -> Iterator[tuple[pd.DataFrame, np.ndarray, np.ndarray]]:
    """A manifest's rows in order, in batches of one size of tile: (rows, images uint8 [B,H,W,3], labels uint8 [B,H,W])."""
    table = read_manifest(manifest)
    image_paths, label_paths = (paths_of(manifest, table, column, root) for column in ("image", "label"))

    def read(row: int) -> tuple[tuple[int, np.ndarray], np.ndarray]:
        image, label = read_rgb(image_paths[row]), read_label(label_paths[row])
        if image.shape[:2] != label.shape:
            raise DataError(f"{label_paths[row]}: size {label.shape} differs from that of its image {image.shape[:2]}")
        return (row, label), image

    for members, images in batches_of_one_size(map(read, range(len(table))), batch_size):
        rows, labels = zip(*members, strict=True)
        yield table.iloc[list(rows)], images, np.stack(labels)


def batches_of_one_size(pairs: Iterable[tuple[T, np.ndarray]], batch_size: int) -> Iterator[tuple[list[T], np.ndarray]]:
    """Pairs of (member, image [H,W,3]) in batches of neighbours of one size: ([member, ...], images [B,H,W,3])."""
    members: list[T] = []
    images: list[np.ndarray] = []
    for member, image in pairs:
        if images and (len(images) == batch_size or image.shape != images[-1].shape):
            yield members, np.stack(images)
            members, images = [], []
        members, images = [*members, member], [*images, image]
    if images:
        yield members, np.stack(images)


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """The same batches, each read while the one before is used; never more than these two are held."""
    with ThreadPoolExecutor(1, "reading") as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


def as_input(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B,H,W,3] -> float [B,3,H,W] in [0,1], what a critic takes."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def class_maps(critic: Critic, images: Tensor, evaluation: Evaluation) -> Tensor:
    """The critic's maps [B,K,H,W] of images [B,3,H,W] in [0,1]: logits, or mean probabilities with test-time augmentation.

    The most likely class of a pixel is the highest of its K numbers. Where the evaluation gives no window, mode ``slide`` takes the side of
    the images. Views are merged as mmsegmentation's ``SegTTAModel`` does: each is resized bilinearly and perhaps mirrored, and its logits
    are brought back before they become probabilities. Raises ConfigError for windows that leave gaps.
    """
    answer: Callable[[Tensor], Tensor] = critic
    height, width = images.shape[-2:]
    if evaluation.mode == "slide":
        window, stride = window_and_stride(evaluation, max(height, width))
        answer = partial(slide, critic, window=window, stride=stride)
    if not _has_views(evaluation):
        return answer(images)
    views = list(product(evaluation.scales, (False, True) if evaluation.flip else (False,)))
    total = images.new_zeros(())
    for scale, mirrored in views:
        # sides are rounded as mmcv's rescaling does
        view = _resized(images, (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))))
        logits = answer(view.flip(-1)).flip(-1) if mirrored else answer(view)
        total = total + _resized(logits, (height, width)).softmax(dim=1)
    return total / len(views)


def _has_views(evaluation: Evaluation) -> bool:
    """Whether there is test-time augmentation, after which maps are probabilities."""
    return evaluation.scales != [1.0] or evaluation.flip


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def predict(critic: Critic, images: np.ndarray, batch_size: int = 16, evaluation: Evaluation | None = None) -> np.ndarray:
    """Most likely class per pixel: images uint8 [N,H,W,3] -> labels uint8 [N,H,W], predicted as ``evaluation`` says (None: whole)."""
    evaluation, device = evaluation or Evaluation(), critic.mean.device
    batches = (as_input(images[start : start + batch_size], device) for start in range(0, len(images), batch_size))
    return np.concatenate([class_maps(critic, batch, evaluation).argmax(dim=1).to(torch.uint8).cpu().numpy() for batch in batches])


def predict_with_doubt(critic: Critic, images: np.ndarray, evaluation: Evaluation | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Most likely class per pixel, as :func:`predict` finds it, and the probability that it is another: images uint8 [N,H,W,3] -> uint8
    and float32 [N,H,W]. The doubt is exact where it is tiny, too, which 1 minus the class's probability is not."""
    evaluation = evaluation or Evaluation()
    maps = class_maps(critic, as_input(images, critic.mean.device), evaluation)
    labels = maps.argmax(dim=1, keepdim=True)
    doubt = (maps if _has_views(evaluation) else maps.softmax(dim=1)).scatter(1, labels, 0).sum(dim=1)
    return labels[:, 0].to(torch.uint8).cpu().numpy(), doubt.float().cpu().numpy()


def agreement(critic: Critic, manifest: Path | str, root: Path | str, batch_size: int = 16) -> dict:
    """Scores of the critic's predictions against the labels of a manifest's tiles, which for synthetic ones are their masks.

    Returns :meth:`ConfusionMatrix.scores` of one matrix over all tiles, with ``classes``, the number of ``tiles``, and ``per_tile``: the
    mIoU of each in the manifest's order (None if all ignored).
    """
    total, per_tile = _confusion(critic, manifest, root, Evaluation(batch_size=batch_size))
    return {"classes": critic.classes, "tiles": len(per_tile), **total.scores(), "per_tile": per_tile}


def evaluate(
    checkpoint: Path | str, manifest: Path | str, root: Path | str, device: str = "cpu", evaluation: Evaluation | None = None
) -> dict:
    """Scores of a checkpoint over a whole split, from one confusion matrix over all its pixels that are not ignored.

    Returns :meth:`ConfusionMatrix.scores` with ``classes``, the number of ``tiles``, ``confusion`` (the matrix as lists, rows are
    labels) and ``evaluation`` (the settings). Classes that no pixel is labelled as are logged: scores that this leaves undefined are None.

    Raises DataError naming the row whose label holds an id outside the classes, and WeightsError for a checkpoint that cannot be read.
    """
    evaluation, critic = evaluation or Evaluation(), load_critic(checkpoint, device)
    total, per_tile = _confusion(critic, manifest, root, evaluation)
    absent = [name for name, pixels in zip(critic.classes, total.matrix.sum(axis=1), strict=True) if not pixels]
    if absent:
        print(f"{manifest}: no pixel is labelled {', '.join(absent)}; scores that this leaves undefined are null", flush=True)
    result = {"classes": critic.classes, "tiles": len(per_tile), **total.scores()}
    return result | {"confusion": total.matrix.tolist(), "evaluation": evaluation.model_dump(mode="json")}


def _confusion(
    critic: Critic, manifest: Path | str, root: Path | str, evaluation: Evaluation
) -> tuple[ConfusionMatrix, list[float | None]]:
    """The confusion matrix of all tiles, and the mIoU of each in the manifest's order."""
    total, per_tile = ConfusionMatrix(len(critic.classes)), []
    size = evaluation.batch_size
    with tqdm(total=len(read_manifest(manifest)), desc="tiles", unit="tile", disable=None) as progress:
        for rows, images, labels in read_ahead(tile_batches(manifest, root, size)):
            for tile_id, prediction, label in zip(rows.tile_id, predict(critic, images, size, evaluation), labels, strict=True):
                try:
                    single = ConfusionMatrix(len(critic.classes)).update(prediction, label)
                except DataError as error:
                    raise DataError(f"{manifest}: row {tile_id}: {error}") from None
                total.merge(single)
                per_tile.append(single.scores()["mIoU"])
            progress.update(len(rows))
    return total, per_tile
