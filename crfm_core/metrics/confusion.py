"""Accuracy, IoU and F1 from one confusion matrix over a whole split."""

from __future__ import annotations

from typing import Any

import numpy as np

from crfm_core import DataError

#: The scores of :meth:`ConfusionMatrix.scores` over all classes by which segmentors and samples are compared.
OVERALL_SCORES = ("OA", "mIoU", "mAcc")


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over all pixels that are not ignored.

    ``matrix`` is int64 [K,K], rows are labels, columns predictions.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, predictions: Any, labels: Any) -> ConfusionMatrix:
        """Count pixels: class ids in numpy arrays or torch tensors of any shape, the same for both.

        Raises DataError when the shapes differ or an id (other than the ignored one in labels) is not in 0...K-1.
        """
        predictions, labels = _as_array(predictions), _as_array(labels)
        if predictions.shape != labels.shape:
            raise DataError(f"predictions {predictions.shape} and labels {labels.shape} must have the same shape")
        valid = labels != self.ignore_index
        predictions, labels = predictions[valid].astype(np.int64), labels[valid].astype(np.int64)
        for name, ids in (("prediction", predictions), ("label", labels)):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.num_classes:
                raise DataError(f"{name} ids span {ids.min()}...{ids.max()}; with {self.num_classes} classes they must be below that")
        pairs = np.bincount(labels * self.num_classes + predictions, minlength=self.num_classes**2)
        self.matrix += pairs.reshape(self.num_classes, self.num_classes)
        return self

    def merge(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """Add the counts of another matrix over the same classes."""
        if other.num_classes != self.num_classes:
            raise DataError(f"cannot merge confusion matrices of {self.num_classes} and {other.num_classes} classes")
        self.matrix += other.matrix
        return self

    def scores(self) -> dict:
        """Percentages: OA, mIoU, mAcc, mF1 and lists per class IoU, Acc (recall), F1; None where undefined.

        A class counts in mIoU and mF1 when it occurs in label or prediction, in mAcc when it occurs in the labels, as in
        mmsegmentation's IoUMetric (mIoU, mDice).
        """
        hits = np.diag(self.matrix).astype(np.float64)
        labelled, predicted = self.matrix.sum(axis=1), self.matrix.sum(axis=0)
        iou = _percent(hits, labelled + predicted - hits)
        recall = _percent(hits, labelled)
        f1 = _percent(2 * hits, labelled + predicted)
        return {
            "OA": _plain(_percent(hits.sum(), labelled.sum())),
            "mIoU": _mean(iou),
            "mAcc": _mean(recall),
            "mF1": _mean(f1),
            "IoU": [_plain(value) for value in iou],
            "Acc": [_plain(value) for value in recall],
            "F1": [_plain(value) for value in f1],
        }


def _as_array(ids: Any) -> np.ndarray:
    return np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)


def _percent(part: Any, whole: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.divide(part, whole)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
