"""The architectures: those of mmsegmentation by the same name, ConvNeXt as its authors define it, and all of them learn."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from segmentor_tiles import CLASSES, write_tiles
from segmentors import train_on
from torch import nn

from crfm_core import WeightsError
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.evaluation import evaluate
from crfm_core.segmentor.mmseg import descriptions, networks, weights
from crfm_core.segmentor.mmseg.architectures import ARCHITECTURES
from crfm_core.settings import Segmentor

SIZE = torch.Size([64, 64])


def test_the_settings_name_the_architectures_that_there_are():
    names, _ = get_args(Segmentor.model_fields["architecture"].annotation)
    assert list(get_args(names)) == list(ARCHITECTURES)


def test_an_architecture_is_one_function_and_one_entry(tmp_path, monkeypatch):
    def fcn(num_classes: int) -> dict:
        """One convolution and a head."""
        backbone = {"type": "UNet", "base_channels": 8, "num_stages": 2, "strides": (1, 1), "enc_num_convs": (1, 1), "dec_num_convs": (1,),
                    "downsamples": (True,), "enc_dilations": (1, 1), "dec_dilations": (1,)}  # fmt: skip
        head = {"type": "FCNHead", "in_channels": 8, "in_index": 1, "channels": 8, "num_convs": 1, "num_classes": num_classes}
        return {"backbone": backbone, "decode_head": head}

    monkeypatch.setitem(ARCHITECTURES, "toy", fcn)
    tiles = write_tiles(tmp_path / "train.parquet", 4)
    segmentor = Segmentor(architecture="unet_tiny", iterations=3, batch_size=2, learning_rate=1e-2, class_weights="median_frequency")
    segmentor = segmentor.model_copy(update={"architecture": "toy"})  # whose Literal is tested above
    out = train_on(tiles, tmp_path / "out.pth", segmentor, val=tiles)
    assert evaluate(out, tiles, tmp_path)["classes"] == load_critic(out, classes=CLASSES).classes


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_gives_one_logit_per_class_and_pixel(architecture):
    network = networks.build_model(architecture, 5).eval()
    with torch.no_grad():
        logits = network.encode_decode(torch.rand(1, 3, *SIZE), [{"img_shape": SIZE}])
    assert logits.shape == (1, 5, *SIZE)


@pytest.mark.parametrize(
    ("architecture", "file"),
    [
        ("pspnet_r50", "_base_/models/pspnet_r50-d8.py"),
        ("deeplabv3plus_r50", "_base_/models/deeplabv3plus_r50-d8.py"),
        ("segformer_b2", "segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py"),
        ("upernet_convnext_t", "convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"),
    ],
)
def test_an_architecture_is_the_one_that_mmsegmentation_has_by_that_name(architecture, file, tmp_path):
    (tmp_path / "its.py").write_text(f"_base_ = 'mmseg::{file}'\n")
    its = networks.build_described(descriptions.describe_file(tmp_path / "its.py", 4), "its", WeightsError)
    ours = networks.build_model(architecture, 4)
    assert {name: tensor.shape for name, tensor in its.state_dict().items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }
    ours.load_state_dict(its.state_dict())
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected, found = (network.eval().encode_decode(images, [{"img_shape": SIZE}]) for network in (its, ours))
    assert torch.equal(found, expected)
    drops = [[module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")] for network in (its, ours)]
    assert drops[0] == drops[1]


def convnext(**settings) -> nn.Module:
    networks.load_mmseg()
    from mmseg.registry import MODELS

    return MODELS.build({"type": "ConvNeXt", "arch": {"depths": [1, 2, 1, 1], "channels": [8, 16, 24, 32]}, **settings})


def test_convnext_gives_the_maps_of_transformers_for_the_same_weights():
    from transformers import ConvNextBackbone, ConvNextConfig

    stages = [f"stage{number}" for number in range(1, 5)]
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], out_features=stages, layer_scale_init_value=0.5)
    torch.manual_seed(0)
    its, ours = ConvNextBackbone(config).eval(), convnext(layer_scale_init_value=0.5).eval()
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # biases and norms too
    renamed = {}
    for name, tensor in ours.state_dict().items():
        kind, stage, *rest = name.split(".")
        if kind == "downsample_layers" and stage == "0":
            new = ["embeddings", {"0": "patch_embeddings", "1": "layernorm"}[rest[0]], rest[1]]
        elif kind == "downsample_layers":
            new = ["encoder.stages", stage, "downsampling_layer", *rest]
        elif kind == "stages":
            parts = {"depthwise_conv": "dwconv", "norm": "layernorm", "pointwise_conv1": "pwconv1", "pointwise_conv2": "pwconv2"}
            new = ["encoder.stages", stage, "layers", rest[0], parts.get(rest[1], "layer_scale_parameter"), *rest[2:]]
        else:
            new = ["hidden_states_norms", f"stage{int(kind[-1]) + 1}", stage]
        renamed[".".join(new)] = tensor
    its.load_state_dict(renamed)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        maps = ours(images)
        # transformers uses another epsilon in the norms of the maps (1e-5), which the values here do not feel
        for found, expected in zip(maps, its(images).feature_maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert [tuple(found.shape) for found in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]


def test_convnext_gives_the_stages_that_are_asked_for_and_says_what_it_cannot_be():
    assert [found.shape[1] for found in convnext(out_indices=[1, 3])(torch.rand(1, 3, 32, 32))] == [16, 32]
    with pytest.raises(ValueError, match="gap_before_final_norm must be False"):
        convnext(gap_before_final_norm=True)
    with pytest.raises(ValueError, match="arch: 'huge' is unknown; allowed: tiny, small"):
        convnext(arch="huge")


@pytest.mark.parametrize(
    ("architecture", "precision"), [("upernet_convnext_t", "bf16"), ("deeplabv3plus_r50", "no"), ("unet_tiny", "bf16")]
)
def test_an_architecture_trains_on_the_smallest_tiles(tmp_path, architecture, precision):
    tiles = write_tiles(tmp_path / "train.parquet", 4)
    segmentor = Segmentor(architecture=architecture, iterations=2, batch_size=2, learning_rate=1e-3, precision=precision)
    trained = weights.read_mmseg_checkpoint(train_on(tiles, tmp_path / "out.pth", segmentor))["state_dict"]
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32, torch.int64}  # counts of batches are whole numbers
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert load_critic(tmp_path / "out.pth", classes=CLASSES)(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_weights_as_model_zoos_publish_them_start_a_backbone(tmp_path):
    network = networks.build_model("upernet_convnext_t", 3)
    published = {f"backbone.{name}": torch.rand_like(tensor) for name, tensor in network.backbone.state_dict().items()}
    published = {name: tensor for name, tensor in published.items() if not name.startswith(("backbone.norm0", "backbone.norm1"))}
    published |= {"head.fc.weight": torch.rand(10, 768), "head.fc.bias": torch.rand(10)}
    torch.save({"state_dict": published, "meta": {}}, tmp_path / "zoo.pth")
    weights.load_backbone(network, tmp_path / "zoo.pth")
    assert torch.equal(network.backbone.stages[2][8].gamma, published["backbone.stages.2.8.gamma"])
    with pytest.raises(WeightsError, match="does not fit the backbone ResNetV1c"):
        weights.load_backbone(networks.build_model("deeplabv3plus_r50", 3), tmp_path / "zoo.pth")
