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
    from crfm_core.segmentor.openmmlab import load_mmseg

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
