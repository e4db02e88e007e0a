"""Captions: the classes present in a tile, the dataset's own prompts, or what a vision-language model says of the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.layout import Layout
from crfm_core.manifest import check_paths, paths_of, read_manifest, relocate_all, write_manifest
from crfm_core.settings import UNLABELLED, Captions, Dataset
from crfm_core.text.encoders import prompt_key
from crfm_core.text.vision_language import describe_images

#: The word of ``{words}`` for a class, by the least percentage of the labelled pixels that it covers.
COVER_WORDS = ((50, "mostly"), (25, "much"), (10, "some"), (2, "a little"), (0, "a trace of"))


def caption_of(pixels: Sequence[int], classes: Sequence[str], settings: Captions) -> str:
    """The template's caption of an image with these ``pixels`` per class: "a satellite image of road, water, agriculture".

    ``{classes}`` lists the classes present in order of id. ``{shares}`` and ``{words}`` list them by decreasing cover, equal ones in order
    of id: "62 % forest, 20 % water, under 1 % road" and "mostly forest, some water, a trace of road" (:data:`COVER_WORDS`).

    It is also the caption of what is no tile, such as windows of whole scenes, with the kinds ``given`` and ``vlm`` too.
    """
    total = sum(pixels)
    percent = {index: 100 * count / total for index, count in enumerate(pixels) if count}
    falling = sorted(percent, key=lambda index: -percent[index])
    lists = {
        "classes": [classes[index] for index in percent],
        "shares": [f"{f'{percent[index]:.0f}' if percent[index] >= 1 else 'under 1'} % {classes[index]}" for index in falling],
        "words": [f"{next(word for least, word in COVER_WORDS if percent[index] >= least)} {classes[index]}" for index in falling],
    }
    return re.sub(r"\{(\w+)\}", lambda place: ", ".join(lists[place[1]]), settings.template)


def caption_tiles(
    tiles: Path, dataset: Dataset, settings: Captions, out: Path, model: Path | None = None, device: str = "cpu"
) -> pd.DataFrame:
    """Write the manifest ``tiles`` again as ``out``, with ``caption`` and ``prompt`` (its key in the prompt cache) per tile.

    Args:
        tiles: the tile manifest; kind ``given`` takes its column ``given_caption``. Tiles of the split ``unlabelled`` all get the caption
            ``settings.unlabelled``, except with kind ``vlm``.
        model: for kind ``vlm`` the model's folder. Its answers are kept in the folder ``answers`` beside ``out``.
        device: "cpu" or "cuda", for the model.

    Raises DataError when a tile has no caption, and what :func:`crfm_core.text.vision_language.describe_images` raises.
    """
    labelled = Layout.captions.names(out)["split"] != UNLABELLED
    table = read_manifest(tiles, labelled=labelled)
    root, columns = Layout.captions.root(out), ("image", "label") if labelled else ("image",)
    check_paths(tiles, table, root, columns=columns)
    if settings.kind == "vlm":
        assert model and settings.model, "kind vlm has a model"
        names, images = list(table.tile_id), paths_of(tiles, table, "image", root)
        digests = list(table.image_digest) if "image_digest" in table else None
        table["caption"] = describe_images(names, images, digests, model, settings.model, out.parent / "answers", out.stem, device)
    elif not labelled:
        table["caption"] = settings.unlabelled
    elif settings.kind == "given":
        table["caption"] = _source_captions(table, tiles)
    else:
        table["caption"] = [caption_of(list(pixels), dataset.classes, settings) for pixels in table.pixels]
    table["prompt"] = [prompt_key(caption) for caption in table.caption]
    for column in columns:
        table[column] = relocate_all(table[column], tiles, out)
    return write_manifest(out, table)


def _source_captions(table: pd.DataFrame, tiles: Path) -> pd.Series:
    """The column ``given_caption``. Raises DataError naming the first rows without one."""
    remedy = "captions.kind: given needs a dataset that comes with prompts; give each image one, or set another kind"
    if "given_caption" not in table:
        raise DataError(f"{tiles}: no column given_caption; {remedy}")
    lacking = table.tile_id[[not (isinstance(text, str) and text.strip()) for text in table.given_caption]]
    if len(lacking):
        raise DataError(f"{tiles}: {len(lacking)} of {len(table)} rows have no given_caption, first {', '.join(lacking[:5])}; {remedy}")
    return table.given_caption


def vocabulary_of(captioned: Path, classes: Sequence[str], settings: Captions, unlabelled: bool = False) -> list[str]:
    """Texts with all words of the captions, the longest as long as any caption: the vocabulary of the embedded base model's tokenizers.

    With a template they cover any possible tile; otherwise they are the captions of the manifest ``captioned``, and the template's for
    whole scenes. With ``unlabelled`` the caption of tiles without labels is one of them. Words of other captions may be spelled by letters.
    """
    texts = [caption_of([1] * len(classes), classes, settings)] + [settings.unlabelled] * unlabelled
    if settings.kind != "template":
        texts += sorted(set(read_manifest(captioned).caption))
    if re.search(r"\{(shares|words)\}", settings.template):
        texts += [caption_of(pixels, classes, settings) for pixels in _extremes(len(classes))]
    return list(dict.fromkeys(texts))


def _extremes(count: int) -> Iterator[list[int]]:
    """Pixels of ``count`` classes in tiles whose captions together have every word of any caption in every position, and the longest
    caption."""
    for index in range(count):
        yield [int(other == index) for other in range(count)]  # alone
        yield [int(other >= index) for other in range(count)]  # first in order of id
    yield [10**6, *[1] * (count - 1)]
    yield [*[1] * (count - 1), 10**6]
    for half_percent in range(1, 200):
        yield [half_percent, 200 - half_percent]
    for largest in range(-(-100 // count), 50):
        yield [largest] * (100 // largest) + [100 % largest]
