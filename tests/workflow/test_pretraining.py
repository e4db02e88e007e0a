"""How models/embedded is made, in short: the configuration that pre-trains it, and the program that writes it down."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from paths import ROOT
from safetensors.torch import load_file
from workflow_runs import ENVIRONMENT, succeed

from crfm_core.checkpoints import check_base_model
from crfm_core.files import read_json
from crfm_core.generator.weights import initial_network
from crfm_core.settings import Control


@pytest.mark.ci
def test_a_short_pre_training_makes_a_base_model_with_its_card(tmp_path):
    world = yaml.safe_load((ROOT / "configs" / "datasets" / "countries.yaml").read_text())
    world["source"]["scenes"] = {"train": 1, "test": 1, "val": 1}
    (tmp_path / "countries.yaml").write_text(yaml.safe_dump(world))
    short = {
        "datasets": ["countries.yaml"],
        "base_model": {"vae": {"steps": 6}, "transformer": {"layers": 2, "heads": 2}},
        "controls": {"pretraining": {"steps": 6, "batch_size": 4, "warmup": 1, "validate_every": 3}},
    }
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    files = [str(ROOT / "config.yaml"), str(ROOT / "configs" / "pretraining.yaml"), "short.yaml"]
    succeed(tmp_path, "--configfile", *files, "--", "results/countries/exports/pretraining")
    command = [sys.executable, str(ROOT / "models" / "publish.py"), "results/countries", "embedded"]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)

    out = check_base_model(tmp_path / "embedded")
    card = read_json(out / "card.json")
    assert not any(str(tmp_path) in path.read_text() for path in out.rglob("*.json")), "it names no folder of the machine that made it"
    assert card["control"]["mask_dropout"] == 1 and [look["step"] for look in card["held_out"]["history"]] == [3, 6]
    assert {str(tensor.dtype) for name in card["sha256"] for tensor in load_file(out / name).values()} == {"torch.float16"}
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"].float()
        for folder in (tmp_path / "results" / "countries" / "base_model", out)
    )
    assert not before.any() and after.any(), "the output map starts at 0 and has learnt"
    initial_network(out, Control(steps=1, batch_size=1, learning_rate=1e-3, mask_init="copy"), 7)  # a mask branch grows on it
