"""Model folders and weights: whether they are whole, and where they are, before anything is loaded from them."""

from __future__ import annotations

from pathlib import Path

from crfm_core import WeightsError
from crfm_core.files import read_json

COMPONENTS = ("transformer", "scheduler", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def check_base_model(folder: Path | str) -> Path:
    """Return ``folder`` if it is a diffusers folder of an SD3 pipeline. Raises WeightsError naming what is missing."""
    folder = Path(folder)
    missing = [name for name in ("model_index.json", *COMPONENTS) if not (folder / name).exists()]
    if missing:
        raise WeightsError(
            f"base_model.path: {folder} lacks {', '.join(missing)}; it must be a diffusers folder of Stable Diffusion 3.5, as "
            "`hf download stabilityai/stable-diffusion-3.5-medium --local-dir ...` makes it"
        )
    return folder


def base_folder(path: Path | str) -> Path:
    """The base model's folder: ``path`` itself, or the folder that the JSON file ``path`` names."""
    path = Path(path)
    return path if path.is_dir() else check_base_model(read_json(path)["folder"])
