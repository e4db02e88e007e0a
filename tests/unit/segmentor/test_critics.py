"""Critics from here and from elsewhere: what they compute, that they run nothing from a checkpoint, and whose classes they know."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hostile import Program, would_run
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from paths import CONFIGS, ROOT
from tiny_transformers import dpt, processor_of, segformer, upernet
from torch import nn

from crfm_core import WeightsError
from crfm_core.segmentor.critic import as_critic, check_classes, load_critic
from crfm_core.segmentor.mmseg import architectures, networks
from crfm_core.segmentor.mmseg.configuration import parse_config
from crfm_core.segmentor.mmseg.weights import load_backbone, read_checkpoint
from crfm_core.segmentor.validation import newest_checkpoint

CLASSES = ["soil", "water", "wood"]
MEAN, STD = [10.0, 120.0, 90.0], [40.0, 58.0, 70.0]
PREPROCESSOR = {"type": "SegDataPreProcessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True, "pad_val": 3, "size_divisor": 32}


def model(**changes) -> dict:
    """The configuration of a small SegFormer with an auxiliary head, as a user of mmsegmentation writes it."""
    network = architectures.ARCHITECTURES["segformer_tiny"](len(CLASSES))
    head = {"in_channels": 64, "in_index": 2, "channels": 8, "num_convs": 1, "concat_input": False}
    network["auxiliary_head"] = architectures._head("FCNHead", len(CLASSES), 0.4, **head)
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": dict(PREPROCESSOR),
        "pretrained": None,
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **network,
        **changes,
    }


def text_of(**names) -> str:
    """A configuration as mmengine's Runner stores it."""
    return Config(names).pretty_text


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return networks.build_network(model()).eval()


@pytest.fixture
def stored(network, tmp_path):
    """Writes a checkpoint of ``network`` with a text of its configuration, and more of its meta, and returns its path."""

    def store(text: str, **meta) -> Path:
        meta = {"cfg": text, "dataset_meta": {"classes": tuple(CLASSES)}, **meta}
        torch.save({"state_dict": network.state_dict(), "meta": meta}, tmp_path / "given.pth")
        return tmp_path / "given.pth"

    return store


def pictures(height: int, width: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_images(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255


def directional(critic: nn.Module, size: tuple[int, int]) -> tuple[float, float]:
    """The derivative of a function of the logits along a direction of the images: by autograd, and by central differences."""
    torch.manual_seed(1)
    critic = critic.double()
    images, way = torch.rand(1, 3, *size, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, *size, dtype=torch.float64)

    def loss(images):
        return critic(images).log_softmax(1)[:, 0].mean()

    (slope,) = torch.autograd.grad(loss(images), images)
    with torch.no_grad():
        return float((slope * way).sum()), float((loss(images + 1e-7 * way) - loss(images - 1e-7 * way)) / 2e-7)


# ------------------------------------------------------------------------------------- trained by this workflow


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint as ``train_segmentor`` writes it."""
    path = tmp_path_factory.mktemp("trained") / "checkpoint.pth"
    torch.manual_seed(0)
    weights = networks.build_model("segformer_tiny", len(CLASSES)).state_dict()
    torch.save({"state_dict": weights, "meta": {"segmentor": {"architecture": "segformer_tiny"}, "classes": CLASSES}}, path)
    return path


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


# ---------------------------------------------------------------------------------------------- mmsegmentation


def predicted(config: dict, weights: dict, loaded: np.ndarray) -> torch.Tensor:
    """Logits as mmsegmentation predicts them for pictures as its pipeline loads them, uint8 [B,H,W,3]."""
    network = networks.build_network(config).eval()
    network.load_state_dict(weights)
    samples = [SegDataSample(metainfo={"ori_shape": one.shape[:2], "img_shape": one.shape[:2]}) for one in loaded]
    data = {"inputs": [torch.from_numpy(one.copy()).permute(2, 0, 1) for one in loaded], "data_samples": samples}
    with torch.no_grad():
        return torch.stack([sample.seg_logits.data for sample in network.test_step(data)])


@pytest.mark.parametrize(
    "changes",
    [
        {"test_cfg": {"size_divisor": 32}},
        {"test_cfg": {"size_divisor": 32}, "bgr_to_rgb": False, "pad_val": 0},
        {"test_cfg": {"size": (64, 48)}},
        {"bgr_to_rgb": False, "rgb_to_bgr": True},
        {"mean": None, "std": None},
        {},
    ],
    ids=["divisor", "as loaded", "size", "rgb_to_bgr", "not normalised", "not padded"],
)
def test_a_checkpoint_of_mmsegmentation_gives_the_logits_of_its_own_prediction(network, stored, changes):
    config = model(data_preprocessor={**PREPROCESSOR, **changes})
    rgb = pictures(40, 56)
    expected = predicted(config, network.state_dict(), rgb[..., ::-1])  # mmcv loads BGR
    critic = load_critic(stored(text_of(model=config)), classes=CLASSES)
    torch.testing.assert_close(critic(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [{"type": "LoadSingleRSImageFromFile"}, {"type": "LoadImageFromFile", "imdecode_backend": "tifffile"}])
def test_pictures_that_its_pipeline_loads_as_rgb_are_not_turned(network, stored, step):
    rgb = pictures(32, 32)
    expected = predicted(model(), network.state_dict(), rgb)
    critic = load_critic(stored(text_of(model=model(), test_pipeline=[step, {"type": "PackSegInputs"}])))
    torch.testing.assert_close(critic(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)


def test_what_only_training_needs_is_left_out_and_the_whole_image_looked_at(network, stored):
    plain = load_critic(stored(text_of(model=model())))
    config = model(pretrained="open-mmlab://resnet18_v1c", test_cfg={"mode": "slide", "crop_size": (32, 32), "stride": (16, 16)})
    config["backbone"] |= {"init_cfg": {"type": "Pretrained", "checkpoint": "https://example.org/mit_b0.pth"}}
    config["decode_head"] |= {
        "loss_decode": {"type": "MyLoss", "class_weight": "weights.pkl"},
        "sampler": {"type": "OHEMPixelSampler", "thresh": 0.7},
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
    }
    critic = load_critic(stored(text_of(model=config)))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in critic.modules())
    images = as_images(pictures(64, 64))
    assert torch.equal(critic(images), plain(images))


def test_a_checkpoint_of_mmsegmentation_0_x_is_normalised_as_its_pipeline_did(network, tmp_path):
    config = {name: value for name, value in model().items() if name != "data_preprocessor"}
    text = text_of(model=config, img_norm_cfg={"mean": MEAN, "std": STD, "to_rgb": True})
    torch.save({"state_dict": network.state_dict(), "meta": {"config": text, "CLASSES": CLASSES}}, tmp_path / "old.pth")
    rgb = pictures(40, 56)
    expected = predicted(model(), network.state_dict(), rgb[..., ::-1])
    torch.testing.assert_close(load_critic(tmp_path / "old.pth", classes=CLASSES)(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)


@DATASETS.register_module()
class _Pictures(torch.utils.data.Dataset):
    metainfo = {"classes": tuple(CLASSES), "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]], "reduce_zero_label": False}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        label = PixelData(data=torch.randint(0, len(CLASSES), (1, 32, 32)))
        sample = SegDataSample(gt_sem_seg=label, metainfo={"img_shape": (32, 32), "ori_shape": (32, 32)})
        return {"inputs": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), "data_samples": sample}


def test_a_checkpoint_that_mmengine_trained_and_wrote_is_read_also_from_before_numpy_2(tmp_path):
    networks.load_mmseg()
    runner = Runner.from_cfg(
        Config({
            "model": model(data_preprocessor={**PREPROCESSOR, "size_divisor": None, "size": (32, 32)}),
            "work_dir": str(tmp_path / "work"),
            "train_dataloader": {
                "dataset": {"type": "_Pictures"}, "batch_size": 2, "num_workers": 0, "collate_fn": {"type": "pseudo_collate"},
                "sampler": {"type": "InfiniteSampler"},
            },
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 2},
            "optim_wrapper": {
                "type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.01},
                "paramwise_cfg": {"custom_keys": {".block1": {"decay_mult": 0.0}}},
            },
            "param_scheduler": [{"type": "PolyLR", "power": 1.0, "begin": 0, "end": 2, "by_epoch": False}],
            "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2}},
            "default_scope": "mmseg", "log_level": "ERROR", "experiment_name": tmp_path.name,
        })
    )  # fmt: skip
    runner.train()
    path = tmp_path / "work" / "iter_2.pth"
    rgb = pictures(32, 32)
    expected = predicted(model(), read_checkpoint(path)["state_dict"], rgb[..., ::-1])
    critic = load_critic(path, classes=CLASSES)
    torch.testing.assert_close(critic(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)

    old = tmp_path / "old.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert torch.equal(load_critic(old)(as_images(rgb)), critic(as_images(rgb)))


def test_a_configuration_is_read_as_mmengine_reads_it():
    names = {
        "crop_size": (64, 64), "nothing": None, "truth": [True, False], "words": 'it\'s "so"\n', "rates": [-1.5, 1e-06, -3], "empty": {},
        "custom": {"keys": {".norm": {"decay_mult": 0.0}, 3: ["a"], "b": {}}, "_delete_": True}, "far": float("inf"), "pair": ((1,), [()]),
    }  # fmt: skip
    assert parse_config(text_of(**names)).items() >= names.items()
    assert parse_config("norm = dict(type='BN')\nmodel = dict(head=[norm, dict({1: norm}, b=-2)])")["model"] == {
        "head": [{"type": "BN"}, {1: {"type": "BN"}, "b": -2}]
    }


@pytest.mark.parametrize(
    "text",
    [
        "model = __import__('os').mkdir(MARK)",
        "import os\nos.mkdir(MARK)",
        "model = dict(type='EncoderDecoder', backbone=[0 for _ in [__import__('os').mkdir(MARK)]])",
        "model = dict(**__import__('os').mkdir(MARK))",
        "model = dict(dict(__import__('os').mkdir(MARK)))",
        "model = f\"{__import__('os').mkdir(MARK)}\"",
        "model = [].__class__.__base__.__subclasses__()",
        "@__import__('os').mkdir(MARK)\ndef model(): pass",
        "model, other = dict(), __import__('os').mkdir(MARK)",
        "model = (other := __import__('os').mkdir(MARK))",
        "if __import__('os').mkdir(MARK): model = dict()",
        "model = unknown",
    ],
)
def test_a_configuration_that_would_run_code_is_refused_unrun(stored, tmp_path, text):
    mark = tmp_path / "ran"
    with pytest.raises(WeightsError, match=r"given\.pth: its configuration holds more than values \(line \d: .*nothing of it was run"):
        load_critic(stored(text.replace("MARK", repr(str(mark)))))
    assert not mark.exists()


def test_a_configuration_that_cannot_be_parsed_is_refused(stored):
    for text in ("model = dict(", "model = " + 20_000 * "[", "model = " + 2_000 * "-" + "1", "model = 1\0"):
        with pytest.raises(WeightsError, match=r"given\.pth: its configuration cannot be parsed"):
            load_critic(stored(text))


def changed(key: str, value: object) -> dict:
    config = model()
    *parents, last = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    section[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone", {"type": "os.mkdir", "path": "MARK"}, r"asks for model\.backbone\.type: 'os\.mkdir', which this mmsegmentation does"),
        ("backbone", {"type": "pathlib.Path.mkdir", "self": "MARK"}, r"asks for model\.backbone\.type: 'pathlib"),
        ("decode_head.norm_cfg", {"type": "exec"}, r"asks for model\.decode_head\.norm_cfg\.type: 'exec'"),
        ("decode_head.act_cfg", {"type": ["ReLU"]}, r"asks for model\.decode_head\.act_cfg\.type: \['ReLU'\]"),
        ("type", "os.mkdir", "describes a model of type os.mkdir; EncoderDecoder"),
        ("type", "DepthEstimator", "describes a model of type DepthEstimator; EncoderDecoder"),
        ("data_preprocessor.type", "os.mkdir", "prepares images with os.mkdir"),
        ("data_preprocessor.mean", [0.0] * 4, "normalises with mean="),
        ("decode_head.loss_se_decode", {"type": "CrossEntropyLoss", "class_weight": "w.pkl"}, "could name a file or an address: .*w.pkl"),
        ("backbone.class_embed_path", "https://example.org/x", "could name a file or an address: model.backbone.class_embed_path"),
        ("backbone.depth", 18, r"cannot be built with this mmsegmentation \(TypeError: .*depth"),
        ("backbone.in_channels", 4, "do not fit its own architecture"),
        ("decode_head.num_classes", 5, "do not fit its own architecture"),
        ("data_preprocessor", None, "does not say how images are normalised"),
    ],
)  # fmt: skip
def test_a_configuration_of_something_else_is_refused_unbuilt(stored, tmp_path, key, value, message):
    mark = tmp_path / "ran"
    text = text_of(model=changed(key, value)).replace("MARK", str(mark))
    with pytest.raises(WeightsError, match=rf"given\.pth: .*{message}"):
        load_critic(stored(text))
    assert not mark.exists()


def test_operators_that_are_not_installed_are_named(stored):
    if importlib.util.find_spec("mmcv._ext"):
        pytest.skip("the full mmcv is installed")
    config = changed("decode_head", {**model()["decode_head"], "type": "PSAHead", "mask_size": (8, 8), "in_channels": 128, "in_index": 3})
    with pytest.raises(WeightsError, match=r"given\.pth: "):
        load_critic(stored(text_of(model=config)))(torch.rand(1, 3, 64, 64))


def test_one_map_for_two_classes_is_refused(tmp_path):
    config = model()
    config["decode_head"] |= {
        "num_classes": 2,
        "out_channels": 1,
        "threshold": 0.3,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    }
    del config["auxiliary_head"]
    weights = networks.build_network(config).state_dict()
    meta = {"cfg": text_of(model=config), "dataset_meta": {"classes": ("background", "building")}}
    torch.save({"state_dict": weights, "meta": meta}, tmp_path / "binary.pth")
    with pytest.raises(WeightsError, match="gives 1 maps for 2 classes"):
        load_critic(tmp_path / "binary.pth")


def test_gradients_through_mmsegmentation_are_those_of_finite_differences(stored):
    critic = load_critic(stored(text_of(model=model(data_preprocessor={**PREPROCESSOR, "test_cfg": {"size_divisor": 32}}))))
    slope, difference = directional(critic, (40, 56))
    assert slope == pytest.approx(difference, rel=1e-5) and slope != 0


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture
def folder(tmp_path):
    """Writes a model and an image processor as their users do, and returns the folder."""

    def save(network, processor=None) -> Path:
        network.save_pretrained(tmp_path / "model")
        (processor or processor_of("Segformer")).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


ODD = {"image_mean": [0.1, 0.5, 0.3], "image_std": [0.2, 0.4, 0.3]}


@pytest.mark.parametrize(
    ("build", "kind", "settings"),
    [
        (segformer, "Segformer", ODD),
        (segformer, "Segformer", {"do_normalize": False}),
        (segformer, "Segformer", {"do_rescale": False, "image_mean": [120.0, 90.0, 30.0], "image_std": [60.0, 50.0, 40.0]}),
        (segformer, "MobileViT", {}),
        (upernet, "Segformer", ODD),
        (dpt, "DPT", {}),
    ],
    ids=["segformer", "not normalised", "not rescaled", "mobilevit's BGR", "upernet", "dpt"],
)
def test_a_model_of_transformers_gives_its_own_logits_for_what_its_processor_makes(folder, build, kind, settings):
    torch.manual_seed(0)
    size = (64, 64) if build is dpt else (64, 96)  # this one takes squares only
    network, processor, rgb = build().eval(), processor_of(kind, **settings), pictures(*size)
    critic = load_critic(folder(network, processor), classes=CLASSES)
    inputs = processor(list(rgb), do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = F.interpolate(network(inputs).logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(critic(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_transformers_sees_sizes_that_do_not_divide_padded(folder):
    critic = load_critic(folder(dpt(), processor_of("Segformer", **ODD)))
    images = as_images(pictures(40, 56))
    filled = torch.tensor(ODD["image_mean"]).view(1, 3, 1, 1).expand(2, 3, 64, 64).clone()  # zero once normalised
    filled[..., :40, :56] = images
    torch.testing.assert_close(critic(images), critic(filled)[..., :40, :56], rtol=1e-4, atol=1e-5)


def test_gradients_through_transformers_are_those_of_finite_differences(folder):
    slope, difference = directional(load_critic(folder(segformer())), (40, 56))
    assert slope == pytest.approx(difference, rel=1e-5) and slope != 0


def test_a_critic_computes_in_its_own_type_and_answers_in_that_of_the_images(folder):
    critic = load_critic(folder(segformer().to(torch.bfloat16)))
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    logits = critic(images)
    assert {weight.dtype for weight in critic.parameters()} == {torch.bfloat16} and logits.dtype == torch.float32
    logits.sum().backward()
    assert images.grad.abs().sum() > 0


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _without(name):
    return lambda folder: (folder / name).unlink()


def _as_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def _incomplete(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("decode_head.classifier.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _mask2former(folder):
    rewrite(folder / "config.json", architectures=["Mask2FormerForUniversalSegmentation"], model_type="mask2former")


def _custom(folder):
    (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').mkdir()\nclass Evil: pass\n")
    rewrite(
        folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForSemanticSegmentation": "evil.Evil"}
    )
    rewrite(folder / "preprocessor_config.json", image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Evil"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("config.json"), r"config\.json: is missing"),
        (_without("preprocessor_config.json"), r"preprocessor_config\.json: is missing"),
        (_without("model.safetensors"), "has no weights in safetensors"),
        (_as_bin, "has no weights in safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (_cut, "is damaged"),
        (_incomplete, r"lacks 1 tensors of SegformerForSemanticSegmentation, e\.g\. decode_head\.classifier\.weight"),
        (_mask2former, "Mask2FormerForUniversalSegmentation gives no map of logits per class.*SegformerForSemanticSegmentation, .*UperNet"),
        (lambda folder: rewrite(folder / "config.json", backbone="some/model"), "its backbone is described elsewhere"),
        (_custom, r"is damaged, or no model for this transformers \(ValueError"),
    ],
)
def test_a_folder_that_is_not_whole_or_of_another_kind_is_refused(folder, spoil, message):
    given = folder(segformer())
    spoil(given)
    with pytest.raises(WeightsError, match=message) as caught:
        load_critic(given)
    assert str(given) in str(caught.value) and not (given / "ran").exists()


# --------------------------------------------------------------------------------------------------- torch modules


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


# --------------------------------------------------------------------------------------------------------- classes


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


def test_every_kind_of_critic_is_refused_for_other_classes(trained, stored, folder):
    for path in (trained, stored(text_of(model=model())), folder(segformer())):
        with pytest.raises(WeightsError, match="1 is 'water', not 'wood'"):
            load_critic(path, classes=["soil", "wood", "water"])
    nameless = stored(text_of(model=model()), dataset_meta=None)
    assert load_critic(nameless, classes=["soil", "wood", "water"]).classes == ["0", "1", "2"]


# -------------------------------------------------------------------------------------------------------- workflow


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
    assert status and f"{key}.path: there is no nowhere.pth (seen from {tmp_path})" in said
    assert "Job stats" not in said
