"""The critic's mean loss per class on real tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmentor_tiles import CLASSES, write_tiles

from crfm_core.curation.class_losses import class_losses
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import as_input
from crfm_core.segmentor.mmseg.networks import build_model


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return Critic(build_model("segformer_tiny", len(CLASSES)), CLASSES)


def test_class_losses_are_means_over_pooled_pixels_and_absent_classes_have_none(tmp_path, critic, capsys):
    manifest = write_tiles(tmp_path / "real.parquet", 5)
    table = read_manifest(manifest)
    images, labels = paths_of(manifest, table, "image", tmp_path), paths_of(manifest, table, "label", tmp_path)
    result = class_losses(critic, manifest, tmp_path, batch_size=2)
    x, y = as_input(np.stack([read_rgb(p) for p in images])), torch.tensor(np.stack([read_label(p) for p in labels])).long()
    loss = F.cross_entropy(critic(x), y, ignore_index=255, reduction="none")
    assert result["pixels"] == [int((y == c).sum()) for c in range(3)]
    assert result["losses"] == pytest.approx([float(loss[y == c].mean()) for c in range(3)], rel=1e-5)
    four = Critic(build_model("segformer_tiny", 4), [*CLASSES, "snow"])
    assert class_losses(four, manifest, tmp_path)["losses"][3] is None
    assert "no real pixels of snow" in capsys.readouterr().out
