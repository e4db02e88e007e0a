"""Predictions for a benchmark's own server: one zip file of what it scores, made again from where a stopped run was."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segmentors import network_of, pictures, write_checkpoint
from torch import nn

from crfm_core import ConfigError, DataError
from crfm_core.data.rasters import read_label
from crfm_core.data.sources import SceneSource, open_source
from crfm_core.segmentor import prediction
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.segmentor.prediction import predict_raster, zip_predictions
from crfm_core.settings import Dataset, Evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("submission") / "checkpoint.pth", network_of(0).state_dict())


LOVEDA = ("background", "building", "road", "water", "barren", "forest", "agriculture")


def loveda(order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6), **changes) -> Dataset:
    """LoveDA with its classes in another order: class k is the k-th of ``order``."""
    label_map = {0: 255, **{raw + 1: new for new, raw in enumerate(order)}}
    names = [LOVEDA[raw] for raw in order]
    content = {"name": "loveda", "classes": names, "palette": ["#000000"] * 7, "label_map": label_map, "source": {"kind": "loveda"}}
    return Dataset(**content | {"tile": {"size": 32}, "test": "val"} | changes)


def source(folder: Path, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6), **changes) -> SceneSource:
    return open_source(loveda(order, source={"kind": "loveda", "root": str(folder)}, **changes))


@pytest.fixture
def official(tmp_path) -> Path:
    """LoveDA's Test/ with a few small images."""
    for area, numbers in (("Urban", (5167, 4191)), ("Rural", (12, 4192))):
        folder = tmp_path / "LoveDA" / "Test" / area / "images_png"
        folder.mkdir(parents=True)
        for number in numbers:
            Image.fromarray(pictures(48, 40 + number % 7, 1)[0]).save(folder / f"{number}.png")
    return tmp_path / "LoveDA"


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A checkpoint of LoveDA's classes in an order of names, and the critic it is."""

    def store(names: list[str]) -> Path:
        torch.manual_seed(1)
        network = build_model("segformer_tiny", 7)
        nn.init.normal_(network.decode_head.conv_seg.weight)
        return write_checkpoint(tmp_path_factory.mktemp("seven") / "checkpoint.pth", network.state_dict(), names)

    return store


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5, 6), (6, 0, 3, 1, 2, 5, 4)])
def test_the_submission_holds_a_label_of_the_servers_ids_for_each_test_image(tmp_path, official, seven, order):
    own, out = source(official, order), tmp_path / "out" / "seed0.zip"
    checkpoint = seven(own.dataset.classes)
    zip_predictions(checkpoint, own, out, tmp_path / "work", Evaluation(batch_size=1))
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["12.png", "4191.png", "4192.png", "5167.png"] and archive.testzip() is None
        archive.extractall(tmp_path / "submitted")
    ids, critic = np.array(order, np.uint8), load_critic(checkpoint)
    for image in own.submission_images():
        predict_raster(critic, image, tmp_path / "scene.png", own.dataset.tile, Evaluation(batch_size=1))
        with Image.open(tmp_path / "submitted" / image.name) as submitted:
            assert submitted.mode == "L"
            assert np.array_equal(np.array(submitted), ids[read_label(tmp_path / "scene.png")])
    assert not (tmp_path / "work").exists()
    first = out.read_bytes()
    zip_predictions(checkpoint, own, out, tmp_path / "work", Evaluation(batch_size=1))
    assert out.read_bytes() == first


def test_a_stopped_submission_goes_on_and_another_checkpoint_begins_anew(tmp_path, official, seven, monkeypatch):
    own, out, work, done = source(official), tmp_path / "seed0.zip", tmp_path / "work", []
    checkpoint, labels_of = seven(own.dataset.classes), prediction.label_rows

    def stopping(critic, picture, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(Path(picture.name).name)
        return labels_of(critic, picture, *arguments)

    monkeypatch.setattr(prediction, "label_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        zip_predictions(checkpoint, own, out, work)
    assert not out.exists()
    done.clear()
    os.truncate(work / "4191.png", (work / "4191.png").stat().st_size // 2)
    with pytest.raises(KeyboardInterrupt):
        zip_predictions(checkpoint, own, out, work)
    assert done == ["4191.png", "4192.png"], "what is cut off is predicted again"
    done.clear()
    zip_predictions(checkpoint, own, out, work)
    assert done == ["5167.png"] and zipfile.ZipFile(out).namelist()[0] == "12.png"
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        zip_predictions(checkpoint, own, out, work)
    other = torch.load(checkpoint, weights_only=True)
    other["state_dict"]["decode_head.conv_seg.bias"] += 1
    torch.save(other, tmp_path / "other.pth")
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        zip_predictions(tmp_path / "other.pth", own, out, work)
    assert done == ["12.png", "4191.png"]


def test_a_test_folder_that_is_not_whole_is_refused_with_the_remedy(official):
    (official / "Test" / "Rural" / "images_png" / "5167.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"Rural/images_png/5167\.png and \S*Urban/images_png/5167\.png have one number.*unpack Test\.zip"):
        source(official).submission_images()
    (official / "Test" / "Rural" / "images_png" / "5167.png").rename(official / "Test" / "Rural" / "images_png" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: its name is no number"):
        source(official).submission_images()
    (official / "Test" / "Rural").rename(official / "elsewhere")
    with pytest.raises(DataError, match=r"Test/Rural/images_png: no images .*unpack Test\.zip of https://zenodo"):
        source(official).submission_images()


@pytest.mark.parametrize(
    "changes",
    [
        {"label_map": None},
        {"label_map": {0: 255, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 5}},
        {"label_map": {0: 6, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 255}},
    ],
)
def test_classes_that_the_server_does_not_have_are_refused(changes):
    with pytest.raises(ConfigError, match=r"label_map: LoveDA's server scores the ids 1\.\.\.7, each a class of its own, and loveda maps"):
        open_source(loveda(**changes)).submission_ids()


def test_scales_of_training_scenes_are_refused_for_images_that_are_not_listed(tmp_path, official, checkpoint):
    own = source(official, tile={"size": 32, "scale": {"over": "dataset"}})
    with pytest.raises(ConfigError, match=r"tile\.scale\.over: loveda scales by its training scenes"):
        zip_predictions(checkpoint, own, tmp_path / "x.zip", tmp_path / "work")
