"""Keep the synthetic images that fit their captions best, by a CLIP-like model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from crfm_core import DataError
from crfm_core.curation.filter_inputs import FilterInputs
from crfm_core.curation.selection import keep_best
from crfm_core.data.rasters import read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.settings import ClipFilter
from crfm_core.text.clip import Clip


def apply(settings: ClipFilter, inputs: FilterInputs) -> pd.DataFrame:
    """Keep the best share of all images by the cosine of image and caption, written to the new column ``clip_score``."""
    scores = clip_scores(inputs.clip, inputs.manifest, inputs.root, inputs.batch_size)
    print(f"scores by {inputs.clip.name}", flush=True)
    return keep_best(inputs.manifest, "clip_score", scores, settings.keep, inputs.out, inputs.classes)


def clip_scores(clip: Clip, manifest: Path | str, root: Path | str, batch_size: int = 16) -> list[float]:
    """The cosine of each image with its caption, in the manifest's order. Raises DataError when the manifest has no captions."""
    table = read_manifest(manifest)
    if "caption" not in table:
        raise DataError(f"{manifest}: no column caption, and the filter compares images with their captions; give synthetic tiles")
    paths, captions = paths_of(manifest, table, "image", root), list(table.caption)
    known: dict[str, np.ndarray] = {}  # captions occur again with every copy of a mask
    scores: list[float] = []
    for start in tqdm(range(0, len(table), batch_size), "images and captions", disable=None):
        texts = captions[start : start + batch_size]
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known |= zip(new, clip.text_features(new).numpy(), strict=True)
        features = clip.image_features([read_rgb(path) for path in paths[start : start + batch_size]]).numpy()
        scores += [float(image @ known[text]) for image, text in zip(features, texts, strict=True)]
    return scores
