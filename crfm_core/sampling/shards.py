"""Synthesis in shards: shard i of n samples every n-th of the same list of batches, so that no image depends on i, n or the order."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from crfm_core import DataError, ResourceError
from crfm_core.data.rasters import read_label, read_rgb, read_tags, write_raster
from crfm_core.files import atomic_path, exclusive, hash_of, inside, require_disk, seed_of, sha256_of
from crfm_core.layout import Layout
from crfm_core.manifest import in_subfolder, paths_of, write_manifest
from crfm_core.sampling.gathering import masks_to_draw
from crfm_core.sampling.sampler import SamplerSpec, as_uint8
from crfm_core.text.encoders import NO_PROMPT, PromptCache

#: Columns that synthesis adds to those of the captioned tiles.
SYNTHETIC_COLUMNS = (
    "source", "mask_of", "copy", "seed", "sampler", "generator", "critic_loss_before", "critic_loss_after", "corrections", "note",
)  # fmt: skip

WRITERS = 2  #: threads that encode and write images


@dataclass(frozen=True)
class Sample:
    """One image to draw: the row of the tile whose mask it is for, and which copy it is."""

    row: int
    copy: int


def batches_of(sizes: Sequence[tuple[int, int]], copies: int, batch_size: int, shard: int = 1, shards: int = 1) -> list[list[Sample]]:
    """The batches of shard ``shard`` (1...``shards``): every ``shards``-th of the batches of all images.

    A batch holds up to ``batch_size`` images of one size, in the order of copies and tiles. The batches follow from the first three
    arguments alone, so that an image always has the same batch-mates, whose number and places change its rounding.

    Args:
        sizes: (height, width) of each tile.
        copies: images per tile.
    """
    if not 1 <= shard <= shards:
        raise DataError(f"shard {shard} of {shards}: shards count from 1 to {shards}")
    groups: dict[tuple[int, int], list[Sample]] = {}
    for copy in range(copies):
        for row, size in enumerate(sizes):
            groups.setdefault(size, []).append(Sample(row, copy))
    batches = [group[first : first + batch_size] for group in groups.values() for first in range(0, len(group), batch_size)]
    return batches[shard - 1 :: shards]


def synthesise_shard(
    sampler: SamplerSpec, captions: Path, prompts: Path, copies: int, seed: int, out: Path, shard: int = 1, shards: int = 1
) -> pd.DataFrame:
    """Sample one shard's images into folders of the folder ``images`` beside ``out`` and write the shard's manifest ``out`` last.

    A sample's noise comes from hash(dataset, tile, sampler, copy, seed). Images of a stopped try are kept if they were made by the same
    generator, critic and settings (their tags say so) and can be read; a batch that lacks any is sampled again, and only the missing
    ones are written. Settings that change nothing but an image's rounding (``Sampler.performance_keys()``) do not count; the batch size
    does where the correction divides by it (``rectify.reduction: mean``). Images of georeferenced masks are GeoTIFFs in the same place.
    Each of new layouts (:func:`crfm_core.sampling.gathering.masks_to_draw`) is drawn once.

    Args:
        captions: captioned manifest of the tiles whose masks are used.
        prompts: cache of their prompts' embeddings, and of the empty prompt's for a sampler with guidance.
        copies: images per mask.
        seed: the run's; part of every sample's.

    Returns: the manifest, one row per image, with ``corrections`` holding the measurements of every corrected step as JSON and
        ``note`` what is to be known of the sample, "" for nothing. It has no rows when there are fewer batches than shards.
    Raises: DataError, WeightsError or ResourceError naming the file that could not be read, used or written.
    """
    started = time.perf_counter()
    table = masks_to_draw(captions, copies)
    root, new = Layout.shard.root(out), "layouts" in table
    sizes = list(zip(table.height, table.width, strict=True))
    batches = batches_of(sizes, 1 if new else copies, sampler.settings.batch_size, shard, shards)
    if new:
        batches = [[Sample(sample.row, int(table["copy"].iloc[sample.row])) for sample in batch] for batch in batches]
    samples = [sample for batch in batches for sample in batch]
    masks = sorted({sample.row for sample in samples})  # of all tiles a shard among many needs few, and every path is checked
    labels = dict(zip(masks, paths_of(captions, table.iloc[masks], "label", root), strict=True))
    weights = sampler.weights_digest()
    made_by = hash_of(weights, sampler.dependencies(), sha256_of(prompts), sampler.name, seed)

    def made_from(sample: Sample) -> str:
        """What an image depends on; other masks may be drawn under the name of a layout."""
        return hash_of(made_by, table.digest.iloc[sample.row]) if new else made_by

    folder = Path(out).parent / "images"
    require_disk(folder, len(samples) * int(table.width.max() * table.height.max()) * 4)

    with exclusive(Path(out).parent / f".shard-{shard}-of-{shards}") as held:
        paths = {}
        for sample in samples:
            row = table.iloc[sample.row]
            paths[sample] = inside(folder, in_subfolder(f"{row.tile_id}-{sample.copy}{Path(row.image).suffix}"))
        if (held / "begun").exists():  # by an earlier try; looking through the images of all shards takes a while
            _remove_fragments(folder, {path.name for path in paths.values()})
        (held / "begun").touch()
        missing = {sample for sample in samples if not _finished(paths[sample], made_from(sample))}
        print(f"{len(samples)} images, {len(samples) - len(missing)} of them already there", flush=True)
        if missing:
            cache = PromptCache(prompts)
            draw = sampler.open(cache.take([NO_PROMPT]) if sampler.settings.guidance_scale > 1 else None)

            def seed_of_sample(sample: Sample) -> int:
                row = table.iloc[sample.row]
                return seed_of(row.dataset, row.tile_id, sampler.name, sample.copy, seed)

            def read(batch: list[Sample]) -> dict[str, Any]:
                embeds, pooled = cache.take([table.prompt.iloc[sample.row] for sample in batch])
                return {
                    "masks": np.stack([read_label(labels[sample.row]) for sample in batch]),
                    "embeds": embeds,
                    "pooled": pooled,
                    "generator": [torch.Generator().manual_seed(seed_of_sample(sample)) for sample in batch],
                }

            def write(sample: Sample, image: np.ndarray, record: list[dict], note: str) -> None:
                row = table.iloc[sample.row]
                tags = {
                    "made_by": made_from(sample),
                    "generator": weights[:12],
                    "seed": seed_of_sample(sample),
                    "sampler": sampler.name,
                    "prompt": row.caption,
                    "mask_of": row.tile_id,
                    "corrections": json.dumps(record),
                } | ({"note": note} if note else {})
                try:
                    crs = row.crs if paths[sample].suffix == ".tif" else None  # a PNG has no room for it
                    write_raster(paths[sample], as_uint8(image), crs or None, list(row["transform"]), tags)
                except OSError as error:
                    raise ResourceError(f"{paths[sample]}: could not be written ({error}); see that the disk has room") from None

            lacking = [batch for batch in batches if missing.intersection(batch)]
            loading, images = time.perf_counter() - started, sum(map(len, lacking))
            working = _sample_all(lacking, missing, read, draw, write)
            seconds = ", ".join(f"{name} {value:.2f} s" for name, value in {"loading": loading, **working}.items())
            print(f"{images} images sampled: {seconds}; {images / sum(working.values()):.2f} images per second", flush=True)
        rows = [_row(table.iloc[sample.row], sample, paths[sample], labels[sample.row], sampler.name, out) for sample in samples]
        for note, count in Counter(row["note"] for row in rows if row["note"]).most_common():
            print(f"{count} of {len(rows)} samples: {note}", flush=True)
        if rows:
            return write_manifest(out, rows)
        empty = table.iloc[:0].assign(**dict.fromkeys(SYNTHETIC_COLUMNS))  # which write_manifest refuses
        with atomic_path(out) as unfinished:
            empty.to_parquet(unfinished, index=False)
        return empty


def _sample_all(
    batches: list[list[Sample]],
    missing: set[Sample],
    read: Callable[[list[Sample]], dict[str, Any]],
    draw: Callable[..., Any],
    write: Callable[[Sample, np.ndarray, list[dict], str], None],
) -> dict[str, float]:
    """Sample the batches while the next one is read and the one before is written; no more than these three are held in memory.

    An error in a thread is raised here: in reading when the batch's turn comes, in writing after the current sampling step.

    Returns: the seconds of this thread, which samples, by what it did.
    """
    writes: deque[list[Future]] = deque()
    seconds = {"sampling": 0.0, "waiting for input": 0.0, "waiting for output": 0.0}

    def check(*_: object) -> None:
        for future in chain.from_iterable(writes):
            if future.done():
                future.result()

    with ThreadPoolExecutor(1, "reading") as reader, ThreadPoolExecutor(WRITERS, "writing") as writers:
        ahead = reader.submit(read, batches[0])
        for batch, following in tqdm(list(zip(batches, [*batches[1:], None], strict=True)), desc="batches", disable=None):
            started = time.perf_counter()
            inputs = ahead.result()
            if following:
                ahead = reader.submit(read, following)
            begun = time.perf_counter()
            output = draw(**inputs, callback_on_step_end=check)
            ended = time.perf_counter()
            drawn = zip(batch, output.images, output.records, output.notes, strict=True)
            writes.append([writers.submit(write, *one) for one in drawn if one[0] in missing])
            while len(writes) > (1 if following else 0):
                for future in writes[0]:
                    future.result()
                writes.popleft()
            seconds["waiting for input"] += begun - started
            seconds["sampling"] += ended - begun
            seconds["waiting for output"] += time.perf_counter() - ended
    return seconds


def _remove_fragments(folder: Path, names: set[str]) -> None:
    """Remove what killed tries had begun to write of these files, which belong to this shard and so to this process alone."""
    for fragment in folder.glob("*/.*"):
        if fragment.name[1:].rpartition(".")[0] in names:
            shutil.rmtree(fragment, ignore_errors=True)


def _finished(path: Path, made_by: str) -> bool:
    """Whether an earlier try finished this image: made by the same models and settings, and readable to its last pixel."""
    try:
        return read_tags(path).get("made_by") == made_by and read_rgb(path) is not None
    except DataError:
        return False


def _row(row: pd.Series, sample: Sample, image: Path, label: Path, sampler_name: str, out: Path) -> dict:
    """The manifest row of a finished image, from its mask's row and what its own tags say."""
    tags = read_tags(image)
    corrections = json.loads(tags["corrections"])
    losses = (corrections[0]["loss_before"], corrections[-1]["loss_after"]) if corrections else (None, None)
    before, after = (float("nan") if loss is None else loss for loss in losses)  # None: not measured
    added = (
        "synthetic", row.tile_id, sample.copy, int(tags["seed"]), sampler_name, tags["generator"], before, after, tags["corrections"],
        tags.get("note", ""),
    )  # fmt: skip
    of_tile = row.rename({"mask_of": "layout_of"})  # of a new layout: the tile that it was made from
    return {
        **of_tile.drop("image_digest", errors="ignore").to_dict(),
        "tile_id": f"{row.tile_id}-{sampler_name}-{sample.copy}",
        "image": os.path.relpath(image, Path(out).resolve().parent),
        "label": os.path.relpath(label, Path(out).resolve().parent),
        "digest": sha256_of(image, label),
        **dict(zip(SYNTHETIC_COLUMNS, added, strict=True)),
    }
