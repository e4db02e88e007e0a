"""Synthetic images that show their mask or caption worst are left out whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from crfm_core import DataError
from crfm_core.curation.selection import keep_rows
from crfm_core.data.rasters import read_rgb
from crfm_core.manifest import check_paths, paths_of, read_manifest
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import agreement
from crfm_core.text.clip import Clip


def filter_images(
    manifest: Path | str,
    root: Path | str,
    scorer: Critic | Clip,
    keep: float,
    out: Path | str,
    classes: Sequence[str],
    batch_size: int = 16,
) -> pd.DataFrame:
    """Keep the best share of a manifest's images, over all masks and copies; write the manifest ``out`` of them.

    By a critic: the mIoU of its prediction with the mask, in percent, in the new column ``agreement`` (NaN for an image without
    labelled pixels). By a CLIP-like model: the cosine of image and caption, in the new column ``clip_score``. Images and labels stay
    where they are. Raises DataError when no image can be scored.
    """
    table = read_manifest(manifest)
    check_paths(manifest, table, root)
    if isinstance(scorer, Critic):
        column, scores = "agreement", agreement(scorer, manifest, root, batch_size)["per_tile"]
    else:
        column, scores = "clip_score", clip_scores(scorer, manifest, root, batch_size)
        print(f"scores by {scorer.name}", flush=True)
    scores = np.array([math.nan if score is None else score for score in scores])
    if np.isnan(scores).all():
        raise DataError(
            f"{manifest}: none of its {len(table)} images has a labelled pixel, so that none can be compared with its mask; raise the "
            "margin of the pixel filter before, or filter images first"
        )
    chosen = best(scores, table.tile_id, keep)
    print(f"{column}: {np.nanmean(scores):.4g} on average, {np.nanmean(scores[chosen]):.4g} of those kept", flush=True)
    return keep_rows(manifest, table.assign(**{column: scores}), chosen, out, classes, "raise keep")


def best(scores: np.ndarray, tile_ids: Sequence[str], keep: float) -> np.ndarray:
    """Which ones, bool [N], are among the ceil(keep · N) with the highest scores; NaN is lowest; of equal ones the first by id stay."""
    number = math.ceil(Fraction(str(keep)) * len(scores))  # exact: as floats, 0.07 · 100 is more than 7
    ranked = sorted(zip(np.nan_to_num(scores, nan=-np.inf), tile_ids, range(len(scores)), strict=True), key=lambda one: (-one[0], one[1]))
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[[row for _, _, row in ranked[:number]]] = True
    return chosen


def clip_scores(clip: Clip, manifest: Path | str, root: Path | str, batch_size: int = 16) -> list[float]:
    """The cosine of each image with its caption, in the manifest's order. Raises DataError when the manifest has no captions."""
    table = read_manifest(manifest)
    if "caption" not in table:
        raise DataError(f"{manifest}: no column caption, and the filter compares images with their captions; give synthetic tiles")
    paths, captions = paths_of(manifest, table, "image", root), list(table.caption)
    known: dict[str, np.ndarray] = {}  # captions occur again with every copy of a mask
    scores: list[float] = []
    for start in tqdm(range(0, len(table), batch_size), "images and captions", disable=None):
        said = captions[start : start + batch_size]
        if new := [text for text in dict.fromkeys(said) if text not in known]:
            known |= zip(new, clip.text_features(new).numpy(), strict=True)
        seen = clip.image_features([read_rgb(path) for path in paths[start : start + batch_size]]).numpy()
        scores += [float(image @ known[text]) for image, text in zip(seen, said, strict=True)]
    return scores
