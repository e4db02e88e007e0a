"""Limits that bring pixels of any depth to 0...255: two percentiles per band, of a scene or of the training scenes together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crfm_core import DataError
from crfm_core.data.rasters import alpha_band, bands_of, open_raster, read_bands
from crfm_core.settings import Scale

#: Pixels that are sampled, of one scene or of the training scenes together; evenly spaced, from an overview if there is one.
SAMPLE = 1 << 21


def sample_bands(image: Path | str, bands: list[int] | None, count: int = SAMPLE) -> np.ndarray:
    """Valid pixels [n, bands] of a scene, evenly spread, about ``count`` at most. DataError when there is none."""
    with open_raster(image) as source:
        shrink = max(1.0, np.sqrt(source.width * source.height / count))
        shape = max(1, round(source.height / shrink)), max(1, round(source.width / shrink))
        chosen = bands_of(source, bands)
        pixels = read_bands(source, chosen, out_shape=(len(chosen), *shape))
        valid = (source.dataset_mask(out_shape=shape) > 0) & np.isfinite(pixels).all(axis=0)
        if (alpha := alpha_band(source)) is not None:
            valid &= read_bands(source, alpha, out_shape=shape) > 0
    if not valid.any():
        raise DataError(f"{image}: has no valid pixel, all are nodata or not a number; leave the scene out")
    return pixels[:, valid].T


def scene_limits(images: list[Path], training: list[bool], scale: Scale, bands: list[int] | None) -> list[tuple[list, list]]:
    """Per image the values of each band that become 0 and 255.

    With ``over: dataset`` all images get those of the images marked in ``training`` together; no scored image contributes to them.
    """
    if scale.over == "scene":
        return [_percentiles(sample_bands(image, bands), scale) for image in images]
    used = [image for image, marked in zip(images, training, strict=True) if marked]
    limits = _percentiles(np.concatenate([sample_bands(image, bands, SAMPLE // len(used)) for image in used]), scale)
    return [limits for _ in images]


def _percentiles(pixels: np.ndarray, scale: Scale) -> tuple[list, list]:
    low, high = np.percentile(pixels.astype(np.float64), (scale.low, scale.high), axis=0)
    return low.tolist(), high.tolist()
