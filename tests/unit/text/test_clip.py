"""Images and captions in one space, by tiny models of the kinds that transformers has, from folders as the hub has them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import REVISION, Hub, contents, fetched, serve_hub, stop
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import END, SIZES, write_clip, write_siglip
from transformers import CLIPVisionConfig, CLIPVisionModel

from crfm_core import WeightsError
from crfm_core.settings import Model
from crfm_core.text.clip import check_clip_model, fetch_clip_model, load_clip

KINDS = {"clip": write_clip, "siglip": write_siglip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name) for name, write in KINDS.items()}


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_that_the_model_compares_in_its_own_forward_pass(folders, kind):
    clip = load_clip(folders[kind])
    images, texts = noise(3, 16, 16), ["road water", "forest", "a field of houses"]
    seen, said = clip.image_features(images), clip.text_features(texts)
    assert seen.shape == said.shape == (3, 12 if kind == "clip" else 16) and seen.dtype == said.dtype == torch.float32
    assert clip.name == f"{kind} ({kind})"
    # by hand: the images have the model's size, so they are only normalised
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]) if kind == "clip" else ([0.5] * 3, [0.5] * 3)
    pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    ids = torch.tensor([[1, 3, 4, END, 0, 0, 0, 0], [1, 5, END, 0, 0, 0, 0, 0], [1, 2, 6, 2, 2, END, 0, 0]])
    with torch.no_grad():
        own = clip.model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(seen, own.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(said, own.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([seen, said]).norm(dim=1), torch.ones(6))
    assert (said @ said.T).fill_diagonal_(0).max() < 0.999 and (seen @ seen.T).fill_diagonal_(0).max() < 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_neighbours_and_images_may_be_of_any_size(folders, kind):
    clip = load_clip(folders[kind])
    images, texts = [noise(1, 40, 32)[0], noise(1, 16, 16)[0], noise(1, 64, 64)[0]], ["road", "water road field", "x"]
    alone = [(clip.image_features([image]), clip.text_features([text])) for image, text in zip(images, texts, strict=True)]
    torch.testing.assert_close(clip.image_features(images), torch.cat([image for image, _ in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.text_features(texts), torch.cat([text for _, text in alone]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_is_too_long_is_cut(folders, kind):
    clip = load_clip(folders[kind])
    words = ["road", "water", "forest", "field", "house", "road"]  # with begin and end all that fits
    whole, longer, other = clip.text_features([" ".join(words), " ".join(words + ["water"] * 300), " ".join(words[:-1])])
    torch.testing.assert_close(whole, longer)
    assert whole @ other < 0.999


def test_features_can_be_used_where_gradients_are_wanted(folders):
    seen = load_clip(folders["clip"]).image_features(noise(2, 16, 16))
    weight = torch.ones(12, requires_grad=True)
    (seen * weight).sum().backward()
    torch.testing.assert_close(weight.grad, seen.sum(dim=0))


def test_the_image_preparation_of_older_folders_is_read(tmp_path, folders):
    """As the first CLIP has it: a feature extractor, and sizes that are one number."""
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "old"))
    old = {
        "crop_size": 16,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    old |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    images = noise(2, 48, 32)
    torch.testing.assert_close(load_clip(folder).image_features(images), load_clip(folders["clip"]).image_features(images))


def test_nothing_in_a_folder_is_run(tmp_path, folders):
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "own"))
    mark = tmp_path / "run"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    for name, part in (("config.json", "AutoModel"), ("preprocessor_config.json", "AutoImageProcessor")):
        held = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(held | {"auto_map": {part: "own.Own"}}))
    load_clip(folder)
    assert not mark.exists()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}))
    with pytest.raises(WeightsError, match=r"clip: \S*own cannot be loaded as a model with features of images and of text"):
        load_clip(folder)
    assert not mark.exists()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_preparation(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def of_images_alone(folder: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_weights,
            r"clip\.path: \S*x: its weights \(pytorch_model\.bin\) are pickled, which can run code; give a folder",
        ),
        (
            without_configuration,
            r"clip\.path: \S*x is no model folder, it has no config\.json; give one of transformers",
        ),
        (truncated, r"clip: \S*x cannot be loaded as a model with features of images and of text .*; fetch it again"),
        (lacking, r"clip: \S*x lacks 1 weights of its model, first visual_projection\.weight"),
        (without_tokenizer, r"clip\.path: \S*x has no tokenizer \(tokenizer\.json, .*; give a folder that holds the whole model"),
        (without_preparation, r"clip\.path: \S*x has no preparation of images \(preprocessor_config\.json"),
        (
            of_images_alone,
            r"clip: \S*x holds a CLIPVisionModel, which has no features of images and text in one space; give a",
        ),
    ],
)
def test_a_folder_that_will_not_do_is_refused_with_the_remedy(tmp_path, folders, spoil, message):
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "x"))
    spoil(folder)
    with pytest.raises(WeightsError, match=message):
        load_clip(folder)


def test_features_that_are_no_numbers_are_refused(tmp_path, folders):
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "x"))
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    clip = load_clip(folder)
    assert clip.text_features(["road"]).isfinite().all()
    with pytest.raises(WeightsError, match=r"clip: x \(clip\) gives features that are not finite; its weights are damaged"):
        clip.image_features(noise(1, 16, 16))


REPO = {"repo": "someone/Sees-and-Reads", "revision": REVISION}


def test_a_model_is_fetched_without_what_can_run_code_and_loaded_from_where_it_was_fetched_to(tmp_path, folders, monkeypatch):
    extra = dict.fromkeys(("pytorch_model.bin", "own.py", "open_clip/model.safetensors"), b"not wanted")
    monkeypatch.chdir(tmp_path)
    with serve_hub(Hub(contents(folders["clip"]) | extra, REPO["repo"]), monkeypatch) as hub:
        folder = fetch_clip_model(Model(**REPO), "again")
        stop(hub)
        assert fetch_clip_model(Model(**REPO), "again") == folder == Path("models/Sees-and-Reads"), "it needs no network any more"
    assert fetched(folder) == contents(folders["clip"])
    Path("clip_model.json").write_text(json.dumps({"folder": str(folder.resolve()), **REPO}))
    clip = load_clip("clip_model.json")
    assert clip.name == "Sees-and-Reads (clip)"
    torch.testing.assert_close(clip.text_features(["road"]), load_clip(folders["clip"]).text_features(["road"]))
    shutil.rmtree(folder)
    with pytest.raises(WeightsError, match=r"is no model folder.*; delete clip_model\.json to have someone/Sees-and-Reads fetched again"):
        load_clip("clip_model.json")


def test_a_repository_without_safe_weights_is_refused_before_it_is_fetched(tmp_path, folders, monkeypatch):
    files = {name.replace(".safetensors", ".bin"): body for name, body in contents(folders["clip"]).items()}
    with serve_hub(Hub(files, REPO["repo"]), monkeypatch) as hub:
        with pytest.raises(WeightsError, match=r"clip\.repo: someone/Sees-and-Reads has no config\.json with weights in safetensors"):
            fetch_clip_model(Model(**REPO, path=str(tmp_path / "x")), "again")
        assert hub.downloads() == []


def test_a_given_folder_is_checked_without_loading_anything(folders):
    assert check_clip_model(folders["siglip"]) == folders["siglip"]
    check = f"from crfm_core.text.clip import check_clip_model; check_clip_model({str(folders['clip'])!r})"
    program = f"import sys; {check}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "False"


def test_images_are_scaled_as_pillow_scales_them(folders):
    image = noise(1, 32, 32)[0]
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    clip = load_clip(folders["clip"])
    torch.testing.assert_close(clip.image_features([image]), clip.image_features([small]), atol=1e-4, rtol=0)
