"""Critics from folders of transformers models for semantic segmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from crfm_core import WeightsError
from crfm_core.segmentor.critic.base import Critic, as_critic
from crfm_core.segmentor.preparation import DIVISOR

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.image_processing_utils import BaseImageProcessor


READS = "a folder of a transformers model for semantic segmentation (save_pretrained of model and image processor)"


def recognises(path: Path, meta: dict) -> bool:
    """Whether it is a folder; missing files are named when it is read."""
    return path.is_dir()


def critic_of(folder: Path, weights: dict[str, Tensor], meta: dict) -> Critic:
    """The critic of a folder as ``save_pretrained`` of a model and of its image processor write it (``weights`` and ``meta`` are empty).

    The processor says how values are scaled and normalised and in which order channels come. Images are not resized, as it may say,
    but padded to a multiple of 32, or of the patches where those do not divide 32, so that feature maps lie where the pixels do.

    Raises WeightsError when files are missing or damaged, weights are not in safetensors, tensors are missing, or the model does not
    give a map of logits per class.
    """
    description = _read_json(folder / "config.json")
    # Slow to import, and it must read nothing before the folder's own description is known to be harmless.
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

    known = set(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values())
    architecture = next(iter(description.get("architectures") or []), None)
    if architecture not in known:
        raise WeightsError(
            f"{folder}: {architecture} gives no map of logits per class, which a critic must; models that do: {', '.join(sorted(known))}"
        )
    if description.get("backbone") and not description.get("backbone_config") or "timm" in json.dumps(description.get("backbone_config")):
        raise WeightsError(f"{folder}: its backbone is described elsewhere (a hub or timm); give a model with a backbone_config of its own")
    _read_json(folder / "preprocessor_config.json")
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{folder}: has no weights in safetensors (other formats can run code); save the model again as such")
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **offline)
        config._attn_implementation = None  # a configuration may name one to be fetched
        processor = AutoImageProcessor.from_pretrained(folder, **offline)
        network, found = AutoModelForSemanticSegmentation.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, dtype="auto", **offline
        )
    except Exception as error:  # the library raises all kinds, those of safetensors, tokens and missing packages among them
        reason = str(error).strip().splitlines()[0][:200]
        raise WeightsError(f"{folder}: is damaged, or no model for this transformers ({type(error).__name__}: {reason})") from None
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("auxiliary_head."))
    if missing:
        raise WeightsError(f"{folder}: lacks {len(missing)} tensors of {architecture}, e.g. {missing[0]}; save or fetch the model again")
    classes = [str(config.id2label.get(index, index)) for index in range(config.num_labels)]
    return as_critic(network, classes, **_preparation(processor, config))


def _preparation(processor: BaseImageProcessor, config: PreTrainedConfig) -> dict[str, Any]:
    """What an image processor does to values of 0...255, as :func:`as_critic` takes it for images in [0, 1]."""
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    patch = getattr(getattr(config, "backbone_config", None) or config, "patch_size", None)
    return {
        "mean": np.atleast_1d(mean) / scale,
        "std": np.atleast_1d(std) / scale,
        "bgr": bool(getattr(processor, "do_flip_channel_order", False)),
        "divisor": patch if isinstance(patch, int) and DIVISOR % patch else DIVISOR,
    }


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read as JSON ({error})"
        raise WeightsError(f"{path}: {reason}; a critic's folder is what save_pretrained of model and image processor write") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds no JSON object; save or fetch the model again")
    return content
