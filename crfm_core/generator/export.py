"""Folders of a trained generator: the pipeline that sampling opens, and a plain Stable Diffusion 3 folder for other programs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from crfm_core import WeightsError
from crfm_core.files import atomic_path, read_json, write_json
from crfm_core.models.controls import load_network
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.text.encoders import ENCODER_PARTS

#: The file in a generator's folder that says what its weights follow from.
RECORD = "training.json"


def save_generator(pipeline: MaskToImagePipeline, base: Path, out: Path, record: dict[str, Any]) -> None:
    """Write a pipeline folder with the text encoders of ``base``, linked, not copied, where the disk allows, and a ``record``.

    The folder appears whole or not at all.
    """
    with atomic_path(out) as temporary:
        pipeline.save_pretrained(temporary)
        index, base_index = read_json(temporary / "model_index.json"), read_json(base / "model_index.json")
        _link_parts(base, temporary, ENCODER_PARTS)
        write_json(temporary / "model_index.json", index | {part: base_index[part] for part in ENCODER_PARTS})
        write_json(temporary / RECORD, record)


def is_trained(out: Path, fingerprint: str) -> bool:
    """Whether ``out`` is a generator whose record has this fingerprint."""
    return (out / RECORD).is_file() and read_json(out / RECORD)["fingerprint"] == fingerprint


def export_sd3(generator: Path, out: Path) -> None:
    """Write the generator without its mask weights as a folder of diffusers' ``StableDiffusion3Pipeline``.

    The transformer is what the generator computes without a mask, in float32; the other components are linked, not copied,
    where the disk allows. The folder appears whole or not at all.

    Args:
        generator: folder of a MaskToImagePipeline with its text encoders.
        out: folder to write.

    Raises:
        WeightsError: the generator's folder lacks a component, or its weights are damaged or do not fit.
    """
    index = read_json(generator / "model_index.json")
    same = ("vae", "scheduler", *ENCODER_PARTS)
    missing = [part for part in ("transformer", *same) if not (generator / part).is_dir()]
    if missing:
        raise WeightsError(f"{generator}: lacks {', '.join(missing)}; give a generator's folder with its text encoders")
    components = {part: index[part] for part in same} | {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    with atomic_path(out) as temporary:
        load_network(generator / "transformer").to_sd3().save_pretrained(temporary / "transformer")
        _link_parts(generator, temporary, same)
        header = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": index["_diffusers_version"]}
        write_json(temporary / "model_index.json", header | components)


def _link_parts(source: Path, target: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        shutil.copytree(source / part, target / part, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    """A copy of the file that takes no room where the file system can link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
