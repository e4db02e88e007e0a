"""Critics from checkpoints of mmsegmentation: what they compute, and that nothing of a checkpoint is run."""

from __future__ import annotations

import importlib.util
import zipfile

import numpy as np
import pytest
import torch
from critics import MEAN, PREPROCESSOR, STD, as_images, directional, model, noise, store, text_of
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from segmentor_tiles import CLASSES
from torch import nn

from crfm_core import WeightsError
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.mmseg import networks
from crfm_core.segmentor.mmseg.configuration import parse_config
from crfm_core.segmentor.mmseg.weights import read_mmseg_checkpoint


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return networks.build_segmentor(model()).eval()


@pytest.fixture
def stored(network, tmp_path):
    """Writes a checkpoint of ``network`` with a text of its configuration, and more of its meta, and returns its path."""
    return lambda text, **meta: store(tmp_path / "given.pth", network.state_dict(), text, **meta)


def predicted(config: dict, weights: dict, loaded: np.ndarray) -> torch.Tensor:
    """Logits as mmsegmentation predicts them for pictures as its pipeline loads them, uint8 [B,H,W,3]."""
    network = networks.build_segmentor(config).eval()
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
    rgb = noise(40, 56)
    expected = predicted(config, network.state_dict(), rgb[..., ::-1])  # mmcv loads BGR
    critic = load_critic(stored(text_of(model=config)), classes=CLASSES)
    torch.testing.assert_close(critic(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [{"type": "LoadSingleRSImageFromFile"}, {"type": "LoadImageFromFile", "imdecode_backend": "tifffile"}])
def test_pictures_that_its_pipeline_loads_as_rgb_are_not_turned(network, stored, step):
    rgb = noise(32, 32)
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
    images = as_images(noise(64, 64))
    assert torch.equal(critic(images), plain(images))


def test_a_checkpoint_of_mmsegmentation_0_x_is_normalised_as_its_pipeline_did(network, tmp_path):
    config = {name: value for name, value in model().items() if name != "data_preprocessor"}
    text = text_of(model=config, img_norm_cfg={"mean": MEAN, "std": STD, "to_rgb": True})
    torch.save({"state_dict": network.state_dict(), "meta": {"config": text, "CLASSES": CLASSES}}, tmp_path / "old.pth")
    rgb = noise(40, 56)
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
    rgb = noise(32, 32)
    expected = predicted(model(), read_mmseg_checkpoint(path)["state_dict"], rgb[..., ::-1])
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
        ("backbone", {"type": "os.mkdir", "path": "MARK"}, r"names model\.backbone\.type: 'os\.mkdir', which this mmsegmentation does"),
        ("backbone", {"type": "pathlib.Path.mkdir", "self": "MARK"}, r"names model\.backbone\.type: 'pathlib"),
        ("decode_head.norm_cfg", {"type": "exec"}, r"names model\.decode_head\.norm_cfg\.type: 'exec'"),
        ("decode_head.act_cfg", {"type": ["ReLU"]}, r"names model\.decode_head\.act_cfg\.type: \['ReLU'\]"),
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
    weights = networks.build_segmentor(config).state_dict()
    meta = {"cfg": text_of(model=config), "dataset_meta": {"classes": ("background", "building")}}
    torch.save({"state_dict": weights, "meta": meta}, tmp_path / "binary.pth")
    with pytest.raises(WeightsError, match="gives 1 maps for 2 classes"):
        load_critic(tmp_path / "binary.pth")


def test_gradients_through_mmsegmentation_are_those_of_finite_differences(stored):
    critic = load_critic(stored(text_of(model=model(data_preprocessor={**PREPROCESSOR, "test_cfg": {"size_divisor": 32}}))))
    slope, difference = directional(critic, (40, 56))
    assert slope == pytest.approx(difference, rel=1e-5) and slope != 0
