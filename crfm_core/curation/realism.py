"""How realistic synthetic tiles are: distances of their distribution from real tiles, diversity, and copies of training tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crfm_core.files import read_json
from crfm_core.manifest import read_manifest
from crfm_core.metrics.generation import cmmd, diversity, frechet_distance, kernel_distance, nearest_references
from crfm_core.metrics.inception import Inception, why_no_inception
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input, tile_batches
from crfm_core.settings import Generation, Judge
from crfm_core.text.clip import Clip, load_clip

#: A sample counts as memorised when its nearest training tile is closer than this share of the mean distance to the next ones.
MEMORISED_RATIO = 0.5
#: Side in pixels to which tiles are reduced for that.
RESIDUAL_SIDE = 32
#: How many of the closest samples are listed with their nearest training tile.
NEIGHBOURS_LISTED = 10
#: Why there are no embeddings.
NO_CLIP = "no CLIP-like model is named (clip)"

#: Images uint8 [B,H,W,3] -> features [B,D].
Extractor = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class TileFeatures:
    """A manifest's rows with, for each tile, features [N,D] by name and residuals (:func:`class_residuals`)."""

    table: pd.DataFrame
    features: dict[str, Tensor]
    residuals: Tensor


def measure_generation(
    synthetic: Path | str,
    real: Path | str,
    training: Path | str,
    root: Path | str,
    settings: Generation,
    *,
    judge: Critic | None = None,
    judged_by: Judge | None = None,
    weights: Path | str | None = None,
    clip: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """Compare the synthetic tiles of a manifest with real ones.

    Args:
        real: manifest of the real tiles whose distribution is compared with.
        training: manifest of the tiles that the generator was trained on, of which samples may be copies.
        root: folder that the paths in the manifests must stay in.
        judge: the segmentor that gives the features of kind judge; ``judged_by`` says which it is.
        weights: those of InceptionV3, or the JSON file that fetching them wrote.
        clip: folder of the CLIP-like model, or the JSON file that fetching it wrote.

    Returns ``features`` and ``kind`` (what distances are measured in), ``real`` (split and number of tiles), ``samples`` (their
    number), ``fid``, ``kid``, ``kid_sd`` and ``subset`` (:func:`frechet_distance` and :func:`kernel_distance`; FID and KID for kind
    inception), ``missing`` (why there are none), ``cmmd`` and ``cmmd_missing``, ``diversity`` between the ``copies`` of a mask and
    between ``real`` tiles (:func:`diversity`), and what :func:`memorised_tiles` gives. Values that are missing are None; the reasons
    are empty where nothing is missing, or nothing was configured.
    """
    synthetic, real, training = (Path(manifest) for manifest in (synthetic, real, training))
    kind = settings.features
    embedding = load_clip(clip, str(device)) if clip and (settings.cmmd or kind == "clip") else None
    name, extractor, missing = _extractor(kind, judge, judged_by, weights, embedding, device)
    if extractor and kind == "judge" and (missing := _judge_fault(extractor, real, root)):
        extractor = None
    extractors: dict[str, Extractor] = {kind: extractor} if extractor else {}
    if embedding and settings.cmmd:
        extractors["clip"] = embedding.image_features
    features = {
        manifest: extract_features(manifest, root, extractors if manifest in (synthetic, real) else {}, settings.batch_size)
        for manifest in dict.fromkeys((synthetic, real, training))
    }
    samples, tiles = features[synthetic], features[real]
    if extractor and not all(both.features[kind].isfinite().all() for both in (tiles, samples)):
        missing = "the features of some tiles are no numbers"
    diversities = {
        "copies": None if missing else diversity(samples.features[kind], samples.table.mask_of.tolist()),
        "real": None if missing else diversity(tiles.features[kind]),
    }
    if not missing and min(len(tiles.table), len(samples.table)) < 2:
        missing = f"{len(tiles.table)} real and {len(samples.table)} synthetic tiles; a distance takes two of each"
    distances: dict[str, float | None] = dict.fromkeys(("fid", "kid", "kid_sd", "subset"))
    if not missing:
        compared = tiles.features[kind], samples.features[kind]
        distances = dict(zip(distances, (frechet_distance(*compared), *kernel_distance(*compared, settings.subset)), strict=True))
    return {
        "features": name,
        "kind": kind,
        "real": {"split": str(tiles.table["split"].iloc[0]), "tiles": len(tiles.table)},
        "samples": len(samples.table),
        **distances,
        "missing": missing,
        "cmmd": cmmd(tiles.features["clip"], samples.features["clip"]) if embedding and settings.cmmd else None,
        "cmmd_missing": NO_CLIP if settings.cmmd and not embedding else "",
        "diversity": diversities,
        **memorised_tiles(samples, features[training], device),
    }


def extract_features(manifest: Path | str, root: Path | str, extractors: Mapping[str, Extractor], batch_size: int = 16) -> TileFeatures:
    """The features of each tile of a manifest by each of the extractors, and its residuals; every image is read once."""
    found: dict[str, list[Tensor]] = {name: [] for name in (*extractors, "residuals")}
    for _, images, labels in tile_batches(manifest, root, batch_size):
        for name, extractor in extractors.items():
            found[name].append(extractor(images).float().cpu())
        found["residuals"].append(class_residuals(images, labels))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return TileFeatures(read_manifest(manifest), {name: joined[name] for name in extractors}, joined["residuals"])


def _extractor(
    kind: str, judge: Critic | None, judged_by: Judge | None, weights: Path | str | None, embedding: Clip | None, device: torch.device | str
) -> tuple[str, Extractor | None, str]:
    """The features that distances are measured in: their name, their extractor, and why there is none."""
    if kind == "clip":
        return (f"embeddings of {embedding.name}", embedding.image_features, "") if embedding else ("CLIP", None, NO_CLIP)
    if kind == "judge":
        name = "deepest features of the judge"
        if judge is None:
            return name, None, "there is no judge"
        if judged_by and judged_by.path:
            name += f", {Path(judged_by.path).name}"
        elif judged_by:
            name += f", {judged_by.segmentor} on {judged_by.recipe}, seed {judged_by.seed}"
        return name, judge_features(judge), ""
    if weights and Path(weights).suffix == ".json":
        note = read_json(weights)
        if "missing" in note:
            return "InceptionV3", None, note["missing"]
        weights = note["file"]
    if (missing := why_no_inception(weights)) or weights is None:
        return "InceptionV3", None, missing
    return f"last pooling of InceptionV3, {Path(weights).name}", Inception(weights, device).image_features, ""


def judge_features(judge: Critic) -> Extractor:
    """The deepest feature map of a segmentor, the one with the most channels, averaged over the part that shows the image.

    For a network of mmsegmentation these are the inputs of its decoder, for one of transformers its hidden states: maps [B,C,h,w], or
    the last sequence [B,N,C], averaged over its tokens. Raises ValueError when called and the network has neither.
    """
    deepest: list[Tensor] = []

    def keep_features(network: nn.Module, inputs: Tensor) -> Tensor:
        deepest[:] = [_deepest(network, inputs)]
        return inputs.new_zeros(len(inputs), len(judge.classes), *inputs.shape[-2:])

    # The judge itself, with its preparation of the images, whose forward pass keeps features instead of giving logits.
    probe = Critic(judge.network, judge.classes, judge.preparation, keep_features).to(judge.mean.device)

    @torch.no_grad()
    def extract(images: np.ndarray) -> Tensor:
        probe(as_input(images, judge.mean.device))
        features = deepest.pop().float()
        if features.ndim == 3:
            return features.mean(dim=1)
        sides = images.shape[1:3]
        padded = judge.preparation.padded_size(*sides)
        height, width = (math.ceil(cells * side / full) for cells, side, full in zip(features.shape[-2:], sides, padded, strict=True))
        return features[..., :height, :width].mean(dim=(2, 3))

    return extract


def _deepest(network: Any, inputs: Tensor) -> Tensor:
    if hasattr(network, "extract_feat"):
        states = network.extract_feat(inputs)
    else:
        states = getattr(network(inputs, output_hidden_states=True), "hidden_states", None)
    states = [state for state in states or () if isinstance(state, Tensor) and state.ndim in (3, 4)]
    maps = [state for state in states if state.ndim == 4]
    if not states:
        raise ValueError(f"a {type(network).__name__} gives no feature maps")
    return max(maps, key=lambda state: (state.shape[1], -state[0, 0].numel())) if maps else states[-1]


def _judge_fault(extractor: Extractor, manifest: Path | str, root: Path | str) -> str:
    """Why a judge from elsewhere gives no features, by trying it on one tile; "" when it does."""
    _, images, _ = next(tile_batches(manifest, root, 1))
    try:
        extractor(images)
    except (TypeError, ValueError) as error:
        return f"the judge gives no features: {error}"
    return ""


def class_residuals(images: np.ndarray, labels: np.ndarray) -> Tensor:
    """What images show beyond their labels: uint8 [B,H,W,3], [B,H,W] -> float16 [B,3*32*32] of length 1.

    Each pixel minus the mean colour of its class in that image, reduced to 32x32 by area. Two images drawn for one mask are similar
    without being copies, and so are two plain ones of one class; their residuals are not. Brightness and contrast do not count; the
    colours of the single objects of a class do. An image of one colour per class has length 0.
    """
    batch = len(images)
    keys = (labels.astype(np.int64) + 256 * np.arange(batch)[:, None, None]).ravel()
    counts = np.maximum(np.bincount(keys, minlength=256 * batch), 1)
    pixels = images.reshape(-1, 3).astype(np.float32)
    means = np.stack([np.bincount(keys, pixels[:, band], minlength=256 * batch) / counts for band in range(3)], axis=1)
    residuals = torch.from_numpy((pixels - means[keys].astype(np.float32)).reshape(images.shape)).permute(0, 3, 1, 2)
    return F.normalize(F.interpolate(residuals, (RESIDUAL_SIDE, RESIDUAL_SIDE), mode="area").flatten(1), dim=1).half()


def memorised_tiles(samples: TileFeatures, training: TileFeatures, device: torch.device | str = "cpu") -> dict:
    """Samples that are copies of a training tile, as it is or mirrored as training does.

    By the ratio of :func:`nearest_references` over :func:`class_residuals`; ``memorised`` lists the ids of those below ``threshold``,
    the closest first, ``neighbours`` the ten closest samples with their nearest training tile. With a single training tile there is no
    ratio, and both are empty. 60,000 samples and 20,000 tiles take 1.5e13 operations (five minutes of two CPU cores) and 1.2 GB.
    """
    mirrored = training.residuals.view(-1, 3, RESIDUAL_SIDE, RESIDUAL_SIDE).flip(3).flatten(1)
    index, ratio = nearest_references(samples.residuals, [training.residuals, mirrored], device=device)
    order = [int(row) for row in np.argsort(ratio, kind="stable") if np.isfinite(ratio[row])]
    names, known = samples.table.tile_id.astype(str).tolist(), training.table.tile_id.astype(str).tolist()
    closest = order[:NEIGHBOURS_LISTED]
    return {
        "neighbours": [{"tile_id": names[row], "nearest": known[index[row]], "ratio": float(ratio[row])} for row in closest],
        "memorised": [names[row] for row in order if ratio[row] < MEMORISED_RATIO],
        "threshold": MEMORISED_RATIO,
    }
