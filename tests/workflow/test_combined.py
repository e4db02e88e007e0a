"""One run with as many options as go together, each with another value than its default (tests/support/configs/combined.yaml)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from paths import CONFIGS
from tiny_clip import write_clip
from workflow_runs import succeed

#: A configuration file of mmsegmentation, the smallest of segformer's kind.
NETWORK = """
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='MixVisionTransformer', embed_dims=8, num_stages=2, num_layers=[1, 1], num_heads=[1, 2], patch_sizes=[7, 3],
        sr_ratios=[8, 4], strides=[4, 2], out_indices=(0, 1)),
    decode_head=dict(
        type='SegformerHead', in_channels=[8, 16], in_index=[0, 1], channels=16, dropout_ratio=0.0, num_classes=19,
        norm_cfg=dict(type='BN'), align_corners=False, loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)))
"""


def write_judge(folder: Path) -> None:
    """A segmentor of transformers for the classes of the dataset."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16}
    classes = yaml.safe_load((CONFIGS / "combined_world.yaml").read_text())["classes"]
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=dict(enumerate(classes)))).save_pretrained(folder)
    SegformerImageProcessorPil().save_pretrained(folder)


@pytest.mark.ci
def test_options_go_together(tmp_path):
    for name in ("combined.yaml", "combined_world.yaml"):
        shutil.copy(CONFIGS / name, tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    write_clip(tmp_path / "clip")
    write_judge(tmp_path / "judge")
    world, call = "results/world", ("--configfile", "combined.yaml")
    succeed(tmp_path, f"{world}/base_model", *call)  # the sampler names its decoder
    succeed(tmp_path, f"{world}/generators/first", *call)  # and another control its weights
    parts = ["generators/again", "resampled/first/formula/clip/hardness.parquet", "synthetic/again/searched/shard-1-of-1.parquet"]
    succeed(tmp_path, *(f"{world}/{part}" for part in parts), f"{world}/comparison/paper.json", "results/tables/main.csv", *call)
    row = pd.read_csv(tmp_path / "results" / "tables" / "main.csv").iloc[0]
    assert (row.recipe, row.feature_kind, row.compared_with) == ("rare", "clip", "held") and row[["mIoU", "judge_mIoU"]].notna().all()
