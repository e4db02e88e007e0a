"""Scores from the confusion matrix."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from crfm_core import DataError
from crfm_core.metrics.confusion import ConfusionMatrix


def _random(num_classes, absent=(), shape=(3, 40, 40), seed=0):
    rng = np.random.default_rng(seed)
    allowed = [c for c in range(num_classes) if c not in absent]
    labels, predictions = rng.choice(allowed, shape), rng.choice(allowed, shape)
    predictions = np.where(rng.random(shape) < 0.6, labels, predictions)
    labels = np.where(rng.random(shape) < 0.1, 255, labels)
    return predictions.astype(np.uint8), labels.astype(np.uint8)


@pytest.mark.parametrize("absent", [(), (2,), (0, 4)])
def test_scores_equal_those_of_mmsegmentation(absent):
    from crfm_core.segmentor.mmseg.networks import load_mmseg

    load_mmseg()
    from mmseg.evaluation import IoUMetric

    predictions, labels = _random(5, absent)
    areas = IoUMetric.intersect_and_union(torch.tensor(predictions), torch.tensor(labels), 5, 255)
    reference = IoUMetric.total_area_to_metrics(*areas, metrics=["mIoU", "mDice"])
    scores = ConfusionMatrix(5).update(predictions, labels).scores()
    for ours, theirs in (("IoU", "IoU"), ("Acc", "Acc"), ("F1", "Dice")):
        np.testing.assert_allclose(np.array(scores[ours], float), 100 * reference[theirs], rtol=1e-5)
        np.testing.assert_allclose(scores["m" + ours], 100 * np.nanmean(reference[theirs]), rtol=1e-5)
    np.testing.assert_allclose(scores["OA"], 100 * reference["aAcc"], rtol=1e-5)


def _drawn(rng):
    """A split of a few images: some classes are absent, some only predicted, some pixels ignored."""
    num_classes = int(rng.integers(2, 12))
    occurring = rng.choice(num_classes, rng.integers(1, num_classes + 1), replace=False)
    guessed = rng.choice(num_classes, rng.integers(1, num_classes + 1), replace=False)
    accuracy, ignored = rng.random(), rng.choice([0.0, 0.2, 0.95])
    tiles = []
    for _ in range(rng.integers(1, 5)):
        shape = tuple(rng.integers(1, 50, 2))
        labels, predictions = rng.choice(occurring, shape), rng.choice(guessed, shape)
        predictions = np.where(rng.random(shape) < accuracy, labels, predictions)
        labels = np.where(rng.random(shape) < ignored, 255, labels)
        tiles.append((predictions.astype(np.uint8), labels.astype(np.uint8)))
    tiles[0][1].flat[0] = occurring[0]  # of a split without any label mmsegmentation has no mean
    return num_classes, tiles


def test_counts_and_rounded_scores_are_those_of_mmsegmentations_metric_in_many_random_splits():
    from crfm_core.segmentor.mmseg.networks import load_mmseg

    load_mmseg()
    from mmseg.evaluation import IoUMetric

    rng, undefined = np.random.default_rng(0), 0
    for _ in range(300):
        num_classes, tiles = _drawn(rng)
        metric, ours = IoUMetric(iou_metrics=["mIoU", "mDice"]), ConfusionMatrix(num_classes)
        metric.dataset_meta = {"classes": [str(index) for index in range(num_classes)]}
        for prediction, label in tiles:
            ours.update(prediction, label)
            metric.results.append(IoUMetric.intersect_and_union(torch.tensor(prediction), torch.tensor(label), num_classes, 255))
        hits, union, predicted, labelled = (sum(areas).numpy() for areas in zip(*metric.results, strict=True))
        assert np.array_equal(np.diag(ours.matrix), hits)
        assert np.array_equal(ours.matrix.sum(0), predicted) and np.array_equal(ours.matrix.sum(1), labelled)
        assert np.array_equal(ours.matrix.sum(0) + ours.matrix.sum(1) - np.diag(ours.matrix), union)
        theirs, scores = metric.compute_metrics(metric.results), ours.scores()
        rounded = {key: np.round(np.float32(scores[key]), 2) for key in ("OA", "mIoU", "mAcc", "mF1")}
        assert rounded == {"OA": theirs["aAcc"], "mIoU": theirs["mIoU"], "mAcc": theirs["mAcc"], "mF1": theirs["mDice"]}
        undefined += None in scores["IoU"]
    assert undefined > 50


def test_counts_stay_whole_numbers_beyond_what_mmsegmentations_floats_can_tell():
    matrix = ConfusionMatrix(2)
    matrix.matrix[0, 0] = 2**53
    assert matrix.update(np.zeros(1), np.zeros(1)).matrix[0, 0] == 2**53 + 1


def test_a_class_counts_in_miou_when_only_predicted_and_not_when_absent():
    scores = ConfusionMatrix(4).update(np.array([0, 1, 2]), np.array([0, 1, 1])).scores()
    assert scores["IoU"] == [100.0, 50.0, 0.0, None]
    assert scores["mIoU"] == pytest.approx(50)
    assert scores["Acc"] == [100.0, 50.0, None, None]
    assert scores["mAcc"] == pytest.approx(75)


def test_ignored_pixels_change_nothing_and_nothing_else_gives_no_score():
    predictions, labels = np.array([0, 1, 0]), np.array([0, 1, 255])
    assert ConfusionMatrix(2).update(predictions, labels).scores()["OA"] == 100
    assert ConfusionMatrix(2).update(np.array([1]), np.array([255])).scores()["mIoU"] is None


def test_parts_merged_equal_the_whole_in_numpy_or_torch():
    predictions, labels = _random(6)
    whole = ConfusionMatrix(6).update(predictions, labels)
    parts = [ConfusionMatrix(6).update(torch.tensor(p), torch.tensor(t)) for p, t in zip(predictions, labels, strict=True)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert (merged.matrix == whole.matrix).all()


@pytest.mark.parametrize(("predictions", "labels"), [([3], [0]), ([0], [3]), ([0, 1], [0])])
def test_ids_outside_the_classes_and_unequal_shapes_are_refused(predictions, labels):
    with pytest.raises(DataError):
        ConfusionMatrix(3).update(np.array(predictions), np.array(labels))


def test_it_needs_no_torch():
    code = "import sys; import crfm_core.metrics.confusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
