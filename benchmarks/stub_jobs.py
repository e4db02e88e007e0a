"""What stands in for the jobs of the workflow in scale.py: outputs of the real form and number, without pixels and without networks.

    run(rule, snakemake)    # the whole of a script in the copy of the workflow that scale.py makes

Manifests have the columns, types and lengths of real ones. The images and labels that they name are empty. No job needs torch.
However many jobs the engine runs at once, no more than :data:`AT_ONCE` of them work; the others wait.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TILES = int(os.environ.get("SCALE_TILES", "62752"))  #: of the training split
SIDE = 512
AT_ONCE = 2


def run(rule: str, snakemake: Any) -> None:
    """Make what the rule's job would."""
    with open(f".slot-{os.getpid() % AT_ONCE}", "w") as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        {
            "tile_scenes": _tile_scenes,
            "caption_tiles": _caption_tiles,
            "synthesise_shard": _synthesise_shard,
            "filter_tiles": _filter_tiles,
        }.get(rule, _anything)(snakemake)


def _anything(snakemake: Any) -> None:
    """Outputs without content; class losses, which a real job reads, as they are written."""
    for path in map(Path, snakemake.output):
        if path.suffix:
            classes = snakemake.params.get("classes") or []
            path.write_text(json.dumps({"losses": [1.0 + index for index in range(len(classes))]}))
        else:
            path.mkdir(parents=True, exist_ok=True)


def _make_files(manifest: Path, paths: Iterable[str]) -> None:
    """Empty files where a manifest names some, each folder's as links to one: hundreds of thousands are made in seconds."""
    first: dict[Path, Path] = {}
    for path in paths:
        place = manifest.parent / path
        if place.parent in first:
            os.link(first[place.parent], place)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
            first[place.parent] = place


def _tile_scenes(snakemake: Any) -> None:
    import numpy as np
    import pandas as pd

    from crfm_core.manifest import write_manifest

    split, out, classes = snakemake.wildcards.split, Path(snakemake.output.manifest), len(snakemake.params.dataset["classes"])
    rng = np.random.default_rng(0)
    tiles = TILES if split == "train" else max(1, TILES // 4)
    shares = rng.random((tiles, classes)) * (rng.random((tiles, classes)) < 0.3)
    shares[:, 0] += 0.1
    pixels = (shares / shares.sum(axis=1, keepdims=True) * SIDE * SIDE).astype(int)
    scenes = [f"{split}{index % 5}_{index}" for index in range(tiles)]
    digests = [rng.bytes(32).hex() for _ in range(2 * tiles)]
    table = pd.DataFrame({
        "tile_id": [f"{scene}_0_0" for scene in scenes], "dataset": snakemake.wildcards.dataset, "split": split, "scene": scenes,
        "row": 0, "col": 0, "width": SIDE, "height": SIDE,
        **{kind: [f"{split}/{kind}s/{scene}_0_0.png" for scene in scenes] for kind in ("image", "label")},
        "crs": "", "transform": [[] for _ in scenes], "classes": [np.flatnonzero(row).tolist() for row in pixels],
        "pixels": pixels.tolist(), "digest": digests[:tiles], "inner_width": SIDE, "inner_height": SIDE,
        "scene_width": SIDE, "scene_height": SIDE, "image_digest": digests[tiles:], "uniform": False,
        "licence": "not stated by the data's authors", "given_caption": "",
    })  # fmt: skip
    _make_files(out, [*table.image, *table.label])
    write_manifest(out, table)


def _caption_tiles(snakemake: Any) -> None:
    from crfm_core.curation.selection import relocate_rows
    from crfm_core.files import hash_of
    from crfm_core.manifest import read_manifest, write_manifest

    names, tiles, out = snakemake.params.dataset["classes"], snakemake.input.tiles, snakemake.output.manifest
    table = relocate_rows(read_manifest(tiles), tiles, out)
    table["caption"] = [f"a satellite image of {', '.join(names[index] for index in present)}" for present in table.classes]
    table["prompt"] = [hash_of(caption)[:16] for caption in table.caption]
    write_manifest(out, table)


def _synthesise_shard(snakemake: Any) -> None:
    """The first job of a sampler makes the manifests of all its shards, which takes a while; each job then hands over its own."""
    out = Path(snakemake.output.manifest)
    made = out.parent / ".made"
    made.mkdir(exist_ok=True)
    with open(made / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / out.name).exists():
            _make_shards(snakemake, made)
    (made / out.name).rename(out)


def _make_shards(snakemake: Any, made: Path) -> None:
    import numpy as np

    from crfm_core.manifest import in_subfolder, read_manifest, relocate, write_manifest

    params, sampler, shards = snakemake.params, snakemake.wildcards.sampler, int(snakemake.wildcards.shards)
    out, captions = Path(snakemake.output.manifest), snakemake.input.captions
    table = read_manifest(captions).drop(columns="image_digest")
    table["label"] = [relocate(path, captions, out) for path in table.label]
    batch_size = {**params.sampler, **params.performance}["batch_size"]
    everything, keys = np.arange(params.copies * len(table)), ("sigma", "step_size", "loss_before", "loss_after", "agreement")
    for shard in range(shards):
        number = everything[everything // batch_size % shards == shard]
        copies, rows, rng = number // len(table), table.iloc[number % len(table)], np.random.default_rng(shard)
        names = [f"{tile_id}-{copy}" for tile_id, copy in zip(rows.tile_id, copies, strict=True)]
        losses = rng.random((len(rows), 4, len(keys)))
        records = [
            [
                {"step": step, **dict(zip(keys, values, strict=True)), "gradient_ratio": 0.3, "clamp_ratio": None}
                for step, values in enumerate(steps)
            ]
            for steps in losses.tolist()
        ]
        rows = rows.assign(
            tile_id=[f"{tile_id}-{sampler}-{copy}" for tile_id, copy in zip(rows.tile_id, copies, strict=True)],
            image=[f"images/{in_subfolder(name + '.png')}" for name in names], digest=[rng.bytes(32).hex() for _ in names],
            source="synthetic", mask_of=rows.tile_id, copy=copies, seed=rng.integers(1 << 62, size=len(rows)), sampler=sampler,
            generator="0" * 12, critic_loss_before=losses[:, 0, 2], critic_loss_after=losses[:, -1, 3],
            corrections=[json.dumps(record if params.sampler.get("preset") else []) for record in records], note="",
        )  # fmt: skip
        _make_files(out, rows.image)
        write_manifest(made / f"shard-{shard + 1}-of-{shards}.parquet", rows)


def _filter_tiles(snakemake: Any) -> None:
    from crfm_core.curation.selection import relocate_rows
    from crfm_core.manifest import in_subfolder, read_manifest, write_manifest

    manifest, out = snakemake.input.synthetic, Path(snakemake.output.manifest)
    table = relocate_rows(read_manifest(manifest), manifest, out)
    table["kept"] = 0.9
    table["label"] = [f"{out.stem}/labels/{in_subfolder(tile_id + '.png')}" for tile_id in table.tile_id]
    _make_files(out, table.label)
    write_manifest(out, table)
