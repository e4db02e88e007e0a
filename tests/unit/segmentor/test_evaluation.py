"""How a segmentor looks at images: whole, through windows, in several views; mmsegmentation is the referee. And scores over a split."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from segmentor_tiles import CLASSES, write_tiles
from segmentors import network_of, pictures, write_checkpoint
from torch import nn

from crfm_core import ConfigError, DataError
from crfm_core.data.rasters import read_label, write_raster
from crfm_core.manifest import read_manifest
from crfm_core.segmentor.critic import Critic, as_critic, load_critic
from crfm_core.segmentor.evaluation import as_input, batches_of_one_size, class_maps, evaluate, predict, read_ahead, tile_batches
from crfm_core.segmentor.mmseg.networks import describe_architecture
from crfm_core.segmentor.preparation import IMAGENET_MEAN, IMAGENET_STD, Preparation
from crfm_core.segmentor.sliding import window_and_stride
from crfm_core.settings import Evaluation


def sample(height: int, width: int, size: tuple[int, int] | None = None, mirrored: bool = False):
    """What mmsegmentation's pipelines say of an image: its height and width, and its size after resizing."""
    from mmseg.structures import SegDataSample

    how = {"flip": mirrored, "flip_direction": "horizontal" if mirrored else None}
    return SegDataSample(metainfo={"ori_shape": (height, width), "img_shape": size or (height, width), "img_path": "", **how})


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = network_of(0)
    network.data_preprocessor.test_cfg = None  # images are not padded
    return network


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("evaluation") / "tiles" / "test.parquet", 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("evaluation") / "checkpoint.pth", network_of(0).state_dict())


# --------------------------------------------------------------------------------------------------- mmsegmentation's inference


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 56), (33, 95)])
def test_a_whole_image_gives_the_logits_that_mmsegmentation_gives(height, width):
    padded = describe_architecture("segformer_tiny", 1)["data_preprocessor"] | {"test_cfg": {"size_divisor": 32}}
    network = network_of(0, data_preprocessor=padded)
    images = pictures(height, width)
    data = {"inputs": [torch.from_numpy(one).permute(2, 0, 1) for one in images], "data_samples": [sample(height, width) for _ in images]}
    with torch.no_grad():
        expected = torch.stack([answer.seg_logits.data for answer in network.test_step(data)])
    ours = class_maps(Critic(network, CLASSES), as_input(images), Evaluation())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert ours.argmax(1).unique().numel() > 1


@pytest.mark.parametrize(
    ("height", "width", "window", "stride", "divisor"),
    [
        (64, 96, 32, 32, 32),  # side by side
        (70, 90, 32, 21, 32),  # the last of a row and of a column shifted back
        (70, 90, 40, 13, 1),  # windows that a padding to 32 would enlarge
        (40, 100, 48, 32, 1),  # one window high, as high as the image
        (40, 30, 64, 50, 1),  # smaller than a window
    ],
)
def test_windows_give_the_logits_of_mmsegmentations_slide_inference(network, height, width, window, stride, divisor):
    images = as_input(pictures(height, width))
    network.test_cfg = ConfigDict(mode="slide", crop_size=(window, window), stride=(stride, stride))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = network.slide_inference((images - mean) / std, [{"img_shape": images.shape[2:]}])
    critic = Critic(network, CLASSES, Preparation(divisor=divisor))
    ours = class_maps(critic, images, Evaluation(mode="slide", window=window, stride=stride))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    if min(height, width) > window:
        assert not torch.allclose(ours, class_maps(critic, images, Evaluation()), atol=1e-2)


@pytest.mark.parametrize(("scales", "flip"), [([1.0], True), ([0.5, 1.0, 1.75], False), ([0.75, 1.25], True)])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_views_are_merged_as_mmsegmentations_test_time_augmentation_merges_them(network, scales, flip, mode):
    from mmseg.models import SegTTAModel

    height, width, window, stride = 60, 70, 32, 24
    images = as_input(pictures(height, width, 1))
    network.test_cfg = ConfigDict(mode=mode, crop_size=(window, window), stride=(stride, stride))
    views, samples = [], []
    for scale in scales:
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        scaled = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        for mirrored in [False, True] if flip else [False]:
            views.append([255 * (scaled.flip(-1) if mirrored else scaled)[0]])
            samples.append([sample(height, width, size, mirrored)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a dimension that it adds
        merged = SegTTAModel(network).test_step({"inputs": views, "data_samples": samples})
    critic = Critic(network, CLASSES, Preparation())
    how = Evaluation(mode=mode, window=window, stride=stride, scales=scales, flip=flip)
    probabilities = class_maps(critic, images, how)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, height, width))
    assert torch.equal(probabilities.argmax(1), merged[0].pred_sem_seg.data)
    single = how.model_copy(update={"scales": [1.0], "flip": False})
    assert (probabilities.argmax(1) != class_maps(critic, images, single).argmax(1)).any()


# ------------------------------------------------------------------------------------------------------------- invariants


def test_views_mirrored_change_nothing_for_a_critic_that_mirroring_does_not_matter_to():
    torch.manual_seed(0)
    critic, images = as_critic(nn.Conv2d(3, 4, 1), list("abcd")), pictures(24, 30)
    plain = predict(critic, images)
    assert len(np.unique(plain)) > 1
    assert np.array_equal(predict(critic, images, evaluation=Evaluation(flip=True)), plain)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_prediction_of_a_mirrored_image_is_the_mirrored_prediction(network, mode):
    critic, images = Critic(network, CLASSES), pictures(48, 57)
    how = Evaluation(mode=mode, window=32, stride=20, scales=[1.0, 1.5], flip=True)
    straight, mirrored = (predict(critic, np.ascontiguousarray(each), evaluation=how) for each in (images, images[:, :, ::-1]))
    assert (mirrored[:, :, ::-1] == straight).mean() > 0.999
    without = how.model_copy(update={"flip": False})
    assert (predict(critic, images[:, :, ::-1], evaluation=without)[:, :, ::-1] != predict(critic, images, evaluation=without)).any()


def test_windows_have_the_tiles_side_and_overlap_by_a_third_unless_told_otherwise():
    assert window_and_stride(Evaluation(), 512) == (512, 341)
    assert window_and_stride(Evaluation(window=96, stride=96), 512) == (96, 96)
    with pytest.raises(ConfigError, match=r"evaluation\.stride: 600 with windows of 512 pixels leaves gaps; allowed: 1\.\.\.512"):
        window_and_stride(Evaluation(stride=600), 512)


def test_batches_hold_neighbours_of_one_size_in_order_and_a_fault_in_reading_ahead_is_raised():
    shapes = [(4, 4), (4, 4), (4, 4), (6, 4), (4, 4)]
    pairs = [(index, np.full((*shape, 3), index)) for index, shape in enumerate(shapes)]
    batches = list(read_ahead(batches_of_one_size(pairs, 2)))
    assert [members for members, _ in batches] == [[0, 1], [2], [3], [4]]
    assert [images.shape[1:3] for _, images in batches] == [(4, 4), (4, 4), (6, 4), (4, 4)]
    assert list(batches_of_one_size([], 2)) == []

    def broken():
        yield 1
        raise DataError("cut off")

    with pytest.raises(DataError, match="cut off"):
        list(read_ahead(broken()))


# ----------------------------------------------------------------------------------------------------------------- scores


def test_scores_over_a_split_are_those_of_mmsegmentations_metric_on_the_same_predictions(tiles, checkpoint):
    from mmseg.evaluation import IoUMetric

    scores = evaluate(checkpoint, tiles, tiles.parent)
    metric, critic = IoUMetric(iou_metrics=["mIoU", "mDice"]), load_critic(checkpoint)
    metric.dataset_meta = {"classes": CLASSES}
    for _, images, labels in tile_batches(tiles, tiles.parent, 3):
        for prediction, label in zip(predict(critic, images), labels, strict=True):
            data = {"pred_sem_seg": {"data": torch.from_numpy(prediction)}, "gt_sem_seg": {"data": torch.from_numpy(label)}}
            metric.process({}, [data])
    matrix = np.array(scores["confusion"])
    hits, union, predicted, labelled = (sum(areas).numpy() for areas in zip(*metric.results, strict=True))
    assert np.array_equal(np.diag(matrix), hits) and np.array_equal(matrix.sum(0), predicted) and np.array_equal(matrix.sum(1), labelled)
    assert np.array_equal(union, matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    theirs = metric.compute_metrics(metric.results)
    assert 0 < theirs["mIoU"] < 100
    for key, name in (("OA", "aAcc"), ("mIoU", "mIoU"), ("mAcc", "mAcc"), ("mF1", "mDice")):
        assert round(scores[key], 2) == pytest.approx(float(theirs[name]), abs=1e-4), key


def test_scores_say_how_they_came_about_and_are_written_as_json(tiles, checkpoint):
    how = Evaluation(mode="slide", window=16, stride=8, flip=True, batch_size=3)
    scores = evaluate(checkpoint, tiles, tiles.parent, evaluation=how)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert scores["tiles"] == 7 and scores["classes"] == CLASSES
    assert scores["evaluation"] == {"mode": "slide", "window": 16, "stride": 8, "scales": [1.0], "flip": True, "batch_size": 3}
    assert scores["confusion"] != evaluate(checkpoint, tiles, tiles.parent)["confusion"]


def test_a_batch_of_another_size_changes_rounding_and_nothing_else(tiles, checkpoint):
    critic, images = load_critic(checkpoint), next(tile_batches(tiles, tiles.parent, 7))[1]
    for how in (Evaluation(), Evaluation(mode="slide", window=24, flip=True)):
        together = class_maps(critic, as_input(images), how)
        alone = torch.cat([class_maps(critic, as_input(image[None]), how) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        sizes = [how.model_copy(update={"batch_size": size}) for size in (1, 5)]
        one, other = (np.array(evaluate(checkpoint, tiles, tiles.parent, evaluation=how)["confusion"]) for how in sizes)
        assert np.abs(one - other).sum() <= 0.001 * one.sum()


def test_a_class_that_the_split_lacks_has_no_score_and_the_log_says_so(tmp_path, checkpoint, capsys):
    manifest = write_tiles(tmp_path / "test.parquet", 3)
    for row in read_manifest(manifest).itertuples():
        label = read_label(tmp_path / row.label)
        write_raster(tmp_path / row.label, np.where(label == 2, 255, label).astype(np.uint8))
    scores = evaluate(checkpoint, manifest, tmp_path)
    assert scores["Acc"][2] is None and not any(scores["confusion"][2])
    assert scores["mAcc"] == pytest.approx(np.mean(scores["Acc"][:2]))
    assert "test.parquet: no pixel is labelled wood; scores that this leaves undefined are null" in capsys.readouterr().out


def test_an_id_outside_the_classes_is_refused_with_the_row(tmp_path, checkpoint):
    manifest = write_tiles(tmp_path / "test.parquet", 3)
    write_raster(tmp_path / "test/labels/t1.png", np.full((32, 32), 3, np.uint8))
    with pytest.raises(DataError, match=r"test\.parquet: row t1: label ids span 3\.\.\.3; with 3 classes"):
        evaluate(checkpoint, manifest, tmp_path)
