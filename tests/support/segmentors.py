"""Small segmentors: trained on tiles, or with random weights that tell classes apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from segmentor_tiles import CLASSES, PALETTE
from torch import nn

from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input
from crfm_core.segmentor.mmseg.networks import build_segmentor, describe_architecture
from crfm_core.segmentor.training import SegmentorTraining, train_segmentor
from crfm_core.settings import Segmentor


def train_on(manifest: Path, out: Path, segmentor: Segmentor, work: Path | None = None, **fields) -> Path:
    """Train in this process on tiles that :func:`segmentor_tiles.write_tiles` wrote beside their manifest; return the checkpoint."""
    fields = {"root": manifest.parent, "classes": CLASSES, "palette": PALETTE, "iterations": segmentor.iterations, "seed": 0} | fields
    train_segmentor(SegmentorTraining(manifest=manifest, out=out, work=work or out.parent / f".{out.stem}", segmentor=segmentor, **fields))
    return out


def network_of(seed: int, **changes) -> nn.Module:
    """A small SegFormer whose random weights tell classes apart."""
    torch.manual_seed(seed)
    network = build_segmentor(describe_architecture("segformer_tiny", len(CLASSES)) | changes)
    nn.init.normal_(network.decode_head.conv_seg.weight)
    network.eval()
    with torch.no_grad():  # none is the most likely everywhere
        logits = Critic(network, CLASSES)(as_input(pictures(64, 64)))
        network.requires_grad_(True).decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    return network


def write_checkpoint(path: Path, weights: dict[str, torch.Tensor], classes: list[str] = CLASSES) -> Path:
    """A checkpoint of segformer_tiny as ``train_segmentor`` writes it."""
    torch.save({"state_dict": weights, "meta": {"segmentor": {"architecture": "segformer_tiny"}, "classes": classes}}, path)
    return path


def pictures(height: int, width: int, count: int = 2) -> np.ndarray:
    """Smooth noise uint8 [count,H,W,3], so that what is resized keeps its look."""
    coarse = torch.rand(count, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(height + width))
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (255 * smooth.clamp(0, 1)).permute(0, 2, 3, 1).byte().numpy()
