"""Tiles without labels have one caption, or that of a model that looks at them, and a key of their prompt like the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from segmentor_tiles import CLASSES, PALETTE, write_tiles
from tiny_captioners import PROMPT, write_llava
from tiny_world import tiny_base_settings

from crfm_core import DataError
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.models.base import _text_components
from crfm_core.settings import CaptionModel, Captions, Dataset
from crfm_core.text.captions import caption_tiles, vocabulary_of
from crfm_core.text.encoders import prompt_key

DATASET = Dataset(
    name="d",
    classes=CLASSES,
    palette=PALETTE,
    source={"kind": "embedded", "scenes": {"train": 1, "test": 1}, "unlabelled": 1},
    tile={"size": 32},
)


def tiles_without_labels(root: Path, split: str = "unlabelled") -> Path:
    """A manifest of three tiles without labels."""
    path = write_tiles(root / "tiles" / f"{split}.parquet", 3)
    table = read_manifest(path).assign(split=split, label="", classes=[[]] * 3, pixels=[[0] * len(CLASSES)] * 3)
    write_manifest(path, table)
    return path


@pytest.mark.parametrize("kind", ["template", "given"])
def test_every_tile_without_label_gets_the_configured_caption(tmp_path, kind):
    root = tmp_path / "d"
    out = root / "captions" / "unlabelled.parquet"
    caption_tiles(tiles_without_labels(root), DATASET, Captions(kind=kind, unlabelled="from above"), out)
    table = read_manifest(out, labelled=False)
    assert set(table.caption) == {"from above"} and set(table.prompt) == {prompt_key("from above")}
    assert set(table.label) == {""} and all((out.parent / image).is_file() for image in table.image)
    assert Captions().unlabelled == "a satellite image"


def test_a_model_describes_tiles_without_labels_like_the_others(tmp_path):
    model = write_llava(tmp_path / "llava")
    settings = Captions(kind="vlm", model=CaptionModel(path=str(model), prompt=PROMPT, max_new_tokens=4))
    out = tmp_path / "d" / "captions" / "unlabelled.parquet"
    table = caption_tiles(tiles_without_labels(tmp_path / "d"), DATASET, settings, out, model)
    assert "a satellite image" not in set(table.caption) and table.caption.map(len).all()


def test_a_labelled_split_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="its label is '', which is no path"):
        caption_tiles(tiles_without_labels(tmp_path / "d", "train"), DATASET, Captions(), tmp_path / "d" / "captions" / "train.parquet")


def test_the_embedded_tokenizers_know_the_words_of_that_caption_where_there_are_such_tiles(tmp_path):
    settings = Captions(unlabelled="one unusual photograph")
    plain = vocabulary_of(tmp_path / "not read", CLASSES, settings)
    texts = vocabulary_of(tmp_path / "not read", CLASSES, settings, unlabelled=True)
    assert texts == [*plain, "one unusual photograph"]
    reader = _text_components(texts, tiny_base_settings())["tokenizer_3"]
    tokens = reader.convert_ids_to_tokens(reader("one unusual photograph").input_ids)
    assert [token.removeprefix("▁") for token in tokens[:-1]] == ["one", "unusual", "photograph"]
