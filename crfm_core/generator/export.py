"""A trained generator's image and text part as a plain Stable Diffusion 3 folder, for other programs that read that format."""

from __future__ import annotations

import shutil
from pathlib import Path

from crfm_core import WeightsError
from crfm_core.files import atomic_path, read_json, write_json
from crfm_core.generator.training import link_or_copy
from crfm_core.models.controls import load_network
from crfm_core.text.encoders import ENCODER_PARTS


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
    with atomic_path(out) as aside:
        load_network(generator / "transformer").to_sd3().save_pretrained(aside / "transformer")
        for part in same:
            shutil.copytree(generator / part, aside / part, copy_function=link_or_copy)
        header = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": index["_diffusers_version"]}
        write_json(aside / "model_index.json", header | components)
