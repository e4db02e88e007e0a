"""Critics from any origin: told apart by what they are, that they run nothing from a checkpoint, and whose classes they know."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from critics import model, save_folder, store, text_of
from hostile import Program, would_run
from mmengine.logging import HistoryBuffer
from paths import CONFIGS, ROOT
from segmentor_tiles import CLASSES
from segmentors import write_checkpoint
from tiny_transformers import segformer
from torch import nn

from crfm_core import WeightsError
from crfm_core.segmentor import critic as critic_module
from crfm_core.segmentor.critic import Critic, as_critic, check_classes, load_critic
from crfm_core.segmentor.mmseg import networks
from crfm_core.segmentor.mmseg.weights import load_backbone
from crfm_core.segmentor.validation import newest_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint as ``train_segmentor`` writes it."""
    torch.manual_seed(0)
    weights = networks.build_model("segformer_tiny", len(CLASSES)).state_dict()
    return write_checkpoint(tmp_path_factory.mktemp("trained") / "checkpoint.pth", weights)


def test_the_critic_is_frozen_differentiable_and_of_full_size(trained):
    critic = load_critic(trained, classes=CLASSES)
    images = torch.rand(2, 3, 40, 56, requires_grad=True)
    logits = critic(images)
    assert logits.shape == (2, len(CLASSES), 40, 56) and critic.classes == CLASSES
    logits.square().mean().backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in critic.parameters())
    assert not critic.train().network.training
    assert torch.equal(critic.logits(images), logits)


def test_missing_damaged_and_foreign_checkpoints_are_refused(trained, tmp_path):
    with pytest.raises(WeightsError, match="there is no such file; make it"):
        load_critic(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(trained.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"cut\.pth: is damaged"):
        load_critic(tmp_path / "cut.pth")
    content = torch.load(trained, weights_only=True)
    for meta, message in (
        ({**content["meta"], "classes": CLASSES[:2]}, "do not fit its own architecture"),
        ({**content["meta"], "segmentor": {"architecture": "vgg"}}, "no segmentor of this workflow"),
        ({"epoch": 1}, "no critic can be read from it .*give one of: .*mmsegmentation"),
        (None, "no critic can be read from it .*give one of: .*mmsegmentation"),
    ):
        torch.save({**content, "meta": meta}, tmp_path / "unfit.pth")
        with pytest.raises(WeightsError, match=rf"unfit\.pth: .*{message}"):
            load_critic(tmp_path / "unfit.pth")


def test_a_checkpoint_that_would_run_code_is_refused_unrun(tmp_path):
    bombs = {r"posix\.mkdir": Program(os.mkdir, str(tmp_path / "ran")), r"getattr\(__init__\)": Program(getattr, HistoryBuffer, "__init__")}
    for reason, bomb in bombs.items():
        torch.save({"state_dict": {}, "meta": {"cfg": text_of(model=model()), "time": bomb}}, tmp_path / "bomb.pth")
        with pytest.raises(WeightsError, match=rf"bomb\.pth: holds more than weights \({reason}\)"):
            load_critic(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


def _zipped(content, path):
    torch.save(content, path)


def _legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _pickled(content, path):
    path.write_bytes(pickle.dumps(content))


def _tarred(content, path):
    """The format of torch 0.1: numbers of storages and tensors, then the pickle."""
    with tarfile.open(path, "w") as archive:
        for name, body in (("storages", pickle.dumps(0)), ("tensors", pickle.dumps(0)), ("pickle", pickle.dumps(content))):
            (path.parent / name).write_bytes(body)
            archive.add(path.parent / name, name)


@pytest.mark.parametrize("write", [_zipped, _legacy, _pickled, _tarred])
@pytest.mark.parametrize(
    "place",
    [
        lambda bomb: bomb,
        lambda bomb: {"state_dict": bomb, "meta": {}},
        lambda bomb: {"state_dict": {"backbone.weight": bomb}},
        lambda bomb: {"state_dict": {}, "meta": {"segmentor": {"architecture": "segformer_tiny"}, "classes": CLASSES, "time": [bomb]}},
        lambda bomb: {"state_dict": {}, "message_hub": {"log_scalars": {"loss": bomb}}},
    ],
    ids=["alone", "as weights", "among weights", "deep in meta", "among logs"],
)
def test_a_program_in_a_checkpoint_never_runs_whatever_its_format_and_whoever_reads_it(tmp_path, write, place):
    path, mark = tmp_path / "bomb.pth", tmp_path / "ran"
    write(place(Program(os.system, f"touch {mark}")), path)
    for read in (load_critic, lambda path: load_backbone(networks.build_model("unet_tiny", 3), path)):
        with pytest.raises(WeightsError, match=r"bomb\.pth: (holds more than weights \(posix\.system\)|is damaged)"):
            read(path)
    assert not mark.exists()
    if write is not _tarred:  # which nothing but an old torch would run
        assert would_run(path, mark)


def test_a_training_goes_on_past_a_checkpoint_that_holds_a_program(tmp_path, capsys):
    torch.save({"state_dict": {}, "meta": {"iter": 2}}, tmp_path / "iter_2.pth")
    torch.save({"state_dict": {}, "meta": {"iter": Program(os.system, f"touch {tmp_path / 'ran'}")}}, tmp_path / "iter_4.pth")
    assert newest_checkpoint(tmp_path) == (tmp_path / "iter_2.pth", 2)
    assert "iter_4.pth: holds more than weights (posix.system)" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------------------------------------------- origins


def test_a_new_origin_of_critics_is_one_module_and_one_entry(tmp_path, monkeypatch):
    class Npz:
        """Stands for a module."""

        READS = "a file of numpy with a matrix of colours to classes"

        @staticmethod
        def recognises(path: Path, meta: dict) -> bool:
            return "colours" in meta

        @staticmethod
        def critic_of(path: Path, weights: dict, meta: dict) -> Critic:
            return as_critic(lambda images: torch.einsum("kc,bchw->bkhw", weights["matrix"], images), meta["colours"])

    torch.save({"state_dict": {"matrix": torch.eye(3)}, "meta": {"colours": ["red", "green", "blue"]}}, tmp_path / "toy.pth")
    with pytest.raises(WeightsError, match=r"toy\.pth: no critic can be read from it"):
        load_critic(tmp_path / "toy.pth")
    monkeypatch.setattr(critic_module, "ORIGINS", [*critic_module.ORIGINS, Npz])
    images = torch.rand(1, 3, 4, 4)
    assert torch.equal(load_critic(tmp_path / "toy.pth", classes=["Red", "Green", "Blue"])(images), images)
    torch.save({"state_dict": {}, "meta": {}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="a matrix of colours to classes"):
        load_critic(tmp_path / "other.pth")


def test_every_kind_of_critic_is_refused_for_other_classes(trained, tmp_path):
    weights = networks.build_segmentor(model()).state_dict()
    mmseg = store(tmp_path / "mmseg.pth", weights, text_of(model=model()))
    for path in (trained, mmseg, save_folder(tmp_path / "model", segformer())):
        with pytest.raises(WeightsError, match="1 is 'water', not 'wood'"):
            load_critic(path, classes=["soil", "wood", "water"])
    nameless = store(tmp_path / "nameless.pth", weights, text_of(model=model()), dataset_meta=None)
    assert load_critic(nameless, classes=["soil", "wood", "water"]).classes == ["0", "1", "2"]


# --------------------------------------------------------------------------------------------------------------------------- torch modules


class _Coarse(nn.Module):
    """Answers at half the size, from images that it takes normalised."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 3, 3, 2, 1), nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.conv(images))


class _Answers:
    def logits(self, images):
        return images * 2


def test_a_torch_module_becomes_a_critic():
    module = _Coarse()
    critic = as_critic(module, CLASSES, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), bgr=True)
    images = torch.rand(2, 3, 10, 14)
    normalised = (images.flip(1) - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected = F.interpolate(module.conv(normalised), (10, 14), mode="bilinear", align_corners=False)
    torch.testing.assert_close(critic.logits(images), expected)
    assert critic.classes == CLASSES and not any(weight.requires_grad for weight in module.parameters())
    assert torch.equal(as_critic(_Answers(), CLASSES)(images), 2 * images)
    assert torch.equal(as_critic(lambda given: given - 1, CLASSES)(images), images - 1)


@pytest.mark.parametrize(
    ("answer", "given"), [(lambda x: x[:, :2], r"shape \(1, 2, 8, 8\)"), (lambda x: {"out": x}, "a dict"), (lambda x: x[0], "shape")]
)
def test_an_answer_that_is_not_one_map_per_class_is_refused(answer, given):
    with pytest.raises(ValueError, match=rf"critic: the network gave {given}.*it must give logits \[B, 3, h, w\]"):
        as_critic(answer, CLASSES)(torch.rand(1, 3, 8, 8))


# --------------------------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "known", [["Soil", "WATER ", "wood"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"], ["class 1", "class 2", "class 3"]]
)
def test_classes_are_compared_by_name_or_by_number_where_names_say_nothing(known):
    check_classes(known, CLASSES, "x.pth")
    check_classes(["bare_soil"], ["Bare-Soil"], "x.pth")
    check_classes(["tree  cover"], ["tree_cover"], "x.pth")


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (["soil", "wood", "water"], "x.pth: its classes are not the dataset's: 1 is 'wood', not 'water'; 2 is 'water', not 'wood'; give"),
        (["soil", "water", "forest"], "x.pth: its classes are not the dataset's: 2 is 'forest', not 'wood'; give"),
        (["1", "water", "wood"], "x.pth: its classes are not the dataset's: 0 is '1', not 'soil'; give"),
        (["soil", "water"], r"x.pth: has 2 classes \(soil, water\), the dataset 3 \(soil, water, wood\); give"),
        (["0", "1", "2", "3"], r"x.pth: has 4 classes \(0, 1, 2, 3\), the dataset 3"),
    ],
)
def test_other_classes_are_refused_with_the_ids_that_differ(known, message):
    with pytest.raises(WeightsError, match=message):
        check_classes(known, CLASSES, "x.pth")


# -------------------------------------------------------------------------------------------------------------------------------- workflow


def planned(folder: Path, *arguments: str, **changes) -> tuple[int, str]:
    """A dry run of the smallest configuration with other top-level keys: exit status and what it said."""
    for file in (CONFIGS).iterdir():
        shutil.copy(file, folder)
    file = folder / "smallest.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", "--dry-run"]
    done = subprocess.run([*command, *arguments, "--configfile", "smallest.yaml"], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_given_critic_and_judge_take_the_place_of_trained_ones(tmp_path):
    (tmp_path / "mine.pth").touch()
    (tmp_path / "theirs").mkdir()
    for given, trained in (({}, "2"), ({"critic": {"path": "mine.pth"}, "judge": {"path": str(tmp_path / "theirs")}}, None)):
        status, said = planned(tmp_path, "results/small/agreement/reconstruction.json", **given)
        assert not status, said[-2000:]
        assert set(re.findall(r"^train_segmentor +(\d+)", said, re.MULTILINE)) == {trained} - {None}


@pytest.mark.parametrize("key", ["critic", "judge"])
def test_a_given_critic_that_is_not_there_is_refused_before_anything_is_planned(tmp_path, key):
    status, said = planned(tmp_path, **{key: {"path": "nowhere.pth"}})
    assert status and f"{key}.path: no such file or folder: nowhere.pth (from {tmp_path})" in said
    assert "Job stats" not in said
