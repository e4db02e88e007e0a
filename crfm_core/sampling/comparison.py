"""Presets of the correction side by side: what each does to samples of the same masks from the same noise."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from tqdm import tqdm

from crfm_core import ConfigError
from crfm_core.data.rasters import IGNORE, read_label
from crfm_core.files import seed_of, write_json
from crfm_core.layout import Layout
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.metrics.confusion import OVERALL_SCORES, ConfusionMatrix
from crfm_core.sampling.correction import MEASUREMENTS
from crfm_core.sampling.sampler import OpenedSampler, as_uint8
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input
from crfm_core.settings import PLAIN, PRESETS, Comparison, Sampler
from crfm_core.text.encoders import PromptCache


def compare_corrections(
    sampler: OpenedSampler, judge: Critic, captions: Path, prompts: Path, comparison: Comparison, preset: str, out: Path
) -> None:
    """Sample the comparison's masks with one preset at each of its numbers of corrected steps, and write measurements as JSON.

    Args:
        sampler: opened with a critic; the comparison's settings replace its own.
        judge: a segmentor with ``logits`` like the critic; the critic guides, only the judge's verdict is evidence.
        captions: captioned manifest of the tiles whose masks are used, best ones that nothing was trained on.
        preset: a key of :data:`crfm_core.settings.PRESETS`, or "plain" for no correction at all.
        out: JSON with ``preset``, ``masks``, ``num_steps`` and per number of corrected steps one entry of ``forms``: ``steps``,
            ``seeds`` (per seed the scores in percent of critic and judge, and the critic's loss on the finished images),
            ``seconds_per_image`` of sampling, ``corrections`` per image, ``raised`` (share of the corrections after which the
            critic's loss was higher), ``gradient_ratio`` and ``clamp_ratio`` (means), ``by_step`` (means at each corrected step over
            the ``samples`` still corrected there) and ``notes`` with their counts.
    """
    if sampler.critic is None:
        raise ConfigError("the comparison of corrections needs a sampler with a critic; open one with a preset")
    if preset != PLAIN and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: must be one of {', '.join((PLAIN, *PRESETS))}")
    table = read_manifest(captions)
    table = table[(table.height == table.height[0]) & (table.width == table.width[0])].iloc[: comparison.masks]
    masks = np.stack([read_label(path) for path in paths_of(captions, table, "label", Layout.comparison.root(out))])
    embeds, pooled = PromptCache(prompts).take(list(table.prompt))
    forms = []
    for steps in [0] if preset == PLAIN else comparison.steps:
        correction = {} if preset == PLAIN else {"preset": preset, "rectify": {"steps": steps}}
        draw = replace(sampler, settings=Sampler(num_steps=comparison.num_steps, batch_size=comparison.batch_size, **correction))
        seconds, seeds, records = 0.0, [], []
        notes: Counter[str] = Counter()
        for seed in comparison.seeds:
            batches = []
            for start in tqdm(range(0, len(table), comparison.batch_size), desc=f"{preset}-{steps}, seed {seed}", disable=None):
                rows = slice(start, start + comparison.batch_size)
                noise = [torch.Generator().manual_seed(seed_of("comparison", tile, seed)) for tile in table.tile_id[rows]]
                begun = time.monotonic()
                drawn = draw(masks[rows], embeds[rows], pooled[rows], noise)
                seconds += time.monotonic() - begun
                batches.append((as_uint8(drawn.images), masks[rows]))
                records += drawn.records
                notes.update(note for note in drawn.notes if note)
            seeds.append({"seed": seed, **_scores(sampler.critic, judge, batches)})
        per_image = seconds / len(table) / len(comparison.seeds)
        forms.append({"steps": steps, "seeds": seeds, "seconds_per_image": per_image, "notes": dict(notes), **_summary_of(records)})
    write_json(out, {"preset": preset, "masks": len(table), "num_steps": comparison.num_steps, "forms": forms})


@torch.no_grad()
def _scores(critic: Critic, judge: Critic, batches: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """How critic and judge segment images, uint8 [B, H, W, 3], against the masks [B, H, W] they were made for."""
    scores: dict[str, Any] = {}
    losses: list[float] = []
    for who, model in {"critic": critic, "judge": judge}.items():
        matrix = ConfusionMatrix(len(model.classes))
        for images, masks in batches:
            logits = model.logits(as_input(images, next(model.parameters()).device)).cpu()
            matrix.update(logits.argmax(1).numpy(), masks)
            if who == "critic":
                labels = torch.from_numpy(masks).long()
                counted = (labels != IGNORE).sum((1, 2))
                sums = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none").sum((1, 2))
                losses += (sums / counted)[counted > 0].tolist()
        scores[who] = {name: matrix.scores()[name] for name in OVERALL_SCORES}
    return scores | {"critic_loss": mean(losses) if losses else None}


def _summary_of(records: list[list[dict]]) -> dict:
    """Means over all corrections, and over the samples at each step."""
    flat = pd.DataFrame([entry for record in records for entry in record])
    if flat.empty:
        return {"corrections": 0.0, "raised": None, "gradient_ratio": None, "clamp_ratio": None, "by_step": []}
    means = {name: (name, "mean") for name in MEASUREMENTS}
    by_step = flat.groupby("step").agg(sigma=("sigma", "first"), samples=("sigma", "size"), **means)
    return {
        "corrections": len(flat) / len(records),
        "raised": float((flat.loss_after > flat.loss_before).mean()),
        "gradient_ratio": float(flat.gradient_ratio.mean()),
        "clamp_ratio": float(flat.clamp_ratio.mean()),
        "by_step": by_step.reset_index().to_dict("records"),
    }
