"""Ignore the synthetic pixels that the critic finds too hard for their class (FreeMask, Yang et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from crfm_core import DataError
from crfm_core.curation.class_losses import pixel_losses
from crfm_core.curation.filter_inputs import FilterInputs
from crfm_core.curation.selection import class_counts, print_counts
from crfm_core.data.rasters import IGNORE, write_raster
from crfm_core.files import hash_of, inside, sha256_of
from crfm_core.manifest import in_subfolder, read_manifest, relocate, write_manifest
from crfm_core.segmentor.evaluation import tile_batches
from crfm_core.settings import MARGIN, PixelFilter


def filter_pixels(loss: Any, labels: Any, class_losses: Sequence[float | None], margin: float = MARGIN) -> Any:
    """The labels with 255 where the loss exceeds ``margin`` times the mean loss of the label's class.

    Args:
        loss: cross-entropy per pixel of a critic trained on real tiles, any shape; numpy array or torch tensor.
        labels: class ids of the same shape and kind, 255 = ignored (stays so). Not modified.
        class_losses: mean loss per class on real pixels; None or NaN for a class that has none: its pixels are kept.
        margin: larger keeps more.
    """
    limits = np.full(IGNORE + 1, np.inf)
    known = np.array(class_losses, float)  # None becomes NaN
    limits[: len(known)] = np.where(np.isnan(known), np.inf, margin * known)
    if isinstance(labels, np.ndarray):
        return np.where(loss > limits[labels], np.array(IGNORE, labels.dtype), labels)
    return labels.masked_fill(loss > torch.from_numpy(limits).to(loss.device)[labels.long()], IGNORE)


def apply(settings: PixelFilter, inputs: FilterInputs) -> pd.DataFrame:
    """Write filtered labels and the manifest that names them.

    Images stay where they are. Labels are written below the folder named like ``inputs.out`` without its suffix, with the georeference
    of their tile. ``classes``, ``pixels`` and ``digest`` follow the new labels; the new column ``kept`` is the share of the pixels
    labelled in the tile's mask that is left, after earlier pixel filters too (1 when it had none).

    Raises DataError when a class loss is missing, no pixel at all is left, or ``inputs.out`` lies outside ``inputs.root``.
    """
    manifest, out, classes, class_losses = inputs.manifest, inputs.out, inputs.critic.classes, inputs.class_losses
    if len(class_losses) != len(classes):
        raise DataError(f"{len(class_losses)} class losses for {len(classes)} classes; compute them with this critic")
    inside(inputs.root, str(out.resolve()))
    rows = []
    for batch, images, labels in tile_batches(manifest, inputs.root, inputs.batch_size):
        filtered = filter_pixels(pixel_losses(inputs.critic, images, labels), labels, class_losses, settings.margin)
        for row, before, after in zip(batch.to_dict("records"), labels, filtered, strict=True):
            label = f"{out.stem}/labels/{in_subfolder(row['tile_id'] + Path(row['label']).suffix)}"
            crs = row["crs"] if label.endswith(".tif") else None  # a PNG has no room for it
            write_raster(out.parent / label, after, crs or None, row["transform"] if len(row["transform"]) else None)
            pixels = np.bincount(after[after != IGNORE], minlength=len(classes))
            labelled = int((before != IGNORE).sum())
            row["kept"] = row.get("kept", 1.0) * (float(pixels.sum() / labelled) if labelled else 1.0)
            row["image"], row["label"] = relocate(row["image"], manifest, out), label
            row["classes"], row["pixels"] = np.flatnonzero(pixels).tolist(), pixels.tolist()
            row["digest"] = hash_of(row["digest"], sha256_of(out.parent / label))
            rows.append(row)
    before, after = read_manifest(manifest), pd.DataFrame(rows)
    if not sum(map(sum, after.pixels)):
        raise DataError(
            f"{out}: no pixel of the {len(rows)} tiles of {manifest} has a loss of at most {settings.margin} times its class's mean; "
            "raise the filter's margin, or look at the samples: they do not show their masks"
        )
    present = class_counts(before, after, classes).tiles_before
    unknown = [name for name, mean, tiles in zip(classes, class_losses, present, strict=True) if tiles and (mean is None or np.isnan(mean))]
    if unknown:
        print(f"no real pixels of {', '.join(unknown)} to compare with: their synthetic pixels are all kept", flush=True)
    print_counts(before, after, classes)
    return write_manifest(out, after)
