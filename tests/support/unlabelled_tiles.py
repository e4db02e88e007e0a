"""Tiles that have no labels, or those of a critic, beside the tiny world's own."""

from __future__ import annotations

from pathlib import Path

from segmentor_tiles import CLASSES, write_tiles
from tiny_world import World

from crfm_core.generator.latents import encode_tiles
from crfm_core.generator.tiles import TileFiles
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.text.encoders import encode_prompts_file, prompt_key

CAPTION = "a satellite image of wood"


def write_unlabelled(world: World, root: Path, masks: bool = False, count: int = 4) -> TileFiles:
    """Files of so many tiles below ``root``, for the base model of the world; with ``masks`` they have labels as a critic writes them."""
    captions, prompts, latents = root / "captions.parquet", root / "prompts.json", root / "latents.safetensors"
    table = read_manifest(write_tiles(captions, count=count, seed=9, prefix="u"))
    table = table.assign(split="unlabelled", caption=CAPTION, prompt=prompt_key(CAPTION))
    if not masks:
        blank = [[] for _ in range(count)], [[0] * len(CLASSES) for _ in range(count)]
        table = table.assign(label="", classes=blank[0], pixels=blank[1])
    write_manifest(captions, table)
    encode_prompts_file(world.base, [CAPTION], prompts)
    encode_tiles(world.base, captions, root, len(CLASSES), "grey", latents, labelled=masks)
    return TileFiles(latents=latents, prompts=prompts, captions=captions)
