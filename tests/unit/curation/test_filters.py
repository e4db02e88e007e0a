"""What filters leave of synthetic tiles: cases computed by hand, and the whole chain on tiny tiles."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hand_made_tiles import ClassInTheImage, by_loss, image_of, tiles_of, write_by_hand
from raw_datasets import describe
from segmentor_tiles import CLASSES, write_tiles
from tiny_clip import write_clip

from crfm_core import DataError
from crfm_core.curation.class_losses import class_losses
from crfm_core.curation.filter_inputs import FilterInputs
from crfm_core.curation.filters import agreement, filter_pixels, pixel
from crfm_core.curation.filters import clip as clip_filter
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.segmentor.critic import Critic, as_critic
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.settings import MARGIN, AgreementFilter, ClipFilter, PixelFilter
from crfm_core.text.clip import load_clip


def by_pixel(manifest: Path, root: Path, critic, class_losses, margin: float, out: Path) -> pd.DataFrame:
    inputs = FilterInputs(manifest, root, out, critic.classes)
    inputs.critic, inputs.class_losses = critic, class_losses
    return pixel.apply(PixelFilter(kind="pixel", margin=margin), inputs)


def by_agreement(manifest: Path, root: Path, keep: float, out: Path, batch_size: int = 16) -> pd.DataFrame:
    inputs = FilterInputs(manifest, root, out, CLASSES, batch_size=batch_size)
    inputs.critic = as_critic(ClassInTheImage(), CLASSES)
    return agreement.apply(AgreementFilter(kind="agreement", keep=keep), inputs)


def by_clip(manifest: Path, root: Path, clip, keep: float, out: Path) -> pd.DataFrame:
    inputs = FilterInputs(manifest, root, out, CLASSES, batch_size=2)
    inputs.clip = clip
    return clip_filter.apply(ClipFilter(kind="clip", keep=keep), inputs)


# -------------------------------------------------------------------------------------------------------- pixel filter

REAL = [  # losses in tenths, labels; what is ignored would count 20 each
    ([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [10, 10, 200, 200]],
     [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 255, 255]]),
    ([[5, 5, 5, 5], [4, 4, 4, 4], [4, 4, 4, 4], [4, 4, 200, 200]],
     [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 255, 255]]),
]  # fmt: skip
SYNTHETIC = (
    [[2, 3, 2, 3], [6, 7, 6, 7], [90, 90, 90, 1], [90, 90, 1, 1]],
    [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [255, 255, 0, 1]],
)
LEFT = [[0, 255, 0, 255], [1, 255, 1, 255], [2, 2, 2, 2], [255, 255, 0, 1]]


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


def test_filtered_tiles_keep_image_and_georeference_and_say_what_was_kept(tmp_path, critic):
    manifest = write_tiles(tmp_path / "synthetic" / "all.parquet", 3, georeferenced=True)
    out = tmp_path / "filtered" / "margin.parquet"
    means = class_losses(critic, manifest, tmp_path)["losses"]
    before, after = read_manifest(manifest), by_pixel(manifest, tmp_path, critic, [means[0], 0.0, None], 1.0, out)
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


def test_the_filter_of_a_tile_is_as_computed_by_hand(tmp_path, capsys):
    # class 0: (12 · 0.1 + 4 · 0.5) / 16, not the mean 0.3 of the tiles' means; class 1: (2 · 1.0 + 10 · 0.4) / 12, not 0.7
    losses = class_losses(by_loss(), tiles_of(tmp_path / "real.parquet", *REAL), tmp_path)
    assert losses["pixels"] == [16, 12, 0]
    assert losses["losses"] == [pytest.approx(0.2, abs=1e-5), pytest.approx(0.5, abs=1e-5), None]
    said = capsys.readouterr().out
    assert "no real pixels of wood" in said and "water: mean loss 0.5000 over 12 pixels" in said

    # so the limits are 0.25 and 0.625; the class that the real tiles lack is kept whatever its loss
    synthetic = tiles_of(tmp_path / "synthetic.parquet", SYNTHETIC)
    table = by_pixel(synthetic, tmp_path, by_loss(), losses["losses"], MARGIN, tmp_path / "f" / "pixel.parquet")
    (label,) = paths_of(tmp_path / "f" / "pixel.parquet", table, "label", tmp_path)
    assert read_label(label).tolist() == LEFT
    assert table.pixels.tolist() == [[3, 3, 4]] and table.classes.tolist() == [[0, 1, 2]]
    assert table.kept.tolist() == [10 / 14]
    said = capsys.readouterr().out
    assert "no real pixels of wood to compare with: their synthetic pixels are all kept" in said
    assert [line.split() for line in said.splitlines()[-3:]] == [
        ["soil", "5", "3", "40.0", "%", "1", "1"],
        ["water", "5", "3", "40.0", "%", "1", "1"],
        ["wood", "4", "4", "0.0", "%", "1", "1"],
    ]


def test_no_margin_is_that_of_freemask_and_another_is_taken(tmp_path):
    assert PixelFilter(kind="pixel").margin == MARGIN == 1.25
    loss, label = np.array([1.25, 1.26]), np.zeros(2, np.uint8)
    assert filter_pixels(loss, label, [1.0]).tolist() == [0, 255]
    synthetic = tiles_of(tmp_path / "synthetic.parquet", SYNTHETIC)
    for margin, kept in ((MARGIN, [3, 3, 4]), (2.0, [5, 5, 4]), (0.75, [1, 1, 4])):
        out = tmp_path / str(margin) / "pixel.parquet"
        assert by_pixel(synthetic, tmp_path, by_loss(), [0.2, 0.5, None], margin, out).pixels.tolist() == [kept]


def test_a_class_that_no_synthetic_tile_shows_is_not_complained_of(tmp_path, capsys):
    synthetic = tiles_of(tmp_path / "synthetic.parquet", ([[1] * 4] * 4, [[0] * 4] * 4))
    by_pixel(synthetic, tmp_path, by_loss(), [0.2, None, None], MARGIN, tmp_path / "pixel.parquet")
    said = capsys.readouterr().out
    assert "no real pixels" not in said and said.splitlines()[-2].split() == ["water", "0", "0", "–", "0", "0"]


def test_what_two_pixel_filters_kept_is_counted_from_the_mask(tmp_path):
    synthetic = tiles_of(tmp_path / "synthetic.parquet", SYNTHETIC)
    by_pixel(synthetic, tmp_path, by_loss(), [0.2, 0.5, None], 1.25, tmp_path / "first.parquet")
    table = by_pixel(tmp_path / "first.parquet", tmp_path, by_loss(), [0.2, 0.5, 1.0], 1.25, tmp_path / "second.parquet")
    assert table.pixels.tolist() == [[3, 3, 1]]
    assert table.kept.tolist() == [pytest.approx(7 / 14)]


def test_a_filter_that_leaves_no_pixel_is_an_error_with_the_remedy(tmp_path):
    synthetic = tiles_of(tmp_path / "synthetic.parquet", SYNTHETIC)
    with pytest.raises(DataError, match=r"pixel\.parquet: no pixel of the 1 tiles of \S*synthetic\.parquet .* 1\.25 times .*raise"):
        by_pixel(synthetic, tmp_path, by_loss(), [0.01, 0.01, 0.01], MARGIN, tmp_path / "pixel.parquet")
    assert not (tmp_path / "pixel.parquet").exists()


# ------------------------------------------------------------------------------------------------------- image filters


def agreement_tiles(manifest: Path) -> Path:
    """Five tiles of 4x4: the critic sees in turn the mask, three quarters of it, nothing of it, anything without a mask, half of it."""
    labels = [np.kron([[0, 1], [0, 1]], np.ones((2, 2), int)) for _ in range(5)]
    seen = [one.copy() for one in labels]
    seen[1][0, :] = 1  # class 0: 6 of 8; class 1: 8 of 10
    seen[2] = 1 - seen[2]
    seen[4][:] = 0  # class 0: 8 of 16; class 1: none
    labels[3] = np.full((4, 4), 255)
    labels[1][0, 3] = 255  # so class 1: 7 of 9
    return write_by_hand(manifest, [image_of(np.zeros_like(one), one) for one in seen], labels, mask_of=list("aabbc"), copy=[0, 1, 0, 1, 0])


AGREEMENT = [100, 100 * (6 / 8 + 7 / 9) / 2, 0, math.nan, 25]


@pytest.mark.parametrize(("keep", "kept"), [(0.2, [0]), (0.4, [0, 1]), (0.5, [0, 1, 4]), (0.8, [0, 1, 2, 4]), (1, [0, 1, 2, 3, 4])])
def test_images_that_agree_best_with_their_masks_stay_in_their_order(tmp_path, keep, kept):
    manifest, out = agreement_tiles(tmp_path / "synthetic" / "all.parquet"), tmp_path / "filtered" / "crfm" / "agreement.parquet"
    table = by_agreement(manifest, tmp_path, keep, out, batch_size=2)
    assert table.tile_id.tolist() == [f"t{i}" for i in kept]
    assert table.agreement.tolist() == pytest.approx([AGREEMENT[i] for i in kept], nan_ok=True)
    before = read_manifest(manifest)
    pd.testing.assert_frame_equal(read_manifest(out), table)
    for column in ("image", "label"):
        old = paths_of(manifest, before, column, tmp_path)
        assert paths_of(out, table, column, tmp_path) == [old[i] for i in kept]
    assert table.digest.tolist() == [before.digest[i] for i in kept]


def test_the_log_says_what_a_filter_of_images_leaves_of_each_class(tmp_path, capsys):
    manifest = agreement_tiles(tmp_path / "all.parquet")
    by_agreement(manifest, tmp_path, 0.4, tmp_path / "kept.parquet")
    said = capsys.readouterr().out
    assert "agreement: 50.35 on average, 88.19 of those kept" in said
    assert [line.split() for line in said.splitlines()[-5:]] == [
        ["2", "of", "5", "tiles", "kept"],
        ["class", "pixels", "kept", "dropped", "tiles", "kept"],
        ["soil", "32", "16", "50.0", "%", "4", "2"],
        ["water", "31", "15", "51.6", "%", "4", "2"],
        ["wood", "0", "0", "–", "0", "0"],
    ]


def test_images_without_any_labelled_pixel_cannot_be_compared_with_their_masks(tmp_path):
    none = np.full((4, 4), 255)
    manifest = write_by_hand(tmp_path / "all.parquet", [image_of(none * 0, none * 0)] * 3, [none] * 3)
    with pytest.raises(DataError, match=r"all\.parquet: none of its 3 images has a labelled pixel.*; raise the margin of the pixel filter"):
        by_agreement(manifest, tmp_path, 0.5, tmp_path / "kept.parquet")


def test_a_pixel_filter_after_one_of_images_sees_what_that_left(tmp_path):
    manifest = agreement_tiles(tmp_path / "synthetic" / "all.parquet")
    first, second = (tmp_path / "filtered" / "crfm" / f"{name}.parquet" for name in ("agreement", "agreement-pixel"))
    by_agreement(manifest, tmp_path, 0.4, first)
    # the loss written into these images is 0 for what they show, and without end for what they do not
    table = by_pixel(first, tmp_path, by_loss(), [0.1, 0.1, 0.1], MARGIN, second)
    assert table.tile_id.tolist() == ["t0", "t1"] and table.agreement.tolist() == pytest.approx(AGREEMENT[:2])
    assert table.pixels.tolist() == [[8, 8, 0], [6, 7, 0]] and table.kept.tolist() == [1, 13 / 15]
    assert all(path.is_file() for column in ("image", "label") for path in paths_of(second, table, column, tmp_path))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(write_clip(tmp_path_factory.mktemp("models") / "tiny"))


def test_images_that_fit_their_captions_best_stay(tmp_path, clip, monkeypatch):
    captions = ["road water", "road", "forest", "road", "water water", "road"]
    manifest, asked, encode = write_tiles(tmp_path / "all.parquet", 6, caption=captions), [], clip.text_features
    monkeypatch.setattr(clip, "text_features", lambda texts: asked.extend(texts) or encode(texts))
    table = by_clip(manifest, tmp_path, clip, 0.5, tmp_path / "kept.parquet")
    assert asked == ["road water", "road", "forest", "water water"], "a caption is encoded once"
    images = [read_rgb(path) for path in paths_of(manifest, read_manifest(manifest), "image", tmp_path)]
    scores = (clip.image_features(np.stack(images)) * encode(captions)).sum(dim=1).numpy()
    kept = sorted(np.argsort(-scores)[:3])
    assert table.tile_id.tolist() == [f"t{i}" for i in kept]
    assert table.clip_score.to_numpy() == pytest.approx(scores[kept], abs=1e-5)
    assert len(set(scores.round(5))) == 6, "the model tells them apart"


def test_tiles_without_captions_cannot_be_compared_with_them(tmp_path, clip):
    manifest = write_tiles(tmp_path / "all.parquet", 2)
    with pytest.raises(DataError, match=r"all\.parquet: no column caption, and the filter compares images with their captions"):
        by_clip(manifest, tmp_path, clip, 0.5, tmp_path / "kept.parquet")
