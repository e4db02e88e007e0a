"""Critics from folders of transformers: what they compute, and which folders are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from critics import as_images, directional, noise, save_folder
from segmentor_tiles import CLASSES
from tiny_transformers import dpt, processor_of, segformer, upernet

from crfm_core import WeightsError
from crfm_core.segmentor.critic import load_critic


@pytest.fixture
def folder(tmp_path):
    """Writes a model and an image processor as their users do, and returns the folder."""
    return lambda network, processor=None: save_folder(tmp_path / "model", network, processor)


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
    network, processor, rgb = build().eval(), processor_of(kind, **settings), noise(*size)
    critic = load_critic(folder(network, processor), classes=CLASSES)
    inputs = processor(list(rgb), do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = F.interpolate(network(inputs).logits, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(critic(as_images(rgb)), expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_transformers_sees_sizes_that_do_not_divide_padded(folder):
    critic = load_critic(folder(dpt(), processor_of("Segformer", **ODD)))
    images = as_images(noise(40, 56))
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
