"""Whether synthetic images show what their masks say, by the critic that guided them and by an independent judge.

Only the judge is evidence: the critic was optimised against, and a correction that fools it is an adversarial one.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from crfm_core import DataError
from crfm_core.manifest import read_manifest
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.models.latent_space import decode_latents, encode_images
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input, predict, tile_batches

SCORES = ("OA", "mIoU", "mAcc")
#: So many of the tiles that agree least with their masks are named.
LOWEST = 12


def agreement_by_copy(critics: dict[str, Critic], manifest: Path, root: Path, batch_size: int = 16) -> dict:
    """Scores in percent of the critics' predictions on synthetic tiles against their masks, one matrix per copy.

    A copy is one draw of the noise for every mask, so for each name of ``critics``, ``OA`` and ``OA_sd`` (None for one copy) are mean
    and standard deviation over draws; likewise mIoU and mAcc. ``copies`` holds the single ones. Beside the names, ``tiles`` is their
    number, and ``lowest`` names at most :data:`LOWEST` tiles with the mIoU by each critic, the lowest by the last of them first; tiles
    without labelled pixels are left out.
    """
    copies = sorted(read_manifest(manifest)["copy"].unique())
    matrices = {name: {copy: ConfusionMatrix(len(critic.classes)) for copy in copies} for name, critic in critics.items()}
    tiles: list[dict] = []
    for rows, images, labels in tile_batches(manifest, root, batch_size):
        found = [{"tile_id": tile_id} for tile_id in rows.tile_id]
        for name, critic in critics.items():
            predictions = predict(critic, images, batch_size)
            for tile, copy, prediction, label in zip(found, rows["copy"], predictions, labels, strict=True):
                try:
                    single = ConfusionMatrix(len(critic.classes)).update(prediction, label)
                except DataError as error:
                    raise DataError(f"{manifest}: row {tile['tile_id']}: {error}") from None
                matrices[name][copy].merge(single)
                tile[name] = single.scores()["mIoU"]
        tiles += found
    summaries = {name: _summary([matrix.scores() for matrix in by_copy.values()]) for name, by_copy in matrices.items()}
    order = list(critics)[::-1]
    labelled = [tile for tile in tiles if tile[order[0]] is not None]
    lowest = sorted(labelled, key=lambda tile: (*(tile[name] for name in order), tile["tile_id"]))[:LOWEST]
    return {"tiles": len(tiles), **summaries, "lowest": lowest}


def _summary(copies: list[dict]) -> dict:
    """Mean and standard deviation of each score over the copies, and the single ones."""
    summary: dict = {"copies": [{name: scores[name] for name in SCORES} for scores in copies]}
    for name in SCORES:
        values = [scores[name] for scores in copies]
        summary |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
    return summary


@torch.no_grad()
def reconstruction_agreement(base: Path, critics: dict[str, Critic], manifest: Path, root: Path, device: str, batch_size: int = 16) -> dict:
    """Scores on real tiles and on what the autoencoder keeps of them: the ceiling for a generator trained on them.

    Returns ``tiles`` and, for ``real`` and ``reconstructed``, OA, mIoU and mAcc in percent by each of ``critics``.
    """
    from diffusers import AutoencoderKL  # slow to import, and only this function needs it

    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(device).eval()
    matrices = {
        kind: {name: ConfusionMatrix(len(critic.classes)) for name, critic in critics.items()} for kind in ("real", "reconstructed")
    }
    tiles = 0
    for _, images, labels in tile_batches(manifest, root, batch_size):
        tiles += len(images)
        decoded = decode_latents(encode_images(as_input(images, device) * 2 - 1, vae), vae)
        again = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for kind, pictures in (("real", images), ("reconstructed", np.ascontiguousarray(again))):
            for name, critic in critics.items():
                matrices[kind][name].update(predict(critic, pictures, batch_size), labels)
    scores = {kind: {n: {key: m.scores()[key] for key in SCORES} for n, m in by.items()} for kind, by in matrices.items()}
    return {"tiles": tiles, **scores}
