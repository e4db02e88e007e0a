"""The registry of control schemes: a module and an entry in the settings for each, and nothing else."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from tiny_world import training_job

from crfm_core import ConfigError
from crfm_core.generator.training import train_generator
from crfm_core.models import schemes
from crfm_core.models.blocks import JointBlock
from crfm_core.models.network import ControlNetwork
from crfm_core.models.schemes import scheme_module, scheme_names
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.sampler import open_generator
from crfm_core.settings import SCHEMES, Control
from crfm_core.settings.generator import Scheme

TRAINING = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}

#: The mask's tokens attend to themselves alone; image and text attend to all.
TOY = """
    from crfm_core.models.blocks import attend
    from crfm_core.models.schemes.triattention import TriAttentionBlock


    class ToyBlock(TriAttentionBlock):
        def joint_attention(self, image, text, mask=None):
            if mask is None:
                return attend(image, text)
            attended = attend(image, text, mask._replace(query=None))
            return attended if self.last else (*attended, *attend(mask))


    BLOCK = ToyBlock
"""


def test_each_scheme_of_the_settings_has_its_module_and_its_entry():
    named = get_args(Control.model_fields["scheme"].annotation)
    assert sorted(named) == scheme_names() and list(named) == list(SCHEMES)
    for name in named:
        module = scheme_module(name)
        assert hasattr(module, "BLOCK") != hasattr(module, "NETWORK")
        assert issubclass(getattr(module, "BLOCK", JointBlock), JointBlock)
        assert issubclass(getattr(module, "NETWORK", ControlNetwork), ControlNetwork)
        assert SCHEMES[name].description.endswith(".") and set(SCHEMES[name].options) <= set(Control.model_fields)


def test_a_scheme_says_what_trains_and_how_it_starts():
    assert (Control(**TRAINING).trained, Control(**TRAINING).initialisation) == (["image", "mask"], "random")
    control = Control(scheme="controlnet", controlnet_layers=2, **TRAINING)
    assert (control.trained, control.initialisation, control.scheme_options) == (["mask"], "copy", {"controlnet_layers": 2})


@pytest.mark.parametrize(("scheme", "option"), [("adapter", {"mask_mlp_modulation": "image"}), ("siamese", {"controlnet_layers": 2})])
def test_an_option_of_another_scheme_is_refused(scheme, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: the scheme {scheme} has no such option; leave it out"):
        Control(scheme=scheme, **TRAINING, **option)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> type[Control]:
    """Control settings that know one more scheme."""
    (tmp_path / "toy.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(schemes, "__path__", [*schemes.__path__, str(tmp_path)])
    monkeypatch.setitem(SCHEMES, "toy", Scheme("A toy.", trained=("mask",), mask_init="copy"))

    class ToyControl(Control):
        scheme: Literal["triattention", "toy"] = "toy"

    return ToyControl


def test_a_new_scheme_trains_is_saved_comes_back_and_samples(world, toy, tmp_path):
    train_generator(training_job(world, tmp_path, toy(**TRAINING)))
    pipeline = open_generator(tmp_path / "out")
    assert pipeline.transformer.config.scheme == "toy" and type(pipeline.transformer.blocks[0]).__name__ == "ToyBlock"
    arguments = {"num_inference_steps": 2, "output_type": "np", "progress": False, "generator": torch.Generator().manual_seed(0)}
    masks = np.arange(1024).reshape(1, 32, 32) // 342
    image = MaskToImagePipeline.from_pretrained(tmp_path / "out")(masks, "a satellite image of soil", **arguments).images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()

    with pytest.raises(ConfigError, match="must be one of adapter, controlnet, siamese, toy, triattention"):
        scheme_module("lora")
