"""A tiny dataset with everything the generator needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segmentor_tiles import CLASSES, PALETTE, write_tiles

from crfm_core.generator.latents import encode_tiles
from crfm_core.generator.training import GeneratorTraining
from crfm_core.models.base import build_base_model
from crfm_core.settings import Captions, Control, Dataset, EmbeddedBase
from crfm_core.text.captions import caption_of, caption_tiles
from crfm_core.text.encoders import encode_prompts_file

TEMPLATE = "a satellite image of {classes}"


@dataclass(frozen=True)
class World:
    """A dataset's results folder: tiles of 32x32 pixels with three classes, captions, base model, prompts and latents."""

    root: Path
    tiles: Path
    captions: Path
    base: Path
    prompts: Path
    latents: Path


def tiny_base_settings(steps: int = 40):
    vae = {"channels": [8, 16], "latent_channels": 4, "steps": steps, "batch_size": 4, "learning_rate": 4e-3}
    transformer = {"layers": 2, "heads": 2, "head_dim": 8, "patch_size": 2, "text_dim": 16}
    return EmbeddedBase(kind="embedded", seed=3, vae=vae, transformer=transformer)


def build_world(root: Path) -> World:
    tiles = write_tiles(root / "tiles" / "train.parquet", count=6, georeferenced=True)
    source = {"kind": "embedded", "scenes": {"train": 1, "test": 1}}
    dataset = Dataset(name="d", classes=CLASSES, palette=PALETTE, source=source, tile={"size": 32})
    captions, base = root / "captions" / "train.parquet", root / "base_model"
    table = caption_tiles(tiles, dataset, Captions(template=TEMPLATE), captions)
    everything = caption_of([1] * len(CLASSES), CLASSES, Captions(template=TEMPLATE))
    build_base_model(tiles, root, len(CLASSES), [everything], tiny_base_settings(), base, root / "work" / "base_model")
    prompts, latents = root / "prompts" / "train.json", root / "latents" / "grey.safetensors"
    encode_prompts_file(base, table.caption, prompts)
    encode_tiles(base, tiles, root, len(CLASSES), "grey", latents)
    return World(root, tiles, captions, base, prompts, latents)


def training_job(world: World, folder: Path, control: Control, **changes) -> GeneratorTraining:
    """The job of training on the world, with its outputs in ``folder``."""
    arguments = {"base": world.base, "latents": world.latents, "prompts": world.prompts, "captions": world.captions}
    arguments |= {"num_classes": len(CLASSES), "control": control}
    arguments |= {"out": folder / "out", "work": folder / "work", "curves": folder / "curves"}
    return GeneratorTraining(**(arguments | changes))
