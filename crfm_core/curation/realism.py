"""How the samples of a generator compare with real tiles: distances of their distributions, diversity, copies of training tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crfm_core.files import read_json
from crfm_core.manifest import read_manifest
from crfm_core.metrics.generation import cmmd, diversity, frechet_distance, kernel_distance, nearest
from crfm_core.metrics.inception import Inception, why_no_inception
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input, tile_batches
from crfm_core.settings import Generation, Judge
from crfm_core.text.clip import Clip, load_clip

#: A sample whose nearest training tile is closer than this share of the mean distance to the next ones counts as memorised.
THRESHOLD = 0.5

#: Side in pixels to which tiles are reduced for that.
SIDE = 32

#: At most so many samples are listed with their nearest training tile.
LISTED = 10

#: Why there are no embeddings.
NO_CLIP = "no CLIP-like model is named (clip)"

#: Images uint8 [B,H,W,3] -> features [B,D].
Extract = Callable[[np.ndarray], Tensor]


@dataclass(frozen=True)
class Tiles:
    """A manifest's rows, and what was seen in each: features [N,D] by name, and details (:func:`details`)."""

    table: pd.DataFrame
    features: dict[str, Tensor]
    details: Tensor


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
        real: manifest of the real tiles that distributions are compared with.
        training: manifest of the tiles that the generator was trained on, of which samples may be copies.
        root: folder that the paths in the manifests stay below.
        judge: the network whose features kind judge takes; ``judged_by`` says which it is.
        weights: those of InceptionV3, or the JSON file that fetching them wrote.
        clip: folder of the CLIP-like model, or the JSON file that fetching it wrote.

    Returns ``features`` and ``kind`` (what distances are measured in), ``real`` (split and number of tiles), ``samples`` (their
    number), ``fid``, ``kid``, ``kid_sd`` and ``subset`` (:func:`frechet_distance` and :func:`kernel_distance`; FID and KID for kind
    inception), ``missing`` (why there are none), ``cmmd`` and ``cmmd_missing``, ``diversity`` between the ``copies`` of a mask and
    between ``real`` tiles (:func:`diversity`), and what :func:`memorised_tiles` gives. What there is not is None; the reasons are
    empty where all is there, or was not asked for.
    """
    synthetic, real, training = (Path(manifest) for manifest in (synthetic, real, training))
    embedding = load_clip(clip, device) if clip and (settings.cmmd or settings.features == "clip") else None
    name, extract, missing = _extractor(settings, judge, judged_by, weights, embedding, device)
    if extract and settings.features == "judge" and (missing := _fault_of(extract, real, root)):
        extract = None
    with_clip = embedding is not None and settings.cmmd
    by_clip = "compared" if settings.features == "clip" else "clip"  # no image goes through CLIP twice
    asked = {"compared": extract} | ({by_clip: embedding.image_features} if with_clip else {})
    extractors = {key: value for key, value in asked.items() if value}
    seen = {
        manifest: look(manifest, root, extractors if manifest in (synthetic, real) else {}, settings.batch_size)
        for manifest in dict.fromkeys((synthetic, real, training))
    }
    samples, tiles = seen[synthetic], seen[real]
    if extract and not all(both.features["compared"].isfinite().all() for both in (tiles, samples)):
        missing = "the features of some tiles are no numbers"
    return {
        "features": name,
        "kind": settings.features,
        "real": {"split": str(tiles.table["split"].iloc[0]), "tiles": len(tiles.table)},
        "samples": len(samples.table),
        **_distances(tiles, samples, missing, settings.subset),
        "cmmd": cmmd(tiles.features[by_clip], samples.features[by_clip]) if with_clip else None,
        "cmmd_missing": NO_CLIP if settings.cmmd and not with_clip else "",
        "diversity": {"copies": None, "real": None} if missing else _diversity(tiles, samples),
        **memorised_tiles(samples, seen[training], device),
    }


def look(manifest: Path | str, root: Path | str, extractors: Mapping[str, Extract], batch_size: int = 16) -> Tiles:
    """See each tile of a manifest once, in batches of one size of tile."""
    found: dict[str, list[Tensor]] = {name: [] for name in (*extractors, "details")}
    for _, images, labels in tile_batches(manifest, root, batch_size):
        for name, extract in extractors.items():
            found[name].append(extract(images).float().cpu())
        found["details"].append(details(images, labels))
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Tiles(read_manifest(manifest), {name: joined[name] for name in extractors}, joined["details"])


def _distances(tiles: Tiles, samples: Tiles, missing: str, subset: int) -> dict:
    counts = len(tiles.table), len(samples.table)
    if not missing and min(counts) < 2:
        missing = f"{counts[0]} real and {counts[1]} synthetic tiles; a distance takes two of each"
    if missing:
        return {"fid": None, "kid": None, "kid_sd": None, "subset": None, "missing": missing}
    features = tiles.features["compared"], samples.features["compared"]
    mean, deviation, drawn = kernel_distance(*features, subset)
    return {"fid": frechet_distance(*features), "kid": mean, "kid_sd": deviation, "subset": drawn, "missing": ""}


def _diversity(tiles: Tiles, samples: Tiles) -> dict:
    return {
        "copies": diversity(samples.features["compared"], samples.table.mask_of.tolist()),
        "real": diversity(tiles.features["compared"]),
    }


# ------------------------------------------------------------------------------------------------------------ features


def _extractor(
    settings: Generation,
    judge: Critic | None,
    judged_by: Judge | None,
    weights: Path | str | None,
    embedding: Clip | None,
    device: torch.device | str,
) -> tuple[str, Extract | None, str]:
    """The features that distances are measured in: what they are called, how they are got, or else why they cannot be."""
    if settings.features == "clip":
        return (f"embeddings of {embedding.name}", embedding.image_features, "") if embedding else ("CLIP", None, NO_CLIP)
    if settings.features == "judge":
        if judge is None:
            return "deepest features of the judge", None, "there is no judge"
        return f"deepest features of the judge{_who(judged_by)}", judge_features(judge), ""
    if weights and Path(weights).suffix == ".json":
        note = read_json(weights)
        if "missing" in note:
            return "InceptionV3", None, note["missing"]
        weights = note["file"]
    if missing := why_no_inception(weights):
        return "InceptionV3", None, missing
    return f"last pooling of InceptionV3, {Path(weights).name}", Inception(weights, device).image_features, ""


def _who(judge: Judge | None) -> str:
    if judge is None:
        return ""
    return f", {Path(judge.path).name}" if judge.path else f", {judge.segmentor} on {judge.recipe}, seed {judge.seed}"


def judge_features(judge: Critic) -> Extract:
    """The deepest feature map of a segmentor, that with the most channels, averaged over the part that shows the image.

    Of a network of mmsegmentation it is what its decoder is given, of one of transformers its hidden states: maps [B,C,h,w], or the
    last sequence [B,N,C], averaged over its tokens. Raises ValueError when called and the network shows neither.
    """
    seen: list[Tensor] = []

    def answer(network: nn.Module, inputs: Tensor) -> Tensor:
        seen[:] = [_deepest(network, inputs)]
        return inputs.new_zeros(len(inputs), len(judge.classes), *inputs.shape[-2:])

    # The judge itself, with its preparation of the images, asked for something else than logits.
    watched = Critic(judge.network, judge.classes, judge.preparation, answer).to(judge.mean.device)

    @torch.no_grad()
    def extract(images: np.ndarray) -> Tensor:
        watched(as_input(images, judge.mean.device))
        features = seen.pop().float()
        if features.ndim == 3:
            return features.mean(dim=1)
        preparation, sides = judge.preparation, images.shape[1:3]
        padded = [max(least, side + -side % preparation.divisor) for side, least in zip(sides, preparation.size, strict=True)]
        height, width = (math.ceil(cells * side / full) for cells, side, full in zip(features.shape[-2:], sides, padded, strict=True))
        return features[..., :height, :width].mean(dim=(2, 3))

    return extract


def _deepest(network: nn.Module, inputs: Tensor) -> Tensor:
    if hasattr(network, "extract_feat"):
        states = network.extract_feat(inputs)
    else:
        states = getattr(network(inputs, output_hidden_states=True), "hidden_states", None)
    states = [state for state in states or () if isinstance(state, Tensor) and state.ndim in (3, 4)]
    maps = [state for state in states if state.ndim == 4]
    if not states:
        raise ValueError(f"a {type(network).__name__} shows no feature maps")
    return max(maps, key=lambda state: (state.shape[1], -state[0, 0].numel())) if maps else states[-1]


def _fault_of(extract: Extract, manifest: Path | str, root: Path | str) -> str:
    """Why a judge from elsewhere gives no features, by trying it on one tile; nothing when it does."""
    _, images, _ = next(tile_batches(manifest, root, 1))
    try:
        extract(images)
    except (TypeError, ValueError) as error:
        return f"the judge gives no features: {error}"
    return ""


# -------------------------------------------------------------------------------------------------------------- copies


def details(images: np.ndarray, labels: np.ndarray) -> Tensor:
    """What images show that their labels do not say: uint8 [B,H,W,3], [B,H,W] -> float16 [B,3*32*32] of length 1.

    Each pixel less the mean colour of its class in that image, reduced to 32x32 by area. Two images drawn for one mask are alike
    without being copies, and so are two plain ones of one class; what is left of them here is not. Brightness and contrast do not
    count; what colour the single objects of a class have does. An image of one colour per class has length 0.
    """
    batch = len(images)
    keys = (labels.astype(np.int64) + 256 * np.arange(batch)[:, None, None]).ravel()
    counts = np.maximum(np.bincount(keys, minlength=256 * batch), 1)
    pixels = images.reshape(-1, 3).astype(np.float32)
    means = np.stack([np.bincount(keys, pixels[:, band], minlength=256 * batch) / counts for band in range(3)], axis=1)
    left = torch.from_numpy((pixels - means[keys].astype(np.float32)).reshape(images.shape)).permute(0, 3, 1, 2)
    return F.normalize(F.interpolate(left, (SIDE, SIDE), mode="area").flatten(1), dim=1).half()


def memorised_tiles(samples: Tiles, training: Tiles, device: torch.device | str = "cpu") -> dict:
    """Samples that are copies of a training tile, as it is or mirrored as training does.

    By the ratio of :func:`nearest` over :func:`details`; ``memorised`` lists the ids of those below ``threshold``, the closest first,
    ``neighbours`` the ten closest samples with their nearest training tile. With a single training tile there is no ratio, and both
    are empty. 60,000 samples and 20,000 tiles take 1.5e13 operations (five minutes of two CPU cores) and 1.2 GB.
    """
    mirrored = training.details.view(-1, 3, SIDE, SIDE).flip(3).flatten(1)
    index, ratio = nearest(samples.details, [training.details, mirrored], device=device)
    order = [int(row) for row in np.argsort(ratio, kind="stable") if np.isfinite(ratio[row])]
    names, known = samples.table.tile_id.astype(str).tolist(), training.table.tile_id.astype(str).tolist()
    return {
        "neighbours": [{"tile_id": names[row], "nearest": known[index[row]], "ratio": float(ratio[row])} for row in order[:LISTED]],
        "memorised": [names[row] for row in order if ratio[row] < THRESHOLD],
        "threshold": THRESHOLD,
    }
