"""Configuration files of mmsegmentation: read as mmengine reads them but never run, trained from, and not needed afterwards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from segmentor_tiles import CLASSES, write_tiles
from segmentors import train_on

from crfm_core import ConfigError, WeightsError
from crfm_core.segmentor import training
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.evaluation import evaluate
from crfm_core.segmentor.mmseg.configuration import read_config
from crfm_core.segmentor.mmseg.descriptions import describe_file, weigh_classes
from crfm_core.segmentor.mmseg.networks import build_described
from crfm_core.segmentor.mmseg.weights import read_mmseg_checkpoint
from crfm_core.settings import Segmentor

BASE = """
'''A SegFormer, small.'''
norm_cfg = dict(type='SyncBN', requires_grad=True)
data_preprocessor = dict(
    type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, size_divisor=16)
widths = [8, 16]
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    pretrained='open-mmlab://mit',
    backbone=dict(
        type='MixVisionTransformer', embed_dims=8, num_stages=2, num_layers=[1, 1], num_heads=[1, 2], patch_sizes=[7, 3],
        sr_ratios=[8, 4], strides=[4, 2], out_indices=(0, 1), init_cfg=dict(type='Pretrained', checkpoint='https://example.org/mit.pth')),
    decode_head=dict(
        type='SegformerHead', in_channels=widths, in_index=[0, 1], channels=4 * 4, dropout_ratio=0.0, num_classes=19,
        norm_cfg=norm_cfg, align_corners=False, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead', in_channels=8 + 8, in_index=1, channels=sum([4, 4]), num_convs=1, concat_input=False, num_classes=19,
        norm_cfg=norm_cfg, align_corners=False, loss_decode=[dict(type='LovaszLoss', per_image=True, loss_weight=0.4)]),
    train_cfg=dict(), test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(16, 16)))
"""
SCHEDULE = "train_cfg = dict(max_iters=80000)\n"
CHILD = """
_base_ = ['models/base.py', './schedule.py']
iterations = _base_.train_cfg.max_iters
norm_cfg = dict(type='BN', momentum=0.2)
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(num_layers=_base_.model.backbone.num_layers, drop_path_rate=0.1),
    decode_head=dict(norm_cfg=norm_cfg, loss_decode=dict(_delete_=True, type='LovaszLoss', per_image=True)),
    auxiliary_head=None,
    test_cfg=dict(mode='whole'))
"""


@pytest.fixture
def write(tmp_path):
    """Writes configuration files by name and returns the path of the last."""

    def _write(**texts):
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return path

    return _write


@pytest.fixture
def child(write):
    return write(models__base=BASE, schedule=SCHEDULE, child=CHILD)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_file_is_read_as_mmengine_reads_it_with_all_it_inherits(child):
    expected = Config.fromfile(child)
    assert expected.model.decode_head.loss_decode == {"type": "LovaszLoss", "per_image": True} and expected.model.auxiliary_head is None
    found = read_config(child)
    assert found["model"] == expected.model.to_dict()
    assert set(found) == {"model", "data_preprocessor"}


@pytest.mark.parametrize(
    "file",
    [
        "pspnet/pspnet_r50-d8_4xb4-80k_loveda-512x512.py",
        "hrnet/fcn_hr18_4xb4-80k_loveda-512x512.py",
        "ocrnet/ocrnet_hr18_4xb4-160k_ade20k-512x512.py",
        "gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024.py",
        "unet/unet-s5-d16_deeplabv3_4xb4-ce-1.0-dice-3.0-40k_chase-db1-128x128.py",
        "upernet/upernet_r50_4xb4-160k_ade20k-512x512.py",
    ],
)
def test_files_that_mmsegmentation_comes_with_are_read_as_mmengine_reads_them(write, file):
    path = write(mine=f"_base_ = 'mmseg::{file}'\n")
    original = Config.fromfile(shipped() / file)
    assert read_config(path)["model"] == original.model.to_dict()


def shipped() -> Path:
    return Path(importlib.util.find_spec("mmseg").submodule_search_locations[0]) / ".mim" / "configs"


def test_what_a_file_computes_for_other_things_is_passed_over(write):
    plain = read_config(write(models__base=BASE, schedule=SCHEDULE, child=CHILD))
    schedule = "import os\nfrom math import pi\nhome = os.path.expanduser('~')\ntrain_cfg = dict(path=home, angle=pi)\n"
    path = write(schedule=schedule, child=CHILD.replace("= _base_.train_cfg.max_iters", "= round(_base_.home)"))
    assert read_config(path) == plain


def test_inherited_values_are_named_in_both_ways(write):
    path = write(
        base="model = dict(a=dict(b=[1, 2]))\nkind = 'x'\n", child="_base_ = 'base.py'\nmodel = dict(c={{_base_.kind}}, d=_base_.model.a)"
    )
    assert read_config(path)["model"] == {"a": {"b": [1, 2]}, "c": "x", "d": {"b": [1, 2]}}


MKDIR = "__import__('os').mkdir(MARK)"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"child": f"model = {MKDIR}"}, r"child\.py: holds more than values \(line 1: __import__"),
        ({"child": f"kind = {MKDIR}\nmodel = dict(type=kind)"}, r"child\.py: holds more than values \(line 1: __import__"),
        ({"base": f"model = dict(a={MKDIR})", "child": "_base_ = 'base.py'\nmodel = dict(b=1)"}, "holds more than values"),
        ({"base": f"a = {MKDIR}\nmodel = dict()", "child": "_base_ = 'base.py'\nmodel = dict(b=_base_.a)"}, "holds more than values"),
        ({"child": f"model = dict()\nmodel['a'] = {MKDIR}"}, r"holds more than values \(line 2"),
        ({"child": f"model = dict()\nmodel.update(a={MKDIR})"}, r"holds more than values \(line 2"),
        ({"child": f"_base_ = [{MKDIR}]"}, r"holds more than values \(line 1"),
        ({"child": f"with {MKDIR}:\n    model = dict()"}, r"holds more than values \(line 1"),
        ({"base": "model = dict()", "child": "_base_ = 'base.py'\nfrom os import path as model"}, r"holds more than values \(line 2"),
        ({"child": "from mmengine.config import read_base\nwith read_base():\n    from .a import *"}, r"holds more than values \(line 2"),
        ({"child": "model = 2 ** 2"}, "holds more than values"),
        ({"child": "model = 1 / 0"}, "holds more than values"),
        ({"child": "model = ["}, r"child\.py: cannot be parsed \(SyntaxError\)"),
        ({"child": "_base_ = 'none.py'"}, r"none\.py: no such file, which .*child\.py inherits from; give a configuration file"),
        ({"child": "_base_ = 'child.py'"}, r"child\.py: inherits from itself"),
        ({"child": "_base_ = 'mmdet::a.py'"}, r"inherits from 'mmdet::a\.py'; of packages only mmseg:: is known"),
        ({"child": "_base_ = 3"}, "inherits from 3, which is no path"),
        ({"a": "model = 1", "b": "model = 2", "child": "_base_ = ['a.py', 'b.py']"}, "inherits model from two files"),
        ({"base": "model = 3", "child": "_base_ = 'base.py'\nmodel = dict(b=1)"}, "has a dict as model.*add _delete_=True"),
    ],
)  # fmt: skip
def test_what_is_more_than_data_is_refused_unrun_and_faults_are_named(write, tmp_path, texts, message):
    mark = tmp_path / "ran"
    path = write(**{name: text.replace("MARK", repr(str(mark))) for name, text in texts.items()})
    with pytest.raises(ConfigError, match=message):
        read_config(path)
    assert not mark.exists()


# -------------------------------------------------------------------------------------------------------------- models


def test_a_described_network_gets_the_datasets_classes_and_no_weights_from_elsewhere(write):
    model = describe_file(write(base=BASE), 5)
    assert [model[head]["num_classes"] for head in ("decode_head", "auxiliary_head")] == [5, 5]
    assert model["decode_head"]["norm_cfg"]["type"] == "BN"
    assert "pretrained" not in model and "init_cfg" not in model["backbone"]
    assert model["auxiliary_head"]["loss_decode"] == [{"type": "LovaszLoss", "per_image": True, "loss_weight": 0.4}]
    assert model["data_preprocessor"]["size_divisor"] == 32
    assert build_described(model, "x", ConfigError).out_channels == 5


@pytest.mark.parametrize(
    ("change", "mean", "turned"),
    [
        ("", [123.675, 116.28, 103.53], False),
        ("bgr_to_rgb=False", [123.675, 116.28, 103.53], True),  # it wants blue first, and gets it
        ("mean=[1.0, 2.0, 3.0], bgr_to_rgb=False, rgb_to_bgr=True", [1.0, 2.0, 3.0], False),
    ],
)
def test_images_reach_the_network_as_its_file_describes_them(write, change, mean, turned):
    path = write(base=BASE, child=f"_base_ = 'base.py'\nmodel = dict(data_preprocessor=dict({change}))")
    images = describe_file(path, 3)["data_preprocessor"]
    assert images["mean"] == pytest.approx(mean) and images["bgr_to_rgb"] is turned


def test_a_file_without_a_preprocessor_gets_that_of_imagenet_for_rgb(write):
    text = BASE.replace("    data_preprocessor=data_preprocessor,\n", "").replace("data_preprocessor = ", "unused = ")
    images = describe_file(write(base=text), 3)["data_preprocessor"]
    assert images["mean"] == pytest.approx([123.675, 116.28, 103.53]) and images["bgr_to_rgb"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model = ": "network = "}, "its configuration holds no `model`"),
        ({"EncoderDecoder": "MaskRCNN"}, "describes a model of type MaskRCNN; EncoderDecoder or CascadeEncoderDecoder is needed"),
        ({"'MixVisionTransformer'": "'MyNet'"}, "names model.backbone.type: 'MyNet', which this mmsegmentation does not have"),
        ({"'LovaszLoss'": "'MyLoss'"}, r"names model.auxiliary_head.loss_decode.0.type: 'MyLoss'"),
        ({"'MixVisionTransformer'": "'os.mkdir'"}, "names model.backbone.type: 'os.mkdir'"),
        ({"embed_dims=8": "embed_dims='/etc/passwd'"}, "has text that could name a file or an address: model.backbone.embed_dims"),
        (
            {"per_image=True": "per_image=True, class_weight=[1.0, 2.0]"},
            r"class_weight: is \[1\.0, 2\.0\]; give one number for each of the 3",
        ),
        ({"'SegDataPreProcessor'": "'Other'"}, "prepares images with Other; known is SegDataPreProcessor"),
    ],
)
def test_networks_that_cannot_be_trained_here_are_refused(write, changes, message):
    text = BASE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(ConfigError, match=rf"base\.py: .*{message}"):
        describe_file(write(base=text), 3)


def test_class_weights_are_given_to_losses_that_take_them(write):
    own = BASE.replace("use_sigmoid=False", "class_weight=[1.0, 2.0, 1.0]")
    model = describe_file(write(base=own), 3)
    kept = {"type": "WeightedCrossEntropyLoss", "avg_non_ignore": True, "class_weight": [1.0, 2.0, 1.0], "loss_weight": 1.0}
    assert model["decode_head"]["loss_decode"] == kept
    model = describe_file(write(base=BASE), 3)
    weigh_classes(model, [0.5, 1.0, 1.5])
    assert model["decode_head"]["loss_decode"]["type"] == "WeightedCrossEntropyLoss"
    assert (
        model["decode_head"]["loss_decode"]["class_weight"] == model["auxiliary_head"]["loss_decode"][0]["class_weight"] == [0.5, 1.0, 1.5]
    )
    model = describe_file(write(base=BASE.replace("type='LovaszLoss', per_image=True", "type='DiceLoss'")), 3)
    with pytest.raises(ConfigError, match=r"class_weights: model\.auxiliary_head\.loss_decode\.0 is a DiceLoss, which takes none"):
        weigh_classes(model, [0.5, 1.0, 1.5])


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("tiles") / "train.parquet", 12)


def train(tiles, config, iterations=3, **settings):
    segmentor = Segmentor(config=str(config), iterations=iterations, batch_size=4, learning_rate=6e-3, **settings)
    return train_on(tiles, tiles.parent / "out.pth", segmentor)


def test_a_network_from_a_file_learns_and_is_read_again_without_the_file(tiles, write):
    text = BASE.replace("bgr_to_rgb=True", "bgr_to_rgb=False")
    out = train(tiles, path := write(base=text), iterations=60)
    path.unlink()
    critic = load_critic(out, classes=CLASSES)
    assert critic.preparation.bgr and critic.preparation.divisor == 32
    assert evaluate(out, tiles, tiles.parent)["OA"] > 60
    # one that sees red and blue the other way round does not know these tiles
    stored = torch.load(out, weights_only=True)
    stored["meta"]["cfg"] = stored["meta"]["cfg"].replace("'bgr_to_rgb': True", "'bgr_to_rgb': False")
    torch.save(stored, tiles.parent / "turned.pth")
    assert evaluate(tiles.parent / "turned.pth", tiles, tiles.parent)["OA"] < evaluate(out, tiles, tiles.parent)["OA"] - 10


def test_class_weights_and_ignored_pixels_go_together_whoever_asks_for_them(tiles, write):
    own = write(own=BASE.replace("use_sigmoid=False", "class_weight=[1.0, 2.0, 1.0]"))
    assert load_critic(train(tiles, own)).classes == CLASSES
    assert load_critic(train(tiles, write(base=BASE), class_weights="median_frequency")).classes == CLASSES


def test_the_file_is_part_of_what_a_stopped_training_continues_from(tiles, write, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "hash_of", lambda *parts: seen.append(parts[-1][0]) or "same")
    train(tiles, write(base=BASE))
    train(tiles, write(base=BASE.replace("4 * 4", "4 * 5")))
    assert seen[0] != seen[1] and "'channels': 20" in seen[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels=8 + 8": "in_channels=9"}, r"cannot learn from tiles of 32x32 pixels \(RuntimeError"),
        ({"dropout_ratio=0.0": "dropout=0.0"}, r"cannot be built with this mmsegmentation \(TypeError: .*dropout"),
        ({"FCNHead'": "PSAHead', mask_size=(4, 4)", "num_convs=1, concat_input=False, ": ""}, "the operator psamask_forward needs"),
    ],
)  # fmt: skip
def test_a_network_whose_parts_do_not_fit_is_refused_before_it_trains(tiles, write, changes, message):
    text = BASE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(ConfigError, match=rf"base\.py: .*{message}"):
        train(tiles, write(base=text))


def test_a_stored_description_is_not_trusted(tiles, write):
    out = train(tiles, write(base=BASE))
    stored = torch.load(out, weights_only=True)
    for old, new, message in (
        ("'MixVisionTransformer'", "'os.mkdir'", "names model.backbone.type: 'os.mkdir'"),
        ("model = ", "import os\nmodel = ", "holds more than values"),
        ("'embed_dims': 8", "'embed_dims': 16", "cannot be built|do not fit"),
    ):
        assert old in stored["meta"]["cfg"]
        torch.save({**stored, "meta": {**stored["meta"], "cfg": stored["meta"]["cfg"].replace(old, new)}}, tiles.parent / "spoilt.pth")
        with pytest.raises(WeightsError, match=message):
            load_critic(tiles.parent / "spoilt.pth")


def test_the_seed_of_the_weights_is_the_trainings_whether_the_file_is_tried_out_or_not(tiles, write, monkeypatch):
    path = write(base=BASE)
    tried = read_mmseg_checkpoint(train(tiles, path))["state_dict"]
    monkeypatch.setattr(training, "try_out", lambda *arguments: None)
    untried = read_mmseg_checkpoint(train(tiles, path))["state_dict"]
    assert all(torch.equal(tensor, untried[name]) for name, tensor in tried.items())
