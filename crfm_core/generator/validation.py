"""What a generator, finished or in training, makes of masks it was not trained on: pictures, and its loss with and without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from crfm_core.data.rasters import paint, read_label, read_rgb, write_raster
from crfm_core.devices import compute_dtype
from crfm_core.files import seed_of, write_json
from crfm_core.generator.objective import losses_by_level
from crfm_core.generator.resuming import read_checkpoint
from crfm_core.generator.weights import finished_pipeline
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.models.latent_space import encode_images, mask_latents
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import Control
from crfm_core.text.encoders import PromptCache

#: Tiles whose masks are sampled.
TILES = 8


def open_checkpoint(checkpoint: Path, base: Path, control: Control, num_classes: int) -> MaskToImagePipeline:
    """The pipeline that training would save if it ended at this checkpoint, without text encoders."""
    state = read_checkpoint(checkpoint)
    chosen = state["best"]["weights"] if state.get("best") else {}
    return finished_pipeline(base, control, num_classes, chosen or (state["ema"] or state)["model"])


@torch.no_grad()
def sample_validation(
    pipeline: MaskToImagePipeline,
    captions: Path,
    prompts: Path,
    root: Path,
    palette: Sequence[tuple[int, int, int]],
    picture: Path,
    losses: Path,
    num_steps: int = 23,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Sample a fixed set of masks and write a picture (a row per mask: mask, real tile, sample) and a JSON file of losses.

    The tiles and their noise follow from ``seed`` alone, so generators and checkpoints can be laid side by side. The losses are the
    flow-matching loss (:func:`crfm_core.generator.objective.flow_losses`) on these tiles at evenly spread training noise levels: with
    the masks, and by the same network with the masks left out. A useful mask lowers the loss.

    Args:
        captions: captioned manifest of tiles that nothing trained on.
        root: folder that the manifest's paths must stay in.
        palette: a colour per class.
    """
    table = read_manifest(captions)
    chosen = sorted(range(len(table)), key=lambda row: seed_of("validation", seed, table.tile_id.iloc[row]))[:TILES]
    table = table.iloc[chosen]
    images = np.stack([read_rgb(path) for path in paths_of(captions, table, "image", root)])
    labels = np.stack([read_label(path) for path in paths_of(captions, table, "label", root)])
    embeds, pooled = PromptCache(prompts).take(list(table.prompt))
    dtype = compute_dtype(device)
    pipeline = pipeline.to(device, dtype)

    drawn = [
        pipeline(
            labels[[index]],
            prompt_embeds=embeds[[index]],
            pooled_prompt_embeds=pooled[[index]],
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(seed_of("validation", seed, tile)),
            output_type="np",
            progress=False,
            return_dict=False,
        )[0][0]
        for index, tile in enumerate(table.tile_id)
    ]
    rows = [
        np.concatenate([paint(label, palette), image, (sample * 255).round().astype(np.uint8)], axis=1)
        for label, image, sample in zip(labels, images, drawn, strict=True)
    ]
    write_raster(picture, np.concatenate(rows))

    config = pipeline.config
    clean = encode_images((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).to(device), pipeline.vae)
    mask = mask_latents(torch.from_numpy(labels).long().to(device), pipeline.vae, config.num_classes, config.mask_code)
    inputs = clean, embeds, pooled
    with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
        with_mask, without = (
            list(losses_by_level(pipeline.transformer, *inputs, one, pipeline.scheduler.config.shift, device, seed)) for one in (mask, None)
        )
    found = [
        {"sigma": sigma, "loss": loss, "loss_mask_ignored": ignored} for (sigma, loss), (_, ignored) in zip(with_mask, without, strict=True)
    ]
    means = {key: float(np.mean([entry[key] for entry in found])) for key in ("loss", "loss_mask_ignored")}
    write_json(losses, means | {"by_sigma": found, "tiles": list(table.tile_id)})
