"""Distances of samples from real tiles by features of both, and InceptionV3, whose features FID and KID are defined by."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Program, would_run
from random_inception import random_inception

from crfm_core import WeightsError
from crfm_core.metrics.generation import cmmd, diversity, frechet_distance, kernel_distance, nearest_references
from crfm_core.metrics.inception import Inception, load_fidelity, why_no_inception


def draw(count: int, dimensions: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Features that are correlated and not normal."""
    mixing = np.random.default_rng(99).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    mixed = np.random.default_rng(seed).normal(size=(count, dimensions)) @ mixing
    return mixed + 0.3 * mixed**2 + shift


def with_moments(count: int, mean: np.ndarray, variances: np.ndarray, seed: int, columns: int) -> np.ndarray:
    """Features whose sample mean is ``mean`` and whose sample covariance is diagonal, and 0 in columns added up to ``columns``."""
    centred = np.random.default_rng(seed).normal(size=(count, len(mean)))
    centred -= centred.mean(axis=0)
    white = np.linalg.svd(centred, full_matrices=False)[0] * np.sqrt(count - 1)
    return np.pad(white * np.sqrt(variances) + mean, ((0, 0), (0, columns - len(mean))))


@pytest.mark.parametrize(("counts", "columns"), [((50, 40), 5), ((6, 7), 5), ((6, 50), 12)], ids=["many", "barely", "singular"])
def test_the_frechet_distance_of_diagonal_covariances_is_the_closed_form(counts, columns):
    means, variances = np.array([[0, 1, 2, 3, 4], [0.5, 1, -2, 3, 5]]), np.array([[1, 2, 3, 4, 5], [1, 0.5, 0, 9, 2]])
    pair = [with_moments(counts[k], means[k], variances[k], k, columns) for k in (0, 1)]
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [4, 300])
def test_features_have_no_frechet_distance_from_themselves_and_a_shift_squared_from_themselves_shifted(count):
    features = torch.tensor(draw(count))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(6 * 2**2, rel=1e-9)


def test_the_frechet_distance_is_that_of_torch_fidelity_and_the_same_both_ways():
    load_fidelity()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one, other = torch.tensor(draw(300)), torch.tensor(draw(200, seed=1, shift=0.3))
    theirs = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(other), False)
    assert frechet_distance(one, other) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)


def test_the_kernel_distance_is_that_of_torch_fidelity():
    load_fidelity()
    from torch_fidelity.metric_kid import kernel_mmd

    one, other = draw(40), draw(40, seed=1, shift=0.3)
    mean, deviation, subset = kernel_distance(one, other, subset=100)
    assert mean == pytest.approx(kernel_mmd(one, other), rel=1e-9)
    assert (deviation, subset) == (None, 40)  # one draw of all has no deviation


def test_the_kernel_distance_averages_subsets_that_its_seed_draws():
    one, other = draw(90), draw(60, seed=1, shift=0.3)
    mean, deviation, subset = kernel_distance(one, other, subset=30)
    assert kernel_distance(one, other, subset=30) == (mean, deviation, subset)
    assert kernel_distance(one, other, subset=30, seed=1)[0] != mean
    assert kernel_distance(one, other, subset=100)[2] == 60
    whole = kernel_distance(one[:60], other, subset=60)[0]
    assert deviation > 0 and abs(mean - whole) < 3 * deviation  # 100 draws of it lie around


def test_the_kernel_distance_is_unbiased_so_that_small_sets_of_one_distribution_are_about_0_apart():
    near = [kernel_distance(draw(10, seed=k), draw(10, seed=1000 + k))[0] for k in range(400)]
    far = [kernel_distance(draw(10, seed=k), draw(10, seed=1000 + k, shift=0.5))[0] for k in range(400)]
    assert abs(np.mean(near)) < 3 * np.std(near) / 20 < np.mean(far)
    assert min(near) < 0


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_one_image_has_no_distance(distance):
    with pytest.raises(ValueError, match="two or more"):
        distance(draw(1), draw(5))


def test_cmmd_is_the_biased_estimator_over_all_pairs_however_it_is_chunked():
    one, other = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (draw(13), draw(9, seed=1, shift=1)))

    def kernel(a, b):
        return np.mean([[np.exp(-((x - y) ** 2).sum() / 200) for y in b] for x in a])

    expected = 1000 * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))
    assert expected > 0.01
    assert cmmd(torch.tensor(one), torch.tensor(other)) == pytest.approx(expected, rel=1e-9)
    assert cmmd(one, other, chunk=4) == pytest.approx(expected, rel=1e-9)
    assert cmmd(one, one) == pytest.approx(0, abs=1e-9)


def test_diversity_is_one_less_the_mean_cosine_of_pairs_within_each_group():
    features, groups = draw(7, shift=0.2), ["a", "b", "a", "b", "a", "c", "b"]

    def of(rows):
        pairs = [(features[i], features[j]) for i in rows for j in rows if i < j]
        return np.mean([1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs])

    assert diversity(features) == pytest.approx(of(range(7)))
    assert diversity(features, groups) == pytest.approx((of([0, 2, 4]) + of([1, 3, 6])) / 2)
    assert diversity(features[[0, 0, 0]]) == pytest.approx(0, abs=1e-12)
    assert diversity(features, range(7)) is None


def test_the_nearest_reference_is_named_and_set_against_the_next_ones():
    samples, known = draw(8), draw(30, seed=1)
    index, ratio = nearest_references(samples, [known], others=10)
    for row, sample in enumerate(samples):
        distances = np.linalg.norm(known - sample, axis=1)
        assert index[row] == distances.argmin()
        assert ratio[row] == pytest.approx(distances.min() / np.sort(distances)[1:11].mean(), rel=1e-4)
    np.testing.assert_allclose(nearest_references(samples, [known], others=10, chunk=3)[1], ratio, rtol=1e-5)


def test_a_copy_is_found_in_any_of_the_sets_and_stands_out_from_what_is_drawn_alike():
    known = np.random.default_rng(1).normal(size=(80, 200))
    samples = np.concatenate([np.random.default_rng(0).normal(size=(20, 200)), known[[7, 3]][:, ::-1]])
    index, ratio = nearest_references(samples, [known, known[:, ::-1].copy()])
    assert index[-2:].tolist() == [7, 3]
    assert ratio[-2:].max() < 0.01 and ratio[:-2].min() > 0.5
    assert nearest_references(samples, [known])[1].min() > 0.5


def test_few_references_and_equal_ones_are_no_fault():
    known = draw(3)
    assert np.isnan(nearest_references(known[:1], [known[:1]])[1][0])
    distances = sorted(np.linalg.norm(known - 1, axis=1))
    assert nearest_references(np.ones((1, 6)), [known])[1][0] == pytest.approx(distances[0] / np.mean(distances[1:]), rel=1e-4)
    assert nearest_references(known[:1], [known[[0, 0, 0]]])[1][0] == 1  # as near as all others: nothing stands out


# ----------------------------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def test_inception_features_are_the_librarys_own_whatever_the_batch(weights, images):
    network = load_fidelity()("own", ["2048"], feature_extractor_weights_path=weights)
    (expected,) = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    features = Inception(weights).image_features(images)
    assert features.shape == (3, 2048) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    scale = float(features.std())
    assert float((features[0] - features[1]).abs().mean()) > 0.01 * scale
    alone = torch.cat([Inception(weights).image_features(image[None]) for image in images])
    torch.testing.assert_close(alone, features, rtol=1e-4, atol=1e-4 * scale)


def test_what_stands_in_for_torchvision_is_gone_after_the_import():
    load_fidelity()
    kept = [name for name in sys.modules if name.split(".")[0] == "torchvision" and type(sys.modules[name]).__name__ == "_NoVision"]
    assert kept == []
    if importlib.util.find_spec("torchvision") is None:
        from transformers.utils import is_torchvision_available

        assert not is_torchvision_available()


def hostile(folder: Path, weights: Path):
    torch.save({"fc.bias": Program(Path.touch, folder / "touched")}, folder / "w.pth")


def hostile_beside_the_weights(folder: Path, weights: Path):
    torch.save({**torch.load(weights, weights_only=True), "more": Program(Path.touch, folder / "touched")}, folder / "w.pth")


def of_another_network(folder: Path, weights: Path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "w.pth")


def of_other_sizes(folder: Path, weights: Path):
    torch.save({**torch.load(weights, weights_only=True), "fc.weight": torch.zeros(1000, 2048)}, folder / "w.pth")


def a_list(folder: Path, weights: Path):
    torch.save([torch.zeros(2)], folder / "w.pth")


def cut_short(folder: Path, weights: Path):
    (folder / "w.pth").write_bytes(weights.read_bytes()[:100_000])


def a_web_page(folder: Path, weights: Path):
    (folder / "w.pth").write_text("<html>not found</html>")


def nothing(folder: Path, weights: Path):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hostile, r"w\.pth: holds more than weights"),
        (hostile_beside_the_weights, r"w\.pth: holds more than weights"),
        (of_another_network, r"w\.pth does not fit torch-fidelity's InceptionV3"),
        (of_other_sizes, r"does not fit .*fc\.weight"),
        (a_list, r"w\.pth: holds no state dict"),
        (cut_short, r"w\.pth: is damaged"),
        (a_web_page, r"w\.pth: is damaged"),
        (nothing, r"w\.pth: there is no such file"),
    ],
)
def test_a_file_that_holds_no_weights_of_inception_is_refused_and_not_run(tmp_path, weights, make, message):
    make(tmp_path, weights)
    with pytest.raises(WeightsError, match=rf"^generation\.weights: .*{message}"):
        Inception(tmp_path / "w.pth")
    assert not (tmp_path / "touched").exists()


def test_the_hostile_file_of_these_tests_would_do_harm_if_it_were_run(tmp_path, weights):
    hostile(tmp_path, weights)
    assert would_run(tmp_path / "w.pth", tmp_path / "touched")


def test_what_is_missing_for_inception_is_said(tmp_path, weights, monkeypatch):
    assert why_no_inception(weights) == ""
    assert why_no_inception(None) == "no weights of InceptionV3 are named (generation.weights)"
    assert why_no_inception(tmp_path / "w.pth") == f"the weights of InceptionV3 are not there ({tmp_path / 'w.pth'})"
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert why_no_inception(weights) == "torch-fidelity is not installed"
