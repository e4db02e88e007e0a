"""What a segmentor is trained on: draws by weight, augmentation, class weights."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from crfm_core import ConfigError, DataError
from crfm_core.segmentor import dataset


def test_draws_follow_the_weights_exactly_and_depend_on_nothing_but_seed_and_place():
    def first(count, start=0, seed=0):
        drawn = iter(dataset.WeightedDraws(np.array([3.0, 1.0, 0.0, 1.5]), seed, start))
        return [next(drawn) for _ in range(count)]

    rounds = np.bincount([draw.row for draw in first(600)], minlength=4)
    assert abs(rounds - 600 * np.array([3, 1, 0, 1.5]) / 5.5).max() <= 100
    assert rounds[2] == 0
    assert first(40)[13:] == first(27, start=13)
    assert first(40) != first(40, seed=1)
    equal = iter(dataset.WeightedDraws(np.ones(7), 0))
    assert sorted(next(equal).row for _ in range(7)) == list(range(7))


def test_augmentation_moves_image_and_label_together():
    label = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = np.repeat(label[..., None], 3, axis=2)
    for seed in range(20):
        lit, moved = dataset.augment(image, label, np.random.default_rng(seed))
        brightness = lit[..., 0].ravel()[np.argsort(moved.ravel())]
        assert (np.diff(brightness) >= 0).all()


# -------------------------------------------------------------------------------------------------------- class weights


def _table(pixels, weights):
    return pd.DataFrame({"pixels": pixels, "weight": weights})


@pytest.mark.parametrize(
    ("pixels", "weights", "asked", "ratios"),
    [
        ([[60, 30, 10]], [1.0], "median_frequency", [0.5, 1, 3]),
        ([[60, 0, 10], [0, 30, 0]], [1.0, 1.0], "median_frequency", [0.5, 1, 3]),
        ([[60, 0, 0], [0, 30, 10]], [1.0, 2.0], "median_frequency", [1, 1, 3]),  # the second is drawn twice as often
        ([[60, 30, 0, 10]], [1.0], "median_frequency", [0.5, 1, 0, 3]),  # a class that is never shown
        ([[60, 30, 10]], [1.0], [2.0, 2.0, 2.0], [1, 1, 1]),
        ([[60, 30, 10]], [1.0], [0.0, 1.0, 4.0], [0, 1, 4]),
    ],
)
def test_class_weights_follow_from_the_pixels_drawn_and_weigh_them_one_on_average(pixels, weights, asked, ratios):
    found = np.array(dataset.class_weights(_table(pixels, weights), asked, len(pixels[0])))
    assert found / found.sum() == pytest.approx(np.array(ratios) / sum(ratios))
    shown = np.array(weights) @ np.array(pixels)
    assert found @ shown / shown.sum() == pytest.approx(1)
    assert dataset.class_weights(_table(pixels, weights), None, len(pixels[0])) is None


@pytest.mark.parametrize(
    ("pixels", "asked", "error", "message"),
    [
        ([[0, 0, 0]], "median_frequency", DataError, "no tile that is trained on has a labelled pixel"),
        ([[1, 2]], "median_frequency", DataError, "`pixels` of the manifest does not count 3 classes"),
        ([[9, 0, 0]], [0.0, 1.0, 1.0], ConfigError, "are 0 for every class that the tiles show"),
        ([[9, 1, 1]], [1.0, 1.0], ConfigError, "2 numbers for 3 classes"),
    ],
)
def test_class_weights_that_make_no_sense_are_refused(pixels, asked, error, message):
    with pytest.raises(error, match=message):
        dataset.class_weights(_table(pixels, [1.0]), asked, 3)
