"""Synthesis in shards: shard i of n samples every n-th of the same list of images, and no image depends on i, n or the order."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb, read_tags, write_raster
from crfm_core.files import exclusive, hash_of, inside, require_disk, seed_of, sha256_of
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.sampling.pipeline import open_generator
from crfm_core.segmentor.critic import load_critic
from crfm_core.settings import Sampler
from crfm_core.text.encoders import read_prompts


@dataclass(frozen=True)
class Task:
    """One image to sample: the row of the tile whose mask it is for, and which copy it is."""

    row: int
    copy: int


def tasks_of(tiles: int, copies: int, shard: int, shards: int) -> list[Task]:
    """The images of shard ``shard`` (1...``shards``) among all ``tiles`` x ``copies``."""
    if not 1 <= shard <= shards:
        raise DataError(f"shard {shard} of {shards}: shards count from 1 to {shards}")
    return [Task(row, copy) for copy in range(copies) for row in range(tiles)][shard - 1 :: shards]


def synthesise_shard(
    generator: Path,
    captions: Path,
    prompts: Path,
    critic: Path,
    sampler_name: str,
    sampler: Sampler,
    copies: int,
    shard: int,
    shards: int,
    seed: int,
    out: Path,
    device: str = "cpu",
) -> pd.DataFrame:
    """Sample one shard's images into the folder ``images`` beside ``out`` and write the shard's manifest ``out`` last.

    A sample's noise comes from hash(dataset, tile, sampler, copy, seed). Images that a stopped try left are kept if they were made by
    the same generator, critic and settings (their tags say so) and read without fault; the rest is sampled. Images of georeferenced
    masks are GeoTIFFs in the same place.

    Args:
        generator: MaskToImagePipeline folder.
        captions: captioned manifest of the tiles whose masks are used.
        critic: checkpoint that guides; loaded only when the sampler corrects.
        copies: images per mask.

    Returns: the manifest, one row per image, with ``corrections`` holding the measurements of every corrected step as JSON.
    """
    table = read_manifest(captions)
    root = Path(out).parents[3]  # results/{dataset}/synthetic/{control}/{sampler}/shard-...: the dataset's folder
    labels = paths_of(captions, table, "label", root)
    tasks = tasks_of(len(table), copies, shard, shards)
    settings = sampler.rectification
    weights = sha256_of(generator / "transformer", generator / "vae")
    guided_by = sha256_of(critic) if settings else None
    made_by = hash_of(weights, guided_by, sha256_of(prompts), sampler.model_dump(exclude={"batch_size"}), sampler_name, seed)
    folder = Path(out).parent / "images"
    require_disk(folder, len(tasks) * int(table.width.max() * table.height.max()) * 4)

    with exclusive(Path(out).parent / f".shard-{shard}-of-{shards}"):
        paths = {task: _image_path(folder, table.iloc[task.row], task.copy) for task in tasks}
        missing = [task for task in tasks if not _finished(paths[task], made_by)]
        print(f"{len(tasks)} images, {len(tasks) - len(missing)} of them already there", flush=True)
        if missing:
            pipeline = open_generator(generator)
            pipeline = pipeline.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
            pipeline.vae.to(memory_format=torch.channels_last)  # its convolutions take most of a correction
            guide = load_critic(critic, device) if settings else None
            cache = read_prompts(prompts)
            for batch in tqdm(_batches(missing, table, sampler.batch_size), desc="batches", disable=None):
                rows = [table.iloc[task.row] for task in batch]
                embeds, pooled = cache.take([row.prompt for row in rows])
                seeds = [_seed_of(row, sampler_name, task.copy, seed) for row, task in zip(rows, batch, strict=True)]
                output = pipeline(
                    np.stack([read_label(labels[task.row]) for task in batch]),
                    prompt_embeds=embeds,
                    pooled_prompt_embeds=pooled,
                    critic=guide,
                    rectify=settings,
                    num_inference_steps=sampler.num_steps,
                    generator=[torch.Generator().manual_seed(value) for value in seeds],
                    output_type="np",
                    progress=False,
                )
                images = (output.images * 255).round().astype(np.uint8)
                for task, row, image, value, record in zip(batch, rows, images, seeds, output.records, strict=True):
                    tags = {
                        "made_by": made_by,
                        "generator": weights[:12],
                        "seed": value,
                        "sampler": sampler_name,
                        "prompt": row.caption,
                        "mask_of": row.tile_id,
                        "corrections": json.dumps(record),
                    }
                    write_raster(paths[task], image, row.crs or None, list(row["transform"]), tags)
        return write_manifest(out, [_row(table.iloc[task.row], task, paths[task], labels[task.row], sampler_name, out) for task in tasks])


def _seed_of(row: pd.Series, sampler_name: str, copy: int, seed: int) -> int:
    return seed_of(row.dataset, row.tile_id, sampler_name, copy, seed)


def _batches(tasks: list[Task], table: pd.DataFrame, size: int) -> list[list[Task]]:
    """Batches of tiles of one size, in the order of the tasks."""
    shapes = list(zip(table.height, table.width, strict=True))
    batches: list[list[Task]] = []
    for task in tasks:
        if batches and len(batches[-1]) < size and shapes[task.row] == shapes[batches[-1][0].row]:
            batches[-1].append(task)
        else:
            batches.append([task])
    return batches


def _image_path(folder: Path, row: pd.Series, copy: int) -> Path:
    return inside(folder, f"{row.tile_id}-{copy}{Path(row.image).suffix}")


def _finished(path: Path, made_by: str) -> bool:
    """Whether an earlier try left this image whole: made by the same models and settings, and readable to its last pixel."""
    try:
        return read_tags(path).get("made_by") == made_by and read_rgb(path) is not None
    except DataError:
        return False


def _row(row: pd.Series, task: Task, image: Path, label: Path, sampler_name: str, out: Path) -> dict:
    """The manifest row of a finished image, from its mask's row and what its own tags say."""
    tags = read_tags(image)
    corrections = json.loads(tags["corrections"])
    return {
        **row.to_dict(),
        "tile_id": f"{row.tile_id}-{sampler_name}-{task.copy}",
        "image": os.path.relpath(image, Path(out).resolve().parent),
        "label": os.path.relpath(label, Path(out).resolve().parent),
        "digest": sha256_of(image, label),
        "source": "synthetic",
        "mask_of": row.tile_id,
        "copy": task.copy,
        "seed": int(tags["seed"]),
        "sampler": sampler_name,
        "generator": tags["generator"],
        "critic_loss_before": corrections[0]["loss_before"] if corrections else float("nan"),
        "critic_loss_after": corrections[-1]["loss_after"] if corrections else float("nan"),
        "corrections": tags["corrections"],
    }
