"""Whether synthetic images show what their masks say, by the critic that guided them and by an independent judge.

Only the judge is evidence: the critic was optimised against, and a correction that fools it is an adversarial one.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

from crfm_core.manifest import read_manifest
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.models.latent_space import decode_latents, encode_images
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input, predict, tile_batches

SCORES = ("OA", "mIoU", "mAcc")


def agreement_by_copy(critic: Critic, manifest: Path, root: Path, batch_size: int = 16) -> dict:
    """Scores in percent of the critic's predictions on synthetic tiles against their masks, one matrix per copy.

    A copy is one draw of the noise for every mask, so ``OA`` and ``OA_sd`` (None for one copy) are mean and standard deviation over
    draws; likewise mIoU and mAcc. ``copies`` holds the single ones.
    """
    matrices = {copy: ConfusionMatrix(len(critic.classes)) for copy in sorted(read_manifest(manifest)["copy"].unique())}
    for rows, images, labels in tile_batches(manifest, root, batch_size):
        predictions = predict(critic, images, batch_size)
        for copy, prediction, label in zip(rows["copy"], predictions, labels, strict=True):
            matrices[copy].update(prediction, label)
    copies = [{name: matrix.scores()[name] for name in SCORES} for matrix in matrices.values()]
    summary = {"copies": copies}
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
