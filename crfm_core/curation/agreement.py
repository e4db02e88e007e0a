"""How well synthetic images agree with their masks, by the critic that guided them and by an independent judge.

Only the judge is evidence: images were optimised against the critic, and a correction that fools it is an adversarial one.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from crfm_core import DataError
from crfm_core.manifest import read_manifest
from crfm_core.metrics.confusion import OVERALL_SCORES, ConfusionMatrix
from crfm_core.models.latent_space import decode_latents, encode_images
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input, predict, tile_batches
from crfm_core.segmentor.validation import gain_of_last_quarter

#: How many of the tiles that agree least with their masks are listed.
LOWEST = 12


def agreement_by_copy(critics: dict[str, Critic], manifest: Path, root: Path, batch_size: int = 16) -> dict:
    """Scores in percent of the critics' predictions on synthetic tiles against their masks, from one confusion matrix per copy.

    A copy is one draw of the noise for every mask. Returns for each name of ``critics`` ``OA`` and ``OA_sd`` (None for one copy), mean
    and standard deviation over copies, likewise mIoU and mAcc, and ``copies``, the scores of each copy. Beside the names, ``tiles`` is
    the number of tiles, and ``lowest`` lists at most :data:`LOWEST` tiles with their mIoU by each critic, the lowest by the last critic
    first; tiles without labelled pixels are left out.
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
    summaries = {name: _summary([_overall(matrix) for matrix in by_copy.values()]) for name, by_copy in matrices.items()}
    order = list(critics)[::-1]
    labelled = [tile for tile in tiles if tile[order[0]] is not None]
    lowest = sorted(labelled, key=lambda tile: (*(tile[name] for name in order), tile["tile_id"]))[:LOWEST]
    return {"tiles": len(tiles), **summaries, "lowest": lowest}


def _summary(copies: list[dict]) -> dict:
    """Mean and standard deviation of each score over the copies, and the scores of each copy."""
    summary: dict = {"copies": copies}
    for name in OVERALL_SCORES:
        values = [scores[name] for scores in copies]
        summary |= {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
    return summary


@torch.no_grad()
def reconstruction_agreement(base: Path, critics: dict[str, Critic], manifest: Path, root: Path, device: str, batch_size: int = 16) -> dict:
    """Scores on real tiles and on their reconstructions by the autoencoder: the ceiling for a generator trained on them.

    Returns ``tiles`` and, for ``real`` and ``reconstructed``, OA, mIoU and mAcc in percent by each of ``critics``.
    """
    from diffusers import AutoencoderKL  # slow to import, and only this function needs it

    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(device).eval()
    kinds = ("real", "reconstructed")
    matrices = {kind: {name: ConfusionMatrix(len(critic.classes)) for name, critic in critics.items()} for kind in kinds}
    tiles = 0
    for _, images, labels in tile_batches(manifest, root, batch_size):
        tiles += len(images)
        decoded = decode_latents(encode_images(as_input(images, device) * 2 - 1, vae), vae)
        reconstructed = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for kind, pictures in zip(kinds, (images, np.ascontiguousarray(reconstructed)), strict=True):
            for name, critic in critics.items():
                matrices[kind][name].update(predict(critic, pictures, batch_size), labels)
    return {"tiles": tiles, **{kind: {name: _overall(matrix) for name, matrix in matrices[kind].items()} for kind in kinds}}


def held_out_scores(critics: dict[str, Critic], checkpoints: dict[str, Path], manifest: Path, root: Path, batch_size: int = 16) -> dict:
    """How good critics are on real tiles that nothing trains on, and whether their trainings had converged.

    Returns for each name of ``critics`` OA, mIoU and mAcc in percent, the number of ``tiles``, and ``last_quarter``: what the last quarter
    of its training gained on these tiles, in points of mIoU; None for a critic from elsewhere.
    """
    matrices = {name: ConfusionMatrix(len(critic.classes)) for name, critic in critics.items()}
    tiles = 0
    for _, images, labels in tile_batches(manifest, root, batch_size):
        tiles += len(images)
        for name, critic in critics.items():
            matrices[name].update(predict(critic, images, batch_size), labels)
    gains = {name: gain_of_last_quarter(path) for name, path in checkpoints.items()}
    return {name: {"tiles": tiles, **_overall(matrix), "last_quarter": gains[name]} for name, matrix in matrices.items()}


def _overall(matrix: ConfusionMatrix) -> dict[str, float]:
    scores = matrix.scores()
    return {name: scores[name] for name in OVERALL_SCORES}
