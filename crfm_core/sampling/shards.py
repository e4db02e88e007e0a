"""Synthesis in shards: shard i of n samples every n-th of the same list of batches, and no image depends on i, n or the order."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from crfm_core import DataError, ResourceError
from crfm_core.data.rasters import read_label, read_rgb, read_tags, write_raster
from crfm_core.files import atomic_path, exclusive, hash_of, inside, require_disk, seed_of, sha256_of
from crfm_core.layout import Layout
from crfm_core.manifest import paths_of, read_manifest, spread, write_manifest
from crfm_core.sampling.pipeline import open_decoder, open_generator
from crfm_core.segmentor.critic import load_critic
from crfm_core.settings import Sampler
from crfm_core.text.encoders import NO_PROMPT, PromptCache, read_prompts

#: Columns that synthesis adds to those of the captioned tiles.
SYNTHETIC_COLUMNS = (
    "source", "mask_of", "copy", "seed", "sampler", "generator", "critic_loss_before", "critic_loss_after", "corrections", "note",
)  # fmt: skip

WRITERS = 2  #: threads that encode and write images


@dataclass(frozen=True)
class Task:
    """One image to sample: the row of the tile whose mask it is for, and which copy it is."""

    row: int
    copy: int


@dataclass
class Timing:
    """Where the seconds of a shard went, by the clock of the thread that samples; reading and writing go on beside it."""

    loading: float = 0.0  # with the hashes of the weights and a look at what is there
    sampling: float = 0.0
    waiting_for_input: float = 0.0
    waiting_for_output: float = 0.0
    images: int = 0

    def __str__(self) -> str:
        working = self.sampling + self.waiting_for_input + self.waiting_for_output
        return (
            f"{self.images} images sampled: loading {self.loading:.2f} s, sampling {self.sampling:.2f} s, "
            f"waiting for input {self.waiting_for_input:.2f} s, waiting for output {self.waiting_for_output:.2f} s; "
            f"{self.images / working:.2f} images per second"
        )


def batches_of(sizes: Sequence[tuple[int, int]], copies: int, batch_size: int, shard: int = 1, shards: int = 1) -> list[list[Task]]:
    """The batches of shard ``shard`` (1...``shards``): every ``shards``-th of those that all images are cut into.

    A batch holds up to ``batch_size`` images of one size, in the order of copies and tiles. The batches follow from the first three
    arguments alone, so that an image always has the same batch-mates, whose number and places change its rounding.

    Args:
        sizes: (height, width) of each tile.
        copies: images per tile.
    """
    if not 1 <= shard <= shards:
        raise DataError(f"shard {shard} of {shards}: shards count from 1 to {shards}")
    groups: dict[tuple[int, int], list[Task]] = {}
    for copy in range(copies):
        for row, size in enumerate(sizes):
            groups.setdefault(size, []).append(Task(row, copy))
    batches = [group[first : first + batch_size] for group in groups.values() for first in range(0, len(group), batch_size)]
    return batches[shard - 1 :: shards]


def synthesise_shard(
    generator: Path,
    captions: Path,
    prompts: Path,
    critic: Path | None,
    classes: Sequence[str],
    sampler_name: str,
    sampler: Sampler,
    copies: int,
    shard: int,
    shards: int,
    seed: int,
    out: Path,
    device: str = "cpu",
) -> pd.DataFrame:
    """Sample one shard's images into folders of the folder ``images`` beside ``out`` and write the shard's manifest ``out`` last.

    A sample's noise comes from hash(dataset, tile, sampler, copy, seed). Images that a stopped try left are kept if they were made by
    the same generator, critic and settings (their tags say so) and read without fault; a batch that lacks any is sampled again, and
    what it lacks is written. Settings that change nothing but an image's rounding (``sampler.performance_keys()``) do not count; the batch
    size does where the correction divides by it (``rectify.reduction: mean``). Images of georeferenced masks are GeoTIFFs in the
    same place.

    Args:
        generator: MaskToImagePipeline folder.
        captions: captioned manifest of the tiles whose masks are used.
        prompts: cache of their prompts' embeddings, and of the empty prompt's for a sampler with guidance.
        critic: checkpoint or model folder that guides, when the sampler corrects.
        classes: the dataset's, which must be the critic's.
        copies: images per mask.

    Returns: the manifest, one row per image, with ``corrections`` holding the measurements of every corrected step as JSON and
        ``note`` what is to be known of the sample, "" for nothing. It has no rows when there are fewer batches than shards.
    Raises: DataError, WeightsError or ResourceError naming the file that could not be read, used or written.
    """
    timing, started = Timing(), time.perf_counter()
    table = read_manifest(captions)
    root = Layout.shard.root(out)
    batches = batches_of(list(zip(table.height, table.width, strict=True)), copies, sampler.batch_size, shard, shards)
    tasks = [task for batch in batches for task in batch]
    masks = sorted({task.row for task in tasks})  # of all tiles a shard among many needs few, and every path is looked at
    labels = dict(zip(masks, paths_of(captions, table.iloc[masks], "label", root), strict=True))
    weights = sha256_of(generator / "transformer", generator / "vae")
    made_by = hash_of(weights, _settings_of(sampler, critic), sha256_of(prompts), sampler_name, seed)
    folder = Path(out).parent / "images"
    require_disk(folder, len(tasks) * int(table.width.max() * table.height.max()) * 4)

    with exclusive(Path(out).parent / f".shard-{shard}-of-{shards}") as held:
        paths = {task: _image_path(folder, table.iloc[task.row], task.copy) for task in tasks}
        if (held / "begun").exists():  # by an earlier try; looking through the images of all shards takes a while
            _remove_fragments(folder, {path.name for path in paths.values()})
        (held / "begun").touch()
        missing = {task for task in tasks if not _finished(paths[task], made_by)}
        print(f"{len(tasks)} images, {len(tasks) - len(missing)} of them already there", flush=True)
        if missing:
            sample = _open_sampler(generator, critic, classes, sampler, prompts, device)
            cache = read_prompts(prompts)

            def read(batch: list[Task]) -> dict[str, Any]:
                return _inputs_of(batch, table, labels, cache, sampler_name, seed)

            def write(task: Task, image: np.ndarray, record: list[dict], note: str) -> None:
                row = table.iloc[task.row]
                tags = {
                    "made_by": made_by,
                    "generator": weights[:12],
                    "seed": _seed_of(row, sampler_name, task.copy, seed),
                    "sampler": sampler_name,
                    "prompt": row.caption,
                    "mask_of": row.tile_id,
                    "corrections": json.dumps(record),
                } | ({"note": note} if note else {})
                try:
                    write_raster(paths[task], (image * 255).round().astype(np.uint8), row.crs or None, list(row["transform"]), tags)
                except OSError as error:
                    raise ResourceError(f"{paths[task]}: could not be written ({error}); see that the disk has room") from None

            timing.loading = time.perf_counter() - started
            _sample_all([batch for batch in batches if missing.intersection(batch)], missing, read, sample, write, timing)
            print(timing, flush=True)
        rows = [_row(table.iloc[task.row], task, paths[task], labels[task.row], sampler_name, out) for task in tasks]
        for note, count in Counter(row["note"] for row in rows if row["note"]).most_common():
            print(f"{count} of {len(rows)} samples: {note}", flush=True)
        return write_manifest(out, rows) if rows else _write_empty_manifest(out, table)


def _settings_of(sampler: Sampler, critic: Path | None) -> dict:
    """What of a sampler its images depend on, with the files it names by their contents."""
    correction = sampler.rectification
    settings = {key: value for key, value in sampler.result_keys().items() if key not in ("preset", "rectify", "critic_decoder")}
    if correction:
        settings["rectify"] = asdict(correction)
        settings["guided_by"] = [sha256_of(path) for path in (critic, sampler.critic_decoder) if path]
    return settings


def _open_sampler(
    generator: Path, critic: Path | None, classes: Sequence[str], sampler: Sampler, prompts: Path, device: str
) -> Callable[..., Any]:
    """The pipeline with all that is the same for every batch; takes what :func:`_inputs_of` gives, and a callback."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    arguments: dict[str, Any] = {"guidance_scale": sampler.guidance_scale, "pad": sampler.pad, "num_inference_steps": sampler.num_steps}
    if sampler.rectification:
        # Before the generator, which takes longer to load: the critic may be one for other classes.
        arguments |= {"rectify": sampler.rectification, "critic": load_critic(critic, device, classes)}
    if sampler.critic_decoder:
        arguments["critic_decoder"] = open_decoder(Path(sampler.critic_decoder)).to(device, dtype)
    if sampler.guidance_scale > 1:
        empty = read_prompts(prompts).take([NO_PROMPT])
        arguments |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), empty, strict=True))
    pipeline = open_generator(generator).to(device, dtype)
    if sampler.compile:
        pipeline.compile_networks(sampler.compile)
    return lambda **inputs: pipeline(**arguments, **inputs, output_type="np", progress=False)


def _inputs_of(
    batch: list[Task], table: pd.DataFrame, labels: Mapping[int, Path], cache: PromptCache, sampler_name: str, seed: int
) -> dict[str, np.ndarray | Tensor | list[torch.Generator]]:
    """Masks, embeddings and noise generators of a batch, as the pipeline takes them."""
    rows = [table.iloc[task.row] for task in batch]
    embeds, pooled = cache.take([row.prompt for row in rows])
    seeds = [_seed_of(row, sampler_name, task.copy, seed) for row, task in zip(rows, batch, strict=True)]
    return {
        "masks": np.stack([read_label(labels[task.row]) for task in batch]),
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "generator": [torch.Generator().manual_seed(value) for value in seeds],
    }


def _sample_all(
    batches: list[list[Task]],
    missing: set[Task],
    read: Callable[[list[Task]], dict[str, Any]],
    sample: Callable[..., Any],
    write: Callable[[Task, np.ndarray, list[dict], str], None],
    timing: Timing,
) -> None:
    """Sample the batches while the next one is read and the one before is written; more than that is never held in memory.

    A fault in a thread is raised here: in reading when the batch's turn comes, in writing after the sampling step that is under way.
    """
    writes: deque[list[Future]] = deque()

    def check(*_: object) -> None:
        _settle(future for futures in writes for future in futures if future.done())

    with ThreadPoolExecutor(1, "reading") as reader, ThreadPoolExecutor(WRITERS, "writing") as writers:
        ahead = reader.submit(read, batches[0])
        for batch, following in tqdm(list(zip(batches, [*batches[1:], None], strict=True)), desc="batches", disable=None):
            started = time.perf_counter()
            inputs = ahead.result()
            if following:
                ahead = reader.submit(read, following)
            begun = time.perf_counter()
            output = sample(**inputs, callback_on_step_end=check)
            ended = time.perf_counter()
            drawn = zip(batch, output.images, output.records, output.notes, strict=True)
            writes.append([writers.submit(write, *one) for one in drawn if one[0] in missing])
            while len(writes) > (1 if following else 0):
                _settle(writes[0])
                writes.popleft()
            timing.images += len(batch)
            timing.waiting_for_input += begun - started
            timing.sampling += ended - begun
            timing.waiting_for_output += time.perf_counter() - ended


def _settle(futures: Iterable[Future]) -> None:
    for future in futures:
        future.result()


def _remove_fragments(folder: Path, names: set[str]) -> None:
    """Remove what killed tries had begun to write of these files; they are this shard's, which is held by this process alone."""
    for fragment in folder.glob("*/.*"):
        if fragment.name[1:].rpartition(".")[0] in names:
            shutil.rmtree(fragment, ignore_errors=True)


def _seed_of(row: pd.Series, sampler_name: str, copy: int, seed: int) -> int:
    return seed_of(row.dataset, row.tile_id, sampler_name, copy, seed)


def _image_path(folder: Path, row: pd.Series, copy: int) -> Path:
    return inside(folder, spread(f"{row.tile_id}-{copy}{Path(row.image).suffix}"))


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
    losses = (corrections[0]["loss_before"], corrections[-1]["loss_after"]) if corrections else (None, None)
    before, after = (float("nan") if loss is None else loss for loss in losses)  # None: not measured
    added = ("synthetic", row.tile_id, task.copy, int(tags["seed"]), sampler_name, tags["generator"])
    added += (before, after, tags["corrections"], tags.get("note", ""))
    return {
        **row.drop("image_digest", errors="ignore").to_dict(),
        "tile_id": f"{row.tile_id}-{sampler_name}-{task.copy}",
        "image": os.path.relpath(image, Path(out).resolve().parent),
        "label": os.path.relpath(label, Path(out).resolve().parent),
        "digest": sha256_of(image, label),
        **dict(zip(SYNTHETIC_COLUMNS, added, strict=True)),
    }


def _write_empty_manifest(out: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The manifest of a shard without images; :func:`crfm_core.manifest.write_manifest` takes that for a fault."""
    empty = table.iloc[:0].assign(**dict.fromkeys(SYNTHETIC_COLUMNS))
    with atomic_path(out) as aside:
        empty.to_parquet(aside, index=False)
    return empty
