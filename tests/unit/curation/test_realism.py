"""Samples beside real tiles, from manifests: distances, diversity, copies of training tiles."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from random_inception import random_inception
from segmentor_tiles import CLASSES, PALETTE, write_tiles
from tiny_clip import write_clip
from tiny_transformers import dpt, processor_of, segformer

from crfm_core import WeightsError
from crfm_core.curation.realism import class_residuals, extract_features, judge_features, measure_generation, memorised_tiles
from crfm_core.data.rasters import read_label, read_rgb, write_raster
from crfm_core.files import write_json
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.metrics.generation import cmmd, diversity, frechet_distance, kernel_distance
from crfm_core.segmentor.critic import Critic, as_critic, load_critic
from crfm_core.segmentor.evaluation import as_input
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.segmentor.preparation import Preparation
from crfm_core.settings import Generation, Judge
from crfm_core.text.clip import load_clip

SIZE, TILES = 64, 12


def textured(labels: np.ndarray, seed: int, strength: float = 25) -> np.ndarray:
    """An image of a mask: its classes' colours, and a smooth texture of its own, uint8 [H,W,3]."""
    coarse = torch.randn(1, 3, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(seed))
    texture = F.interpolate(coarse, labels.shape, mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(np.array(PALETTE)[np.minimum(labels, len(PALETTE) - 1)] + strength * texture, 0, 255).astype(np.uint8)


def replace_images(manifest: Path, images: list[np.ndarray], labels: list[np.ndarray]) -> None:
    table, root = read_manifest(manifest), manifest.parents[1]
    for column, arrays in (("image", images), ("label", labels)):
        for path, array in zip(paths_of(manifest, table, column, root), arrays, strict=True):
            write_raster(path, np.ascontiguousarray(array))


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    """Real tiles, each with a texture of its own."""
    manifest = write_tiles(tmp_path_factory.mktemp("realism") / "tiles" / "train.parquet", TILES, SIZE, prefix="r")
    labels = labels_of(manifest)
    replace_images(manifest, [textured(label, seed) for seed, label in enumerate(labels)], labels)
    return manifest


def labels_of(manifest: Path) -> list[np.ndarray]:
    return [read_label(path) for path in paths_of(manifest, read_manifest(manifest), "label", manifest.parents[1])]


def images_of(manifest: Path) -> list[np.ndarray]:
    return [read_rgb(path) for path in paths_of(manifest, read_manifest(manifest), "image", manifest.parents[1])]


def write_samples(training: Path, name: str, images: list[np.ndarray], labels: list[np.ndarray], copies: int = 1) -> Path:
    """Synthetic tiles beside the real ones: sample i is copy i % copies of mask i // copies."""
    columns = {"mask_of": [f"r{i // copies}" for i in range(len(images))], "copy": [i % copies for i in range(len(images))]}
    manifest = write_tiles(training.parents[1] / "synthetic" / name / "all.parquet", len(images), SIZE, prefix="s", **columns)
    replace_images(manifest, images, labels)
    return manifest


def samples_of_the_same_masks(training: Path, name: str = "own", copies: int = 2) -> Path:
    """What a good generator draws: the colours of the mask's classes, and textures that no real tile has."""
    labels = [label for label in labels_of(training) for _ in range(copies)]
    return write_samples(training, name, [textured(label, 1000 + i) for i, label in enumerate(labels)], labels, copies)


@pytest.fixture(scope="module")
def judge() -> Critic:
    torch.manual_seed(0)
    return Critic(build_model("unet_tiny", len(CLASSES)), CLASSES)


JUDGED_BY = Judge(recipe="reference", segmentor="unet_tiny", seed=1)


# -------------------------------------------------------------------------------------------------------------- copies


def jpeg(image: np.ndarray) -> np.ndarray:
    Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=60)
    return np.array(Image.open(buffer).convert("RGB"))


def noisy(image: np.ndarray) -> np.ndarray:
    return np.clip(image + np.random.default_rng(0).normal(0, 10, image.shape), 0, 255).astype(np.uint8)


ALTERED = {
    "exact": lambda image: image,
    "brightened": lambda image: np.clip(image.astype(int) + 12, 0, 255).astype(np.uint8),
    "more contrast": lambda image: np.clip((image - 128.0) * 1.2 + 128, 0, 255).astype(np.uint8),
    "noisy": noisy,
    "jpeg": jpeg,
}


@pytest.mark.parametrize("mirrored", [False, True], ids=["as it is", "mirrored"])
@pytest.mark.parametrize("altered", ALTERED)
def test_a_copy_of_a_training_tile_is_found_and_samples_of_its_mask_are_not(training, altered, mirrored):
    images, labels = images_of(training), labels_of(training)
    copy, mask = ALTERED[altered](images[5]), labels[5]
    if mirrored:
        copy, mask = copy[:, ::-1], mask[:, ::-1]
    own = [textured(label, 1000 + i) for i, label in enumerate(labels)]
    root = training.parents[1]
    samples = extract_features(write_samples(training, "copies", [*own, copy], [*labels, mask]), root, {})
    found = memorised_tiles(samples, extract_features(training, root, {}))
    assert found["memorised"] == [f"s{TILES}"]
    assert found["neighbours"][0]["tile_id"] == f"s{TILES}" and found["neighbours"][0]["nearest"] == "r5"
    assert found["neighbours"][0]["ratio"] < 0.5 < found["neighbours"][1]["ratio"]
    assert len(found["neighbours"]) == 10 and found["threshold"] == 0.5
    assert [one["ratio"] for one in found["neighbours"]] == sorted(one["ratio"] for one in found["neighbours"])


def test_pixels_alone_would_call_every_sample_of_a_mask_a_copy(training):
    """Why what the mask says is taken away."""
    real, samples = (torch.tensor(np.stack(images), dtype=torch.float32).flatten(1) for images in (
        images_of(training), images_of(samples_of_the_same_masks(training, copies=1))
    ))  # fmt: skip
    distances = torch.cdist(samples, real).sort(dim=1)
    assert distances.indices[:, 0].tolist() == list(range(TILES))
    assert float((distances.values[:, 0] / distances.values[:, 1:].mean(dim=1)).max()) < 0.5


def test_plain_samples_of_one_class_are_no_copies_of_a_plain_training_tile(training):
    images, labels = images_of(training), labels_of(training)
    water = np.full((SIZE, SIZE), 1, np.uint8)
    pair = [
        write_samples(training, name, [*images[1:], textured(water, seed, 2)], [*labels[1:], water])
        for name, seed in (("one", 50), ("two", 60))
    ]
    real, samples = (extract_features(manifest, training.parents[1], {}) for manifest in pair)
    assert f"s{TILES - 1}" not in memorised_tiles(samples, real)["memorised"]
    assert f"s{TILES - 1}" in memorised_tiles(samples, samples)["memorised"]


def test_residuals_are_what_is_left_of_an_image_without_the_mean_colour_of_each_class(training):
    images, labels = np.stack(images_of(training)[:2]), np.stack(labels_of(training)[:2])
    expected = images.astype(np.float64)
    for image, label in zip(expected, labels, strict=True):
        for one in np.unique(label):  # ignored pixels among them
            image[label == one] -= image[label == one].mean(axis=0)
    expected = expected.reshape(2, 32, 2, 32, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(2, -1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(class_residuals(images, labels).float().numpy(), expected, atol=2e-4)
    assert not class_residuals(np.full((1, 48, 40, 3), 7, np.uint8), np.zeros((1, 48, 40), np.uint8)).any()


def test_of_a_single_training_tile_nothing_can_be_said(training):
    root = training.parents[1]
    single = extract_features(write_samples(training, "single", images_of(training)[:1], labels_of(training)[:1]), root, {})
    assert memorised_tiles(extract_features(training, root, {}), single) == {"neighbours": [], "memorised": [], "threshold": 0.5}


# ------------------------------------------------------------------------------------------------------------ features


def test_the_judges_features_are_its_deepest_map_averaged_over_the_image(training, judge):
    images = np.stack(images_of(training)[:3])
    maps = judge.network.extract_feat((as_input(images) - judge.mean) / judge.std)
    deepest = max(maps, key=lambda one: one.shape[1])
    assert deepest.shape == (3, 128, 4, 4)
    extract = judge_features(judge)
    torch.testing.assert_close(extract(images), deepest.mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)
    alone = torch.cat([extract(image[None]) for image in images])
    torch.testing.assert_close(alone, extract(images), rtol=1e-4, atol=1e-5)


def test_what_an_image_is_padded_by_is_no_part_of_its_features(training, judge):
    images = np.stack(images_of(training)[:3])[:, :40, :24]
    larger = Critic(judge.network, CLASSES, Preparation(size=(96, 96), divisor=32))
    padded = F.pad((as_input(images) - judge.mean) / judge.std, (0, 72, 0, 56))
    deepest = max(judge.network.extract_feat(padded), key=lambda one: one.shape[1])
    assert deepest.shape == (3, 128, 6, 6)  # 3 x 2 of these cells show the image
    torch.testing.assert_close(judge_features(larger)(images), deepest[..., :3, :2].mean(dim=(2, 3)), rtol=1e-5, atol=1e-6)


def test_a_judge_of_transformers_shows_its_hidden_states(tmp_path, training):
    images = np.stack(images_of(training)[:2])
    for build, deepest in (
        (segformer, lambda states: max(states, key=lambda one: one.shape[1]).mean(dim=(2, 3))),
        (dpt, lambda states: states[-1].mean(dim=1)),
    ):
        torch.manual_seed(0)
        folder = tmp_path / build.__name__
        for part in (build(), processor_of("Segformer")):
            part.save_pretrained(folder)
        critic = load_critic(folder, classes=CLASSES)
        states = critic.network((as_input(images) - critic.mean) / critic.std, output_hidden_states=True).hidden_states
        features = judge_features(critic)(images)
        assert features.shape == (2, 32)
        torch.testing.assert_close(features, deepest(states), rtol=1e-5, atol=1e-5)


def test_tiles_of_several_sizes_are_seen_each_at_its_own(training, judge, tmp_path):
    root = tmp_path / "d"
    manifest = write_tiles(root / "tiles" / "mixed.parquet", 3, SIZE)
    images, labels = images_of(manifest), labels_of(manifest)
    images[1], labels[1] = images[1][:32, :48], labels[1][:32, :48]
    replace_images(manifest, images, labels)
    extract = judge_features(judge)
    seen = extract_features(manifest, root, {"judge": extract}, batch_size=2)
    torch.testing.assert_close(seen.features["judge"], torch.cat([extract(image[None]) for image in images]), rtol=1e-4, atol=1e-5)
    assert seen.residuals.shape == (3, 3 * 32 * 32)
    assert len(seen.table) == 3


# --------------------------------------------------------------------------------------------------------- all together


def test_samples_are_compared_with_real_tiles_by_the_judge(training, judge):
    root, synthetic = training.parents[1], samples_of_the_same_masks(training)
    settings = Generation(features="judge", subset=8, batch_size=5)
    result = measure_generation(synthetic, training, training, root, settings, judge=judge, judged_by=JUDGED_BY)
    extract = judge_features(judge)
    real, samples = (extract(np.stack(images_of(manifest))) for manifest in (training, synthetic))
    kid, deviation, subset = kernel_distance(real, samples, 8)
    assert list(result) == [
        "features", "kind", "real", "samples", "fid", "kid", "kid_sd", "subset", "missing", "cmmd", "cmmd_missing", "diversity",
        "neighbours", "memorised", "threshold",
    ]  # fmt: skip
    assert result["features"] == "deepest features of the judge, unet_tiny on reference, seed 1"
    assert (result["kind"], result["real"], result["samples"]) == ("judge", {"split": "train", "tiles": TILES}, 2 * TILES)
    assert result["fid"] == pytest.approx(frechet_distance(real, samples), rel=1e-3)
    assert (result["kid"], result["kid_sd"]) == (pytest.approx(kid, rel=1e-3), pytest.approx(deviation, rel=1e-3))
    assert (result["subset"], result["missing"], result["cmmd"], result["cmmd_missing"]) == (subset, "", None, "")
    masks = [i // 2 for i in range(2 * TILES)]
    assert result["diversity"] == {
        "copies": pytest.approx(diversity(samples, masks), rel=1e-3),
        "real": pytest.approx(diversity(real), rel=1e-3),
    }
    assert result["diversity"]["copies"] > 0 and result["memorised"] == []
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_copies_that_are_all_the_same_have_no_diversity_and_other_colours_are_farther_away(training, judge):
    root, settings = training.parents[1], Generation(features="judge")
    labels = [label for label in labels_of(training) for _ in range(2)]
    same = write_samples(training, "same", [textured(label, 1000 + i // 2) for i, label in enumerate(labels)], labels, copies=2)
    off = write_samples(training, "off", [255 - textured(label, 1000 + i) for i, label in enumerate(labels)], labels, copies=2)
    near, alike, far = (
        measure_generation(manifest, training, training, root, settings, judge=judge)
        for manifest in (samples_of_the_same_masks(training), same, off)
    )
    assert alike["diversity"]["copies"] == pytest.approx(0, abs=1e-6) and near["diversity"]["copies"] > 1e-5
    assert far["fid"] > 2 * near["fid"] and far["kid"] > near["kid"]


def test_real_tiles_may_be_others_than_those_trained_on(training, judge):
    root = training.parents[1]
    copied = write_samples(training, "copied", images_of(training)[:3], labels_of(training)[:3])
    other = write_tiles(root / "tiles" / "reference.parquet", 5, SIZE, seed=7, prefix="o")
    result = measure_generation(copied, other, training, root, Generation(features="judge"), judge=judge)
    assert result["real"]["tiles"] == 5 and result["subset"] == 3
    assert sorted(result["memorised"]) == ["s0", "s1", "s2"]
    assert {one["tile_id"]: one["nearest"] for one in result["neighbours"]} == {"s0": "r0", "s1": "r1", "s2": "r2"}


def test_embeddings_of_clip_give_distances_and_cmmd(training, judge, tmp_path):
    root, synthetic, folder = training.parents[1], samples_of_the_same_masks(training), write_clip(tmp_path / "clip")
    real, samples = (load_clip(folder).image_features(np.stack(images_of(manifest))) for manifest in (training, synthetic))
    write_json(tmp_path / "clip_model.json", {"folder": str(folder), "repo": "a/b", "revision": "0" * 40})
    beside = measure_generation(
        synthetic, training, training, root, Generation(cmmd=True), judge=judge, judged_by=JUDGED_BY, clip=tmp_path / "clip_model.json"
    )
    assert beside["kind"] == "judge" and beside["fid"] is not None
    assert beside["cmmd"] == pytest.approx(cmmd(real, samples), rel=1e-3) and beside["cmmd"] > 0
    alone = measure_generation(synthetic, training, training, root, Generation(features="clip"), clip=folder)
    assert alone["features"] == "embeddings of clip (clip)" and alone["cmmd"] is None and alone["cmmd_missing"] == ""
    assert alone["fid"] == pytest.approx(frechet_distance(real, samples), rel=1e-3)


def no_weights(folder: Path) -> dict:
    return {"weights": None}


def no_file(folder: Path) -> dict:
    return {"weights": folder / "w.pth"}


def not_fetched(folder: Path) -> dict:
    write_json(folder / "inception.json", {"missing": "no network"})
    return {"weights": folder / "inception.json"}


def fetched_and_lost(folder: Path) -> dict:
    write_json(folder / "inception.json", {"file": str(folder / "w.pth"), "url": "u", "sha256": "0" * 64})
    return {"weights": folder / "inception.json"}


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (no_weights, "no weights .* are named"),
        (no_file, r"not there \(.*w\.pth"),
        (not_fetched, "^no network$"),
        (fetched_and_lost, r"not there \(.*w\.pth"),
    ],
)
def test_without_the_weights_of_inception_there_is_a_reason_and_all_the_rest(training, tmp_path, give, reason):
    root = training.parents[1]
    copied = write_samples(training, "without", images_of(training)[:2], labels_of(training)[:2])
    result = measure_generation(copied, training, training, root, Generation(features="inception"), **give(tmp_path))
    assert [result[key] for key in ("fid", "kid", "kid_sd", "subset", "diversity")] == [None] * 4 + [{"copies": None, "real": None}]
    assert re.search(reason, result["missing"])
    assert (result["kind"], result["features"], sorted(result["memorised"])) == ("inception", "InceptionV3", ["s0", "s1"])


def test_with_the_weights_of_inception_there_are_fid_and_kid(training, tmp_path):
    root, weights = training.parents[1], random_inception(tmp_path)
    few = write_samples(training, "few", images_of(training)[:3], labels_of(training)[:3])
    write_json(tmp_path / "inception.json", {"file": str(weights), "url": "u", "sha256": "0" * 64})
    settings = Generation(features="inception")
    result = measure_generation(few, few, training, root, settings, weights=tmp_path / "inception.json")
    assert result["features"] == "last pooling of InceptionV3, random.pth" and result["missing"] == ""
    assert result["fid"] == pytest.approx(0, abs=1e-6) and result["subset"] == 3
    assert result["kid"] < 0  # the unbiased estimator of a set beside itself
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"random\.pth: is damaged"):
        measure_generation(few, few, training, root, settings, weights=weights)


class NoNumbers(torch.nn.Module):
    """A segmentor whose features are no numbers."""

    def extract_feat(self, inputs):
        return [inputs.mean(dim=(2, 3), keepdim=True) / 0 * 0]


@pytest.mark.parametrize(
    ("network", "samples", "reason"),
    [
        (torch.nn.Conv2d(3, 3, 1), 2, "gives no features"),
        (NoNumbers(), 2, "are no numbers"),
        (None, 1, "12 real and 1 synthetic tiles; a distance takes two of each"),
    ],
    ids=["a judge without feature maps", "a judge without numbers", "one sample"],
)
def test_what_the_judge_cannot_measure_has_a_reason(training, judge, network, samples, reason):
    root = training.parents[1]
    manifest = write_samples(training, "reasons", images_of(training)[:samples], labels_of(training)[:samples])
    who = as_critic(network, CLASSES) if network else judge
    result = measure_generation(manifest, training, training, root, Generation(features="judge"), judge=who)
    assert reason in result["missing"]
    assert (result["fid"], result["kid"], result["diversity"]["copies"]) == (None, None, None)
    assert len(result["memorised"]) == samples
