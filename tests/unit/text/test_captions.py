"""Captions say what is in a tile, and a vision-language model is asked about an image once, however its job ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import REVISION, Hub, contents, fetched, serve_hub, stop
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from segmentor_tiles import CLASSES, PALETTE, write_tiles
from tiny_captioners import PROMPT, language_model, word_tokenizer, write_blip, write_idefics3, write_llava
from tiny_world import tiny_base_settings
from transformers import (
    BlipForConditionalGeneration,
    LlamaForCausalLM,
)
from transformers.utils import is_torchvision_available

from crfm_core import DataError, WeightsError
from crfm_core.data.rasters import hash_of_pixels, read_rgb, write_raster
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.models.base import _text_components
from crfm_core.settings import CaptionModel, Captions, Dataset
from crfm_core.text.captions import COVER_WORDS, caption_of, caption_tiles, vocabulary_of
from crfm_core.text.encoders import TextEncoders, prompt_key
from crfm_core.text.model_folder import fetch_model, folder_at, is_model_file
from crfm_core.text.vision_language import (
    CAPTION_KEY,
    VisionLanguageModel,
    describe_images,
    hash_of_model,
    keep_answers,
    read_answers,
)

FOREST = ["forest", "road", "water"]
DATASET = Dataset(
    name="d", classes=CLASSES, palette=PALETTE, source={"kind": "embedded", "scenes": {"train": 1, "test": 1}}, tile={"size": 32}
)


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("template", "pixels", "caption"),
    [
        ("a satellite image of {classes}", [18, 0, 20], "a satellite image of forest, water"),
        ("a satellite image of {classes}", [0, 0, 0], "a satellite image of "),
        ("seen from above: {shares}", [62, 18, 20], "seen from above: 62 % forest, 20 % water, 18 % road"),
        ("{shares}", [5, 987, 8], "99 % road, under 1 % water, under 1 % forest"),
        ("{shares}", [10, 990, 0], "99 % road, 1 % forest"),
        ("{shares}", [0, 7, 0], "100 % road"),
        ("{shares}", [20, 40, 40], "40 % road, 40 % water, 20 % forest"),
        ("{words}.", [62, 18, 20], "mostly forest, some water, some road."),
        ("{words}", [50, 20, 30], "mostly forest, much water, some road"),
        ("{words}", [970, 20, 10], "mostly forest, a little road, a trace of water"),
        ("{classes}; {words} ({shares})", [30, 0, 70], "forest, water; mostly water, much forest (70 % water, 30 % forest)"),
    ],
)
def test_a_template_names_the_classes_present_and_how_much_there_is_of_each(template, pixels, caption):
    assert caption_of(pixels, FOREST, Captions(template=template)) == caption


def test_the_default_caption_is_the_papers_class_list():
    assert caption_of([3, 0, 1], CLASSES, Captions()) == "a satellite image of soil, wood"


def test_each_word_of_cover_is_said_from_its_least_share_on():
    for least, word in COVER_WORDS:
        (said, *_) = caption_of([least * 10 or 1, 1000 - least * 10], ["x", "y"], Captions(template="{words}")).split(" x")
        assert said.split(", ")[-1] == word
    assert len(COVER_WORDS) == 5 and sorted(COVER_WORDS, reverse=True) == list(COVER_WORDS) and COVER_WORDS[-1][0] == 0


def test_a_class_name_that_looks_like_a_place_in_the_template_stays_as_it_is():
    assert caption_of([1, 1], ["{words}", "sea"], Captions(template="{classes}, {words}")) == "{words}, sea, mostly {words}, mostly sea"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"template": "an image"}, r"template: must hold \{classes\}, \{shares\} or \{words\}, each at most once"),
        ({"template": "{words} {words}"}, "each at most once"),
        ({"template": "{classes} {colour}"}, "no other braces"),
        ({"template": "{classes} }"}, "no other braces"),
        ({"kind": "vlm"}, "model: kind vlm needs a model"),
        ({"kind": "given", "model": {"path": "x"}}, "model: is not used with kind given; set kind: vlm"),
        ({"kind": "vlm", "model": {}}, "path: give the model's folder, or repo and revision"),
        ({"kind": "vlm", "model": {"repo": "a/b"}}, "revision: repo and revision go together"),
        ({"kind": "vlm", "model": {"path": "x", "revision": "0" * 40}}, "revision: repo and revision go together"),
        ({"kind": "vlm", "model": {"repo": "a/b", "revision": "main"}}, "revision\n.*should match pattern"),
        ({"kind": "vlm", "model": {"repo": "a/..", "revision": "0" * 40}}, "repo\n.*should match pattern"),
        ({"kind": "vlm", "model": {"path": "x", "prompt": " "}}, "prompt\n.*should match pattern"),
    ],
)
def test_a_wrong_section_is_refused_with_what_is_allowed(section, message):
    with pytest.raises(ValidationError, match=message):
        Captions(**section)


def test_a_model_of_the_hub_is_downloaded_to_a_folder_of_its_name_unless_another_is_given():
    pinned = {"repo": "someone/Sees-2B", "revision": "0123456789" * 4}
    assert CaptionModel(**pinned).folder == "models/Sees-2B" and CaptionModel(**pinned, path="here").folder == "here"
    assert CaptionModel(path="there").folder == "there"


def tokens_of(texts: list[str], tokenizer) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts).input_ids]


@pytest.mark.parametrize("template", ["a satellite image of {classes}", "{shares} from above", "{words}; {classes} ({shares})"])
def test_the_embedded_tokenizers_read_every_caption_of_a_template_whole(tmp_path, template):
    settings, rng = Captions(template=template), np.random.default_rng(0)
    texts = vocabulary_of(tmp_path / "not read", FOREST, settings)
    if template == "a satellite image of {classes}":
        assert texts == ["a satellite image of forest, road, water"]
    reader = _text_components(texts, tiny_base_settings())["tokenizer_3"]
    captions = [caption_of(rng.multinomial(1000, rng.dirichlet([0.3] * 3)).tolist(), FOREST, settings) for _ in range(300)]
    captions += [caption_of(pixels, FOREST, settings) for pixels in ([1, 10**5, 1], [10**5, 1, 1], [1, 0, 0], [3, 3, 3])]
    for caption, tokens in zip(captions, tokens_of(captions, reader), strict=True):
        assert [token.removeprefix("▁") for token in tokens[:-1]] == caption.split(), "one token for each word with its comma"
        assert len(tokens) <= reader.model_max_length


def test_the_embedded_tokenizers_read_captions_in_any_letters(tmp_path):
    captions = ["Größe: 42 % naß — dunkel", "un café, une forêt", "沙漠 and sea"]
    tiles = write_tiles(tmp_path / "d" / "tiles" / "train.parquet", 3, given_caption=captions)
    caption_tiles(tiles, DATASET, Captions(kind="given"), tmp_path / "d" / "captions" / "train.parquet")
    texts = vocabulary_of(tmp_path / "d" / "captions" / "train.parquet", CLASSES, Captions(kind="given"))
    assert set(texts) == {*captions, "a satellite image of soil, water, wood"}
    parts = _text_components(texts, tiny_base_settings())
    assert [[token.removeprefix("▁") for token in tokens[:-1]] for tokens in tokens_of(captions, parts["tokenizer_3"])] == [
        caption.split() for caption in captions
    ]
    assert [len(tokens) for tokens in tokens_of(["größe naß", "café forêt", "沙漠"], parts["tokenizer"])] == [2 + 2, 2 + 2, 1 + 2]
    embeds, _ = TextEncoders(**parts).encode(captions)
    assert embeds.isfinite().all() and not torch.equal(embeds[0], embeds[1])


# ------------------------------------------------------------------------------------------------------- given captions


def test_given_captions_are_taken_word_for_word(tmp_path):
    captions = ["A quiet  suburb.", "Fields {words}"]
    tiles = write_tiles(tmp_path / "d" / "tiles" / "train.parquet", 2, given_caption=captions)
    table = caption_tiles(tiles, DATASET, Captions(kind="given"), tmp_path / "d" / "captions" / "train.parquet")
    assert list(table.caption) == captions and list(table.prompt) == [prompt_key(caption) for caption in captions]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"train\.parquet: no column given_caption; captions\.kind: given needs a dataset that comes with prompts"),
        ({"given_caption": ["road", " ", None, "sea"]}, r"train\.parquet: 2 of 4 rows have no given_caption, first t1, t2; .*another kind"),
    ],
)
def test_a_tile_without_a_given_caption_is_named(tmp_path, columns, message):
    tiles = write_tiles(tmp_path / "d" / "tiles" / "train.parquet", 4, **columns)
    with pytest.raises(DataError, match=message):
        caption_tiles(tiles, DATASET, Captions(kind="given"), tmp_path / "d" / "captions" / "train.parquet")
    assert not (tmp_path / "d" / "captions" / "train.parquet").exists()


# ---------------------------------------------------------------------------------------------- vision-language models


KINDS = {"llava": write_llava, "idefics3": write_idefics3, "blip": write_blip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name) for name, write in KINDS.items()}


@pytest.fixture(scope="module")
def llava(folders) -> Path:
    return folders["llava"]


@pytest.fixture
def asked(monkeypatch) -> list[np.ndarray]:
    """The images that any model was shown since."""
    shown, answer = [], VisionLanguageModel.answer

    def remember(self, images, *arguments):
        shown.extend(images)
        return answer(self, images, *arguments)

    monkeypatch.setattr(VisionLanguageModel, "answer", remember)
    return shown


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def by_hand(model: VisionLanguageModel, image: np.ndarray, tokens: int) -> str:
    """The greedy answer, without the library's generation: the likeliest token after each prefix, computed anew."""
    processor = model.processor
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True) if processor.chat_template else PROMPT
    inputs = dict(processor(images=[Image.fromarray(image)], text=[text], return_tensors="pt"))
    ids = inputs.pop("input_ids")
    if isinstance(model.model, BlipForConditionalGeneration):
        ids = ids[:, :-1]  # the prompt is to be continued, not ended
    begin, mask = ids.shape[1], inputs.pop("attention_mask")
    for _ in range(tokens):
        likelihoods = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, -1]
        if not isinstance(model.model, BlipForConditionalGeneration):
            likelihoods[4] = -torch.inf
        likeliest = likelihoods.argmax()
        ids = torch.cat([ids, likeliest.view(1, 1)], 1)
        if likeliest == 2:
            break
    assert mask.all()
    return " ".join(processor.tokenizer.decode(ids[0, begin:], skip_special_tokens=True).split())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_says_of_each_image_what_the_likeliest_words_are_for_it_alone(folders, kind):
    model = VisionLanguageModel.from_folder(folders[kind])
    images = [noise(*shape, seed=seed) for seed, shape in enumerate(((32, 32), (64, 32), (64, 64), (32, 64), (32, 32)))]
    together = model.answer(images, PROMPT, 12)
    assert together == [model.answer([image], PROMPT, 12)[0] for image in images] == [by_hand(model, image, 12) for image in images]
    assert len(set(together)) > 2 and all(1 <= len(answer.split()) <= 12 for answer in together)
    if kind == "idefics3":
        mask = model._inputs([Image.fromarray(image) for image in images], PROMPT)["attention_mask"]
        assert len(set(mask.sum(1).tolist())) > 1 and mask[:, -1].all() and not mask[:, 0].all(), "padded, and on the left"


def test_an_answer_is_one_line(llava):
    answers = VisionLanguageModel.from_folder(llava).answer([noise(32, 32, seed=seed) for seed in range(20)], PROMPT, 9)
    assert any("house" in answer for answer in answers), "a word that ends its line"
    assert not any(re.search(r"\n|  |^ | $", answer) for answer in answers)


def test_weights_are_float32_on_the_cpu_whatever_the_file_holds(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "half")
    weights = load_file(llava / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    model = VisionLanguageModel.from_folder(tmp_path / "half")
    assert {weight.dtype for weight in model.model.parameters()} == {torch.float32} and not model.model.training
    assert model.answer([noise(32, 32)], PROMPT, 4) != [""]


# ------------------------------------------------------------------------------------------------- asked once, and kept


def settings_for(folder: Path, **changes) -> Captions:
    model = {"path": str(folder), "prompt": PROMPT, "max_new_tokens": 8, "batch_size": 2}
    return Captions(kind="vlm", model=model | changes)


def captions_of(tiles: Path, folder: Path, **changes) -> list[str]:
    out = tiles.parents[1] / "captions" / tiles.name
    return list(caption_tiles(tiles, DATASET, settings_for(folder, **changes), out, folder).caption)


def answer_files(root: Path) -> Iterator[Path]:
    return (root / "captions" / "answers").glob("*/*/answers.jsonl")


@pytest.fixture
def tiles(tmp_path) -> Path:
    return write_tiles(tmp_path / "d" / "tiles" / "train.parquet", 5)


def test_tiles_get_the_models_captions_and_are_not_asked_about_again(tiles, llava, asked, monkeypatch):
    captions = captions_of(tiles, llava)
    table = read_manifest(tiles.parents[1] / "captions" / "train.parquet")
    images = [read_rgb(tiles.parent / path) for path in read_manifest(tiles).image]
    assert list(table.caption) == captions == VisionLanguageModel.from_folder(llava).answer(images, PROMPT, 8)
    assert list(table.prompt) == [prompt_key(caption) for caption in captions]
    assert list(table.image) == [f"../tiles/{path}" for path in read_manifest(tiles).image]
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(VisionLanguageModel, "from_folder", None)  # it is not even loaded
        assert captions_of(tiles, llava) == captions and captions_of(tiles, llava, batch_size=5) == captions
    assert asked == []


def test_another_question_length_or_model_asks_again_and_forgets_nothing(tiles, llava, tmp_path, asked):
    captions = captions_of(tiles, llava)
    other = write_llava(tmp_path / "other", seed=1)
    changed = [captions_of(tiles, llava, prompt="image"), captions_of(tiles, llava, max_new_tokens=3), captions_of(tiles, other)]
    assert len(asked) == 4 * 5 and all(one != captions for one in changed)
    shutil.copytree(llava, tmp_path / "copy")
    assert captions_of(tiles, tmp_path / "copy") == captions_of(tiles, llava) == captions and len(asked) == 4 * 5


def test_an_image_is_shown_once_to_all_splits_by_its_pixels(tiles, llava, asked):
    captions = captions_of(tiles, llava)
    root, table = tiles.parents[1], read_manifest(tiles)
    for name in ("t5", "t6"):  # one more image, twice, the second time in another file format
        path = tiles.parent / "test" / f"{name}{'.png' if name == 't5' else '.tif'}"
        write_raster(path, noise(32, 32), *((None, None) if name == "t5" else ("EPSG:32631", [1, 0, 0, 0, -1, 0])))
        table.loc[len(table)] = table.iloc[0].to_dict() | {"tile_id": name, "image": str(path.relative_to(tiles.parent))}
    write_manifest(root / "tiles" / "test.parquet", table)
    asked.clear()
    again = captions_of(root / "tiles" / "test.parquet", llava)
    assert len(asked) == 1 and again[:5] == captions and again[5] == again[6] not in captions
    assert sorted(path.parent.name for path in answer_files(root)) == ["test", "train"]


def test_the_manifests_hash_of_an_image_is_taken_for_it(tiles, llava, asked):
    table = read_manifest(tiles)
    digests = [hash_of_pixels(read_rgb(tiles.parent / path)) for path in table.image]
    captions = captions_of(tiles, llava)
    write_manifest(tiles, table.assign(image_digest=digests))
    assert captions_of(tiles, llava) == captions and len(asked) == 5
    write_manifest(tiles, table.assign(image_digest=[digests[0]] * 5))
    assert captions_of(tiles, llava) == [captions[0]] * 5 and len(asked) == 5


def test_a_line_that_a_killed_job_left_unfinished_is_asked_for_again_and_spoils_no_other(tiles, llava, asked):
    captions = captions_of(tiles, llava)
    (file,) = answer_files(tiles.parents[1])
    lines = file.read_bytes().splitlines(keepends=True)
    for torn in (lines[3][:-1], lines[3][:-9], lines[3][:1], b"\0" * 20):
        file.write_bytes(b"".join(lines[:3]) + torn)
        asked.clear()
        assert captions_of(tiles, llava) == captions
        assert len(asked) == (1 if torn == lines[3][:-1] else 2), "an answer that lacks its line break alone is whole"
        assert read_answers(file.parents[1]) == {json.loads(line)["image"]: json.loads(line)["caption"] for line in lines}
        asked.clear()
        assert captions_of(tiles, llava) == captions and asked == []


def test_answers_are_appended(tmp_path):
    (tmp_path / "a").mkdir()
    keep_answers(tmp_path / "a" / "answers.jsonl", {"1": "x", "2": "ü\n"})
    keep_answers(tmp_path / "a" / "answers.jsonl", {})
    keep_answers(tmp_path / "a" / "answers.jsonl", {"3": "z"})
    assert read_answers(tmp_path) == {"1": "x", "2": "ü\n", "3": "z"}
    assert len((tmp_path / "a" / "answers.jsonl").read_text().splitlines()) == 3


KILLED = """
import json, sys, time
from pathlib import Path
from crfm_core.settings import CaptionModel
from crfm_core.text.vision_language import VisionLanguageModel, describe_images
folder, answers, *images = map(Path, sys.argv[1:])
answer, batches = VisionLanguageModel.answer, []
def hang_at_the_third(self, *arguments):
    batches.append(arguments)
    if len(batches) == 3:
        print("asked", flush=True)
        time.sleep(600)
    return answer(self, *arguments)
VisionLanguageModel.answer = hang_at_the_third
settings = CaptionModel(path=str(folder), prompt="describe this satellite image", max_new_tokens=8, batch_size=2)
describe_images([path.name for path in images], images, None, folder, settings, answers, "train")
"""


def test_a_job_that_was_killed_continues_with_the_image_it_was_at(tmp_path, llava, asked):
    images = []
    for index in range(7):
        write_raster(tmp_path / f"i{index}.png", noise(32, 32, seed=index))
        images.append(tmp_path / f"i{index}.png")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(llava), str(tmp_path / "killed"), *map(str, images)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert any(line.strip() == "asked" for line in process.stdout), "it ended before it was killed"
    finally:
        process.kill()
        process.wait(60)
    settings, names = settings_for(llava).model, [path.name for path in images]
    resumed = describe_images(names, images, None, llava, settings, tmp_path / "killed", "train")
    assert len(asked) == 3, "the third batch and the last image"
    assert resumed == describe_images(names, images, None, llava, settings, tmp_path / "undisturbed", "train")


def test_an_empty_answer_is_refused_and_the_others_are_kept(tiles, llava, tmp_path):
    shutil.copytree(llava, tmp_path / "silent")
    weights = load_file(llava / "model.safetensors")
    weights["language_model.lm_head.weight" if "language_model.lm_head.weight" in weights else "lm_head.weight"].zero_()
    save_file(weights, tmp_path / "silent" / "model.safetensors", {"format": "pt"})  # all words are equally likely: it says <pad>
    with pytest.raises(DataError, match=r"silent gives an empty answer about tile t0, t1; set another captions\.model\.prompt or model"):
        captions_of(tiles, tmp_path / "silent")
    assert [read_answers(file.parents[1]) for file in answer_files(tiles.parents[1])] == [{}]
    assert not (tiles.parents[1] / "captions" / "train.parquet").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


def empty_folder(folder: Path, _: Path) -> None:
    folder.mkdir()


def pickled(folder: Path, llava: Path) -> None:
    shutil.copytree(llava, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_weights(folder: Path, llava: Path) -> None:
    shutil.copytree(llava, folder)
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path, llava: Path) -> None:
    shutil.copytree(llava, folder)
    (folder / "model.safetensors").write_bytes((llava / "model.safetensors").read_bytes()[:-100])


def lacking_a_weight(folder: Path, llava: Path) -> None:
    shutil.copytree(llava, folder)
    weights = load_file(llava / "model.safetensors")
    del weights[min(name for name in weights if "projector" in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def for_text_alone(folder: Path, _: Path) -> None:
    tokenizer = word_tokenizer()
    LlamaForCausalLM(language_model(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_its_own_code(folder: Path, llava: Path) -> None:
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it ran')")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, r"captions\.model\.path: \S*x is no model folder, it has no config\.json; give one of transformers, or repo"),
        (pickled, r"its weights \(pytorch_model\.bin\) are pickled, which can run code; give a folder with weights in safetensors"),
        (without_weights, "it has no weights; give a folder with weights in safetensors"),
        (cut_off, r"x cannot be loaded as a model for image and text to text \(.*\); fetch it again"),
        (lacking_a_weight, r"x lacks 1 weights of its model, first \S*multi_modal_projector\S*; fetch it again, or give another"),
        (for_text_alone, "cannot be loaded as a model for image and text to text|has no processor for image and text"),
        (with_its_own_code, "cannot be loaded as a model for image and text to text .*or give one that transformers has without code"),
    ],
)
def test_a_folder_that_holds_no_such_model_is_refused(tmp_path, llava, make, message):
    make(tmp_path / "x", llava)
    with pytest.raises(WeightsError, match=message):
        VisionLanguageModel.from_folder(tmp_path / "x")


@pytest.mark.skipif(is_torchvision_available(), reason="the software is there")
def test_software_that_a_model_needs_and_that_is_not_installed_is_named(tmp_path, folders):
    shutil.copytree(folders["idefics3"], tmp_path / "x")
    config = json.loads((tmp_path / "x" / "processor_config.json").read_text())
    config |= {"processor_class": "SmolVLMProcessor", "video_processor": {"video_processor_type": "SmolVLMVideoProcessor"}}
    config["image_processor"]["image_processor_type"] = "SmolVLMImageProcessor"
    (tmp_path / "x" / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"captions\.model: \S*x needs more software; install it and run again: .*[Tt]orchvision"):
        VisionLanguageModel.from_folder(tmp_path / "x")


def test_a_model_without_a_chat_template_gets_the_prompt_as_it_is(tmp_path, llava):
    plain = VisionLanguageModel.from_folder(write_llava(tmp_path / "plain", chat=None))
    with pytest.raises(WeightsError, match=r"captions\.model\.prompt: .* may need its placeholder of the image in the prompt, such as <im"):
        plain.answer([noise(32, 32)], PROMPT, 4)
    chat = f"user <image>  {PROMPT} assistant"
    assert plain.answer([noise(32, 32)], chat, 6) == VisionLanguageModel.from_folder(llava).answer([noise(32, 32)], PROMPT, 6)


REPO = {"repo": "someone/Sees-2B", "revision": REVISION}


def test_a_model_is_fetched_from_the_hub_without_what_can_run_code(tmp_path, llava, monkeypatch):
    extra = dict.fromkeys(("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "onnx/model.json"), b"not wanted")
    monkeypatch.chdir(tmp_path)
    with serve_hub(Hub(contents(llava) | extra, REPO["repo"]), monkeypatch) as hub:
        folder = fetch_model(CaptionModel(**REPO), CAPTION_KEY, "again")
        assert folder == Path("models/Sees-2B") and fetched(folder) == contents(llava)
        stop(hub)
        assert fetch_model(CaptionModel(**REPO), CAPTION_KEY, "again") == folder, "it needs no network any more"
    assert hash_of_model(folder) == hash_of_model(llava), "the record is no part of the model"
    own = VisionLanguageModel.from_folder(llava)
    assert VisionLanguageModel.from_folder(folder).answer([noise(32, 32)], PROMPT, 5) == own.answer([noise(32, 32)], PROMPT, 5)


def test_a_repository_without_safe_weights_is_refused_before_it_is_fetched(tmp_path, llava, monkeypatch):
    files = {name.replace(".safetensors", ".bin"): body for name, body in contents(llava).items()}
    with serve_hub(Hub(files, REPO["repo"]), monkeypatch) as hub:
        message = r"captions\.model\.repo: someone/Sees-2B has no config\.json with weights in safetensors; give another model"
        with pytest.raises(WeightsError, match=message):
            fetch_model(CaptionModel(**REPO, path=str(tmp_path / "x")), CAPTION_KEY, "again")
        assert hub.downloads() == []


def test_a_fetched_model_is_found_by_its_record_and_missed_with_the_remedy(tmp_path, llava):
    assert folder_at(llava, CAPTION_KEY) == llava
    where = tmp_path / "caption_model.json"
    where.write_text(json.dumps({"folder": str(llava), "repo": "a/b", "revision": "0" * 40}))
    assert folder_at(where, CAPTION_KEY) == llava
    where.write_text(json.dumps({"folder": str(tmp_path / "gone"), "repo": "a/b", "revision": "0" * 40}))
    with pytest.raises(WeightsError, match=r"gone is no model folder.*; delete \S*caption_model\.json to have a/b fetched again"):
        folder_at(where, CAPTION_KEY)


NEEDED = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "merges.txt", "spiece.model"]
NOT_NEEDED = ["pytorch_model.bin", "modeling.py", "tf_model.h5", "flax_model.msgpack", "x.pt", "onnx/config.json", "README.md"]


@pytest.mark.parametrize("name", NEEDED)
def test_a_model_is_made_of_configuration_tokenizer_template_and_safetensors(name):
    assert is_model_file(name)


@pytest.mark.parametrize("name", [*NOT_NEEDED, "consolidated.safetensors", "fetched.json", ".lock"])
def test_what_can_run_code_is_a_second_copy_or_is_not_read_is_no_part_of_a_model(name):
    assert not is_model_file(name)
