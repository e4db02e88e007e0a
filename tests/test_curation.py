"""Filtering synthetic labels and mixing real with synthetic tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError
from crfm_core.curation.class_losses import class_losses
from crfm_core.curation.filters import filter_manifest, filter_pixels
from crfm_core.curation.mixing import mix
from crfm_core.data.rasters import describe, read_label, read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import agreement, as_input
from crfm_core.segmentor.openmmlab import build_model


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return Critic(build_model("segformer_tiny", len(CLASSES)), CLASSES)


def test_a_pixel_is_dropped_above_the_margin_times_its_class_and_not_at_it():
    loss = np.array([[1.25, 1.2500001, 5.0, 9.0], [2.4, 2.6, 9.0, 0.0]])
    labels = np.array([[0, 0, 255, 2], [1, 1, 3, 0]], dtype=np.uint8)
    expected = np.array([[0, 255, 255, 2], [1, 255, 3, 0]], dtype=np.uint8)
    means = [1.0, 2.0, None, float("nan")]
    assert (filter_pixels(loss, labels, means, 1.25) == expected).all()
    in_torch = filter_pixels(torch.tensor(loss), torch.tensor(labels), means, 1.25)
    assert in_torch.dtype == torch.uint8
    assert (in_torch.numpy() == expected).all()


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


def test_filtered_tiles_keep_image_and_georeference_and_say_what_was_kept(tmp_path, critic):
    manifest = write_tiles(tmp_path / "synthetic" / "all.parquet", 3, georeferenced=True)
    out = tmp_path / "filtered" / "margin.parquet"
    means = class_losses(critic, manifest, tmp_path)["losses"]
    before, after = read_manifest(manifest), filter_manifest(manifest, tmp_path, critic, [means[0], 0.0, None], 1.0, out)
    assert paths_of(out, after, "image", tmp_path) == paths_of(manifest, before, "image", tmp_path)
    for row, old, old_label in zip(
        after.to_dict("records"), before.to_dict("records"), paths_of(manifest, before, "label", tmp_path), strict=True
    ):
        path = out.parent / row["label"]
        assert describe(path)["transform"] == list(old["transform"])
        assert describe(path)["crs"]
        label = read_label(path)
        assert row["pixels"] == [int((label == c).sum()) for c in range(3)]
        assert row["pixels"][1] == 0
        assert row["pixels"][2] == old["pixels"][2]
        assert row["classes"] == [c for c in range(3) if row["pixels"][c]]
        assert row["kept"] == sum(row["pixels"]) / sum(old["pixels"])
        assert row["digest"] != old["digest"]
        assert ((label == read_label(old_label)) | (label == 255)).all()
    soil = [sum(table.pixels.map(lambda pixels: pixels[0])) for table in (before, after)]
    assert 0 < soil[1] < soil[0]


def test_agreement_of_each_tile_and_of_all_come_from_the_same_pixels(tmp_path, critic):
    one = write_tiles(tmp_path / "one.parquet", 1)
    scores = agreement(critic, one, tmp_path)
    assert scores["per_tile"] == [scores["mIoU"]]


def test_a_mix_has_the_counts_and_weights_asked_for(tmp_path):
    real = write_tiles(tmp_path / "tiles" / "train.parquet", 4, prefix="r")
    copies = [2, 1, 0] * 6
    synthetic = write_tiles(tmp_path / "synthetic" / "all.parquet", 18, prefix="s", copy=copies)
    table = mix(real, synthetic, tmp_path / "mixes" / "m.parquet", synthetic_per_real=3, real_weight=4, seed=1)
    assert table.source.tolist() == ["real"] * 4 + ["synthetic"] * 12
    assert table.weight.tolist() == [4.0] * 4 + [1.0] * 12
    assert sorted(table["copy"].dropna()) == [0] * 6 + [1] * 6
    for column in ("image", "label"):
        assert all(path.is_file() for path in paths_of(tmp_path / "mixes" / "m.parquet", table, column, tmp_path))


def test_a_mix_depends_on_its_seed_only_and_a_smaller_one_is_part_of_a_larger(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic.parquet", 12, prefix="s")
    again, same, larger, other = (
        mix(real, synthetic, tmp_path / f"{name}.parquet", share, seed=seed).tile_id.tolist()
        for name, share, seed in (("again", 2, 0), ("same", 2, 0), ("larger", 3, 0), ("other", 2, 1))
    )
    assert again == same
    assert larger[:9] == same
    assert other != same


def test_a_mix_of_real_tiles_alone_needs_nothing_synthetic(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3)
    assert len(mix(real, None, tmp_path / "mix.parquet")) == 3


def test_too_few_synthetic_tiles_are_an_error_that_names_the_counts(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic.parquet", 5, prefix="s")
    with pytest.raises(DataError, match=r"5 synthetic tiles, and 2 for each of 3 real ones are 6; make more copies"):
        mix(real, synthetic, tmp_path / "mix.parquet", synthetic_per_real=2)
    with pytest.raises(DataError, match="no synthetic manifest"):
        mix(real, None, tmp_path / "mix.parquet", synthetic_per_real=1)
