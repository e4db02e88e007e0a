"""Critics from elsewhere: networks and configurations as mmsegmentation's users write them, and what tests of all critics need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from segmentor_tiles import CLASSES
from tiny_transformers import processor_of
from torch import nn
from transformers import ImageProcessingMixin, PreTrainedModel

from crfm_core.segmentor.mmseg import architectures

MEAN, STD = [10.0, 120.0, 90.0], [40.0, 58.0, 70.0]
PREPROCESSOR = {"type": "SegDataPreProcessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True, "pad_val": 3, "size_divisor": 32}


def model(**changes) -> dict:
    """The configuration of a small SegFormer with an auxiliary head, as a user of mmsegmentation writes it."""
    network = architectures.ARCHITECTURES["segformer_tiny"](len(CLASSES))
    head = {"in_channels": 64, "in_index": 2, "channels": 8, "num_convs": 1, "concat_input": False}
    network["auxiliary_head"] = architectures._head("FCNHead", len(CLASSES), 0.4, **head)
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": dict(PREPROCESSOR),
        "pretrained": None,
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **network,
        **changes,
    }


def text_of(**names) -> str:
    """A configuration as mmengine's Runner stores it."""
    return Config(names).pretty_text


def store(path: Path, weights: dict[str, torch.Tensor], text: str, **meta) -> Path:
    """Write a checkpoint of mmsegmentation with the text of its configuration, and more of its meta."""
    torch.save({"state_dict": weights, "meta": {"cfg": text, "dataset_meta": {"classes": tuple(CLASSES)}, **meta}}, path)
    return path


def save_folder(folder: Path, network: PreTrainedModel, processor: ImageProcessingMixin | None = None) -> Path:
    """Write a transformers model and its image processor as their users do."""
    network.save_pretrained(folder)
    (processor or processor_of("Segformer")).save_pretrained(folder)
    return folder


def noise(height: int, width: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_images(noise: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(noise).permute(0, 3, 1, 2) / 255


def directional(critic: nn.Module, size: tuple[int, int]) -> tuple[float, float]:
    """The derivative of a function of the logits along a direction of the images: by autograd, and by central differences."""
    torch.manual_seed(1)
    critic = critic.double()
    images, way = torch.rand(1, 3, *size, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, *size, dtype=torch.float64)

    def loss(images):
        return critic(images).log_softmax(1)[:, 0].mean()

    (slope,) = torch.autograd.grad(loss(images), images)
    with torch.no_grad():
        return float((slope * way).sum()), float((loss(images + 1e-7 * way) - loss(images - 1e-7 * way)) / 2e-7)
