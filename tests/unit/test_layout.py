"""Where results lie: every kind of path is built and taken apart again, for the names of one result and for wildcards."""

from __future__ import annotations

from pathlib import Path

import pytest

from crfm_core import DataError
from crfm_core.layout import KINDS, Layout

#: What the wildcards stand for, names that are hard to tell apart among them.
EXAMPLES = {
    "scene": "T31.5-north-2",
    "kind": "label",
    "suffix": "tif",
    "shard": "3",
    "shards": "12",
    "files": "test_images",
    "model": "clip_model",
    "seed": "7",
    "step": "250",
    "control": "all",
}
EXAMPLES |= {
    "sampler": "tiles",
    "dataset": "synthetic",
    "split": "val-2",
    "job": "embedded/train_segmentor-real-unet_tiny-0",
    "checkpoint": "step-50",
}


def names_of(kind) -> list[str]:
    return [EXAMPLES.get(name, f"{name}-1") for name in kind.wildcards]


@pytest.mark.parametrize("results", ["results", "/data/synthetic/run 1/filtered"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_path_that_is_built_is_taken_apart_into_its_kind_and_names_again(kind, results):
    layout = Layout(results)
    path = getattr(layout, kind.name)(*names_of(kind))
    found = layout.find(path)
    assert (found.kind, list(found.names.values()), found.results) == (kind.name, names_of(kind), Path(results))
    assert kind.names(Path(path)) == dict(zip(kind.wildcards, names_of(kind), strict=True))
    if "dataset" in kind.wildcards:
        assert kind.root(path) == found.root == layout.folder("synthetic") == Path(results) / "synthetic"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_path_is_of_one_kind_alone(kind):
    path = getattr(Layout("results"), kind.name)(*names_of(kind))
    assert [name for name, one in KINDS.items() if (found := one._regex.fullmatch(path)) and found["_results"] == "results"] == [kind.name]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_wildcards_in_place_of_names_give_the_pattern(kind):
    assert getattr(Layout("results"), kind.name)(*(f"{{{name}}}" for name in kind.wildcards)) == f"results/{kind.pattern}"


def test_targets_that_users_name_stay_where_they_are():
    layout = Layout("results")
    assert layout.tiles("embedded", "train") == "results/embedded/tiles/train.parquet"
    assert layout.captions("embedded", "train") == "results/embedded/captions/train.parquet"
    assert layout.generator("embedded", "siamese") == "results/embedded/generators/siamese"
    assert layout.checkpoint("embedded", "real", "unet_tiny", 0) == "results/embedded/segmentors/real/unet_tiny/seed0/checkpoint.pth"
    assert layout.scores("embedded", "real", "unet_tiny", 0) == "results/embedded/segmentors/real/unet_tiny/seed0/scores.json"
    assert layout.shard("embedded", "siamese", "crfm", 1, 2) == "results/embedded/synthetic/siamese/crfm/shard-1-of-2.parquet"
    assert layout.synthetic("embedded", "siamese", "crfm") == "results/embedded/synthetic/siamese/crfm/all.parquet"
    assert layout.mix("embedded", "crfm") == "results/embedded/mixes/crfm.parquet"
    assert (layout.table("main"), layout.report()) == ("results/tables/main.csv", "results/report.html")


@pytest.mark.parametrize(
    "path", ["results/embedded/tiles/train.csv", "results/embedded/other/train.parquet", "elsewhere/report.html", "results"]
)
def test_what_is_no_result_is_refused(path):
    with pytest.raises(DataError, match="is no result below results"):
        Layout("results").find(path)


def test_a_path_of_another_kind_is_refused_with_the_place_that_was_expected():
    with pytest.raises(DataError, match=r"tiles/train\.parquet: .* captions .* RESULTS/{dataset}/captions/{split}\.parquet"):
        Layout.captions.root("results/embedded/tiles/train.parquet")
    with pytest.raises(ValueError, match="zip"):
        Layout("results").tiles("embedded")
