"""Images and captions in one space: any CLIP-like model of transformers (CLIP, SigLIP and others), for filters and distances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crfm_core import WeightsError
from crfm_core.settings import Model
from crfm_core.text.model_folder import LOAD_OPTIONS, check_folder, fetch_model, folder_at, load_model, loading

if TYPE_CHECKING:
    from torch import Tensor

#: The section of the configuration that messages name.
CLIP_KEY = "clip"

#: What a folder needs beside configuration and weights, and the files that may have it.
CLIP_PARTS = {
    "tokenizer": ("tokenizer.json", "vocab.json", "vocab.txt", "*.model"),
    "preparation of images": ("preprocessor_config.json", "processor_config.json"),
}


def fetch_clip_model(settings: Model, command: str) -> Path:
    """Download the model from the hub into its folder, and return the folder (:func:`crfm_core.text.model_folder.fetch_model`)."""
    return check_clip_model(fetch_model(settings, CLIP_KEY, command))


def check_clip_model(folder: Path | str) -> Path:
    """Return ``folder`` if it holds a model's configuration, weights in safetensors, a tokenizer and the preparation of images, by their
    names. Raises WeightsError if not."""
    folder = check_folder(folder, CLIP_KEY)
    for what, names in CLIP_PARTS.items():
        if not any(path for name in names for path in folder.glob(name)):
            # without its vocabulary, a tokenizer would load all the same and know no word
            raise WeightsError(f"{CLIP_KEY}.path: {folder} has no {what} ({', '.join(names)}); give a folder that holds the whole model")
    return folder


class Clip:
    """A model with a tower for images and one for text, their processors, and its ``name`` for figures and tables."""

    def __init__(self, model, image_processor, tokenizer, name: str) -> None:
        self.model, self.image_processor, self.tokenizer, self.name = model, image_processor, tokenizer, name
        limits = [tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
        self.length = min(limit for limit in limits if limit)
        # SigLIP attends to the padding, as in training; not all of its tokenizers say so.
        self.masks_padding = not model.config.model_type.startswith("siglip")

    def image_features(self, images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
        """Images uint8 [B,H,W,3], or a list of [H,W,3] of any sizes -> float32 [B,D] of length 1, on the CPU.

        They are scaled and cropped by the model's own processor; CLIP's crops to a square.
        """
        from PIL import Image

        inputs = self.image_processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        return self._features(self.model.get_image_features, inputs)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float32 [B,D] of length 1, on the CPU; longer texts are truncated to the model's length."""
        # always padded to the same length, so that a text's features do not depend on its neighbours
        inputs = self.tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        if not self.masks_padding:
            inputs.pop("attention_mask", None)
        return self._features(self.model.get_text_features, inputs)

    def _features(self, tower, inputs) -> Tensor:
        import torch

        with torch.inference_mode():
            answer = tower(**inputs.to(self.model.device))
        features = getattr(answer, "pooler_output", answer).float().cpu()
        if not features.isfinite().all():
            raise WeightsError(f"{CLIP_KEY}: {self.name} gives features that are not finite; its weights are damaged, fetch it again")
        return torch.nn.functional.normalize(features, dim=-1)


def load_clip(folder: Path | str, device: str = "cpu") -> Clip:
    """Load a model in float32 from its folder, or from the one that the note ``folder`` (JSON) of a fetched model names.

    Images are prepared with PIL alone, so that scores do not depend on whether torchvision is installed. No code from the folder is run.
    Raises WeightsError when the folder holds no such model, lacks weights, or needs software that is not installed.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = check_clip_model(folder_at(folder, CLIP_KEY))
    with loading(folder, CLIP_KEY, "a model with features of images and of text"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOAD_OPTIONS)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **LOAD_OPTIONS)
        model = load_model(AutoModel, folder, CLIP_KEY, torch.float32)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise WeightsError(
            f"{CLIP_KEY}: {folder} holds a {type(model).__name__}, which has no features of images and text in one space; give a model "
            "such as CLIP or SigLIP"
        )
    return Clip(model.to(device), image_processor, tokenizer, f"{folder.resolve().name} ({model.config.model_type})")
