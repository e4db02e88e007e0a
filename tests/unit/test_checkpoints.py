"""Base model folders: what is missing from one; and files of tensors."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from tiny_models import save_tiny_pipeline, tiny_pipeline

from crfm_core import DataError, WeightsError
from crfm_core.checkpoints import CARD, SCHEDULER_SETTINGS, check_base_model, write_tensors
from crfm_core.files import sha256_of, write_json
from crfm_core.models.flow_schedule import load_scheduler

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


def rewrite_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_of(path)}\nsize {path.stat().st_size}\n")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (WEIGHTS, lambda path: os.truncate(path, path.stat().st_size - 1), r"model\.safetensors has \d+ bytes and its header needs \d+;"),
        (WEIGHTS, lambda path: os.truncate(path, 1000), r"model\.safetensors has 1000 bytes and its header needs \d+; fetch"),
        (WEIGHTS, lambda path: os.truncate(path, 0), r"model\.safetensors has 0 bytes"),
        (WEIGHTS, lambda path: path.write_bytes(bytes(8)), r"the header of \S+model\.safetensors is damaged"),
        (WEIGHTS, lambda path: path.write_bytes(b"\x08" + bytes(7) + b"scramble"), r"the header of \S+model\.safetensors is damaged"),
        (WEIGHTS, pointer, r"model\.safetensors is no safetensors file \(a Git LFS pointer\?\)"),
        (WEIGHTS, lambda path: path.rename(path.with_suffix(".bin")), r"lacks transformer/\*\.safetensors; .* \(others can run code\)"),
        (WEIGHTS, lambda path: path.rename(path.with_suffix(".fp16.safetensors")), r"lacks transformer/\*\.safetensors"),
        ("text_encoder_3/model-00002-of-00003.safetensors", Path.unlink, r"lacks text_encoder_3/\S+2-of-\S+, named in text_encoder_3/mod"),
        ("vae/config.json", Path.unlink, r"lacks vae/config\.json; it must be a diffusers folder"),
        ("vae/config.json", lambda path: os.truncate(path, 50), r"vae/config\.json cannot be read as JSON"),
        ("vae/config.json", lambda path: path.write_text("[]"), r"vae/config\.json holds no JSON object"),
        ("tokenizer_2", shutil.rmtree, r"lacks tokenizer_2; it must"),
        ("model_index.json", lambda path: rewrite_json(path, transformer=["diffusers", "FluxTransformer2DModel"]), r"not SD3Trans"),
        ("transformer/config.json", lambda path: rewrite_json(path, _class_name="UNet"), r"names the transformer UNet, not SD3"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named_with_the_remedy(model, tmp_path, name, damage, message):
    shutil.copytree(model, tmp_path / "sd3")
    assert check_base_model(tmp_path / "sd3") == tmp_path / "sd3"
    damage(tmp_path / "sd3" / name)
    with pytest.raises(WeightsError, match=rf"^base_model\.path: .*{message}"):
        check_base_model(tmp_path / "sd3")


@pytest.mark.parametrize("more", [{}, {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096}, SCHEDULER_SETTINGS])
def test_published_schedulers_of_sd3_pass(model, tmp_path, more):
    shutil.copytree(model, tmp_path / "sd3")
    published = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.31.0",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    }
    (tmp_path / "sd3" / "scheduler" / "scheduler_config.json").write_text(json.dumps(published | more))
    assert check_base_model(tmp_path / "sd3") == tmp_path / "sd3"
    assert load_scheduler(tmp_path / "sd3").config.shift == 3.0


OTHER_SETTINGS = {"num_train_timesteps": 500, "shift_terminal": 0.1}


@pytest.mark.parametrize("key", SCHEDULER_SETTINGS)
def test_a_scheduler_with_other_noise_levels_is_refused_wherever_it_is_read(model, tmp_path, key):
    folder, value = tmp_path / "sd3", OTHER_SETTINGS.get(key, True)
    shutil.copytree(model, folder)
    rewrite_json(folder / "scheduler" / "scheduler_config.json", **{key: value})
    message = rf"scheduler_config\.json: {key} is {value}, training and sampling support \w+ alone; give a model of SD3"
    with pytest.raises(WeightsError, match=rf"^base_model\.path: .*{message}"):
        check_base_model(folder)
    with pytest.raises(WeightsError, match=message):
        load_scheduler(folder)
    with pytest.raises(WeightsError, match=rf"^scheduler: {key} is {value}"):
        tiny_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **{key: value}))


def test_a_scheduler_of_another_class_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "sd3")
    rewrite_json(tmp_path / "sd3" / "scheduler" / "scheduler_config.json", _class_name="FlowMatchHeunDiscreteScheduler")
    with pytest.raises(
        WeightsError, match=r"scheduler_config\.json: names the scheduler FlowMatchHeunDiscreteScheduler, not FlowMatchEuler"
    ):
        check_base_model(tmp_path / "sd3")


def test_every_setting_of_the_scheduler_is_used_or_refused_or_without_effect():
    under_dynamic_shifting = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}
    known = set(inspect.signature(FlowMatchEulerDiscreteScheduler).parameters)
    assert known == {"shift", *SCHEDULER_SETTINGS, *under_dynamic_shifting}


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path):
    tensors, metadata = {"b": torch.arange(3.0), "a": torch.zeros(2, 2)}, {f"k{number} ü\n": str(number) for number in range(9)}
    for name in range(8):
        write_tensors(tmp_path / f"{name}.safetensors", tensors, dict(reversed(metadata.items())) if name % 2 else metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == metadata and all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())


def test_a_folder_must_be_what_its_model_card_says(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "sd3")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    write_json(folder / CARD, {"sha256": {"vae/diffusion_pytorch_model.safetensors": sha256_of(weights)}})
    assert check_base_model(folder) == folder
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"vae/diffusion_pytorch_model\.safetensors is not the file that the model card .*restore the folder"
    ):
        check_base_model(folder)
    write_json(folder / CARD, {"sha256": {"../elsewhere": "00"}})
    with pytest.raises(DataError, match="elsewhere"):
        check_base_model(folder)
