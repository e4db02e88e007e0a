"""What a change of the configuration makes again: for every key the rules that depend on it themselves, and nothing else.

What follows from those rules runs again because its inputs are new, and a table and the report always, as they state the configuration.
"""

from __future__ import annotations

import copy
import re
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import ROOT, finish, plan, reruns
from paths import CONFIGS
from pydantic import BaseModel

from crfm_core.settings import Dataset, Settings

#: They state the whole configuration.
ALWAYS = {"make_table", "make_report"}

TARGETS = (
    "all",
    "results/small/exports/triattention",
    "results/small/synthetic_scenes/triattention/crfm/train-000.tif",
    "results/small/mosaics/train/train-000-image.tif",
    "results/small/prompts/rich.json",
    "results/small/predictions/crfm/segformer_tiny/seed0/test.parquet",
    "results/small/predicted_scenes/crfm/segformer_tiny/seed0/test-000.tif",
)

HUB = {"repo": "owner/name", "revision": "0" * 40}
WEIGHTS = {"url": "http://127.0.0.1/a.pth", "sha256": "0" * 16}
MIXED = {"control": "triattention", "sampler": "crfm", "synthetic_per_real": 1}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


#: A configuration that uses every section.
BASE = read("smallest.yaml")
BASE["controls"]["triattention"] |= {"caption_dropout": 0.1, "mask_dropout": 0.2, "lora": {"rank": 4}}
BASE["controls"]["other"] = BASE["controls"]["triattention"]
BASE["samplers"]["other"] = BASE["samplers"]["crfm"]
BASE["layouts"] = {"rich": {"kind": "augmented"}}
BASE["segmentors"]["segformer_tiny"] |= {"pretrained": WEIGHTS}
BASE["filters"] |= {"agreement": {"kind": "agreement", "keep": 0.5}, "clip": {"kind": "clip", "keep": 0.9, "after": "agreement"}}
BASE["filters"]["last"] = {"kind": "pixel", "after": "clip"}
BASE["resamplings"] = {"hardness": {"kind": "hardness"}, "rare": {"kind": "rare", "worst": 2, "min_pixels": 10, "survival": 0.5}}
BASE["recipes"] |= {"crfm": MIXED | {"filter": "pixel"}, "clipped": MIXED | {"filter": "last", "resample": "rare"}}
BASE["experiments"]["main"]["recipes"] = ["real", "crfm", "clipped"]
BASE["experiments"]["second"] = BASE["experiments"]["main"] | {"recipes": ["real", "crfm"]}
BASE |= {"clip": HUB, "generation": {"subset": 10}, "evaluation": {}}

#: Its dataset.
WORLD = read("small_world.yaml")
WORLD |= {"val": "reference", "select": {"reference": {"tiles": 4}}, "about": "a", "licence": "b"}
WORLD["tile"] |= {"scale": {"low": 1}}
WORLD["source"]["scenes"]["extra"] = 1


def changed(config: dict[str, Any], *changes: tuple[str, Any]) -> dict[str, Any]:
    """The configuration with other values of keys, which are written like "controls.triattention.steps"."""
    config = copy.deepcopy(config)
    for key, value in changes:
        *path, last = key.split(".")
        section = config
        for part in path:
            section[part] = section.get(part) or {}
            section = section[part]
        section[last] = value
    return config


SAMPLING, GUIDED = {"synthesise_shard", "synthesise_scene"}, {"compare_corrections", "measure_class_losses", "measure_reconstruction"}
JUDGED = {"compare_corrections", "measure_agreement", "measure_generation", "measure_reconstruction"}
SCORING = {"evaluate_segmentor", "predict_tiles", "predict_scene"}

#: Configurations to start from: what they have otherwise than BASE and WORLD.
STARTS: dict[str, tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = {
    "as it is": ([], []),
    "without lora": ([("controls.triattention.lora", None)], []),
    "controlnet": ([("controls.triattention.lora", None), ("controls.triattention.scheme", "controlnet")], []),
    "looking": ([("controls.triattention.validate_every", 5)], []),
    "fetched": (
        [
            ("base_model", {"kind": "hub", "path": "models/sd3"} | HUB),
            ("captions", {"kind": "vlm", "model": HUB}),
            ("generation", {"features": "inception", "weights": WEIGHTS}),
        ],
        [],
    ),
    "folder": ([("base_model", {"kind": "folder", "path": "models/sd3"})], []),
    "without val": ([], [("val", None)]),
    "new layouts": ([("samplers.crfm.layouts", "rich")], []),
    "unlabelled": ([], [("source.unlabelled", 1)]),
    "pseudo": ([("recipes.crfm.pseudo", True)], [("source.unlabelled", 1)]),
}

#: Where to start, key, another value, the rules that run again by themselves.
TABLE: list[tuple[str, str, Any, set[str]]] = [
    ("as it is", "scale", "other", set()),
    ("as it is", "device", "cuda", set()),
    ("as it is", "seed", 1, SAMPLING),
    ("as it is", "seeds", [0, 1, 2], set()),
    ("as it is", "disk_gb", 0.2, set()),
    ("as it is", "shards", 3, {"gather_shards"}),
    ("as it is", "tables", ["main", "second"], set()),
    *(
        ("as it is", f"base_model.{key}", value, {"build_base_model"})
        for key, value in {
            "seed": 1, "vae.channels": [8, 8], "vae.latent_channels": 8, "vae.steps": 21, "vae.batch_size": 5, "vae.learning_rate": 0.1,
            "transformer.layers": 3, "transformer.heads": 1, "transformer.head_dim": 16, "transformer.patch_size": 4,
            "transformer.text_dim": 8, "transformer.text_length": 4, "transformer.words": ["tree"], "transformer.largest_tile": 64,
        }.items()
    ),
    ("fetched", "base_model.repo", "owner/other", {"fetch_model"}),
    ("fetched", "base_model.revision", "1" * 40, {"fetch_model"}),
    ("fetched", "base_model.path", "models/other", {"fetch_model"}),
    ("folder", "base_model.path", "models/other", {"check_base_model"}),
    ("as it is", "captions.kind", "given", {"caption_tiles"}),
    ("as it is", "captions.template", "a {classes}", {"caption_tiles"}),
    ("as it is", "captions.unlabelled", "from above", set()),
    ("unlabelled", "captions.unlabelled", "from above", {"build_base_model"}),
    ("fetched", "captions.model.repo", "owner/other", {"fetch_model"}),
    ("fetched", "captions.model.revision", "1" * 40, {"fetch_model"}),
    ("fetched", "captions.model.path", "models/other", {"fetch_model"}),
    *(
        ("fetched", f"captions.model.{key}", value, {"caption_tiles"})
        for key, value in {"prompt": "What?", "max_new_tokens": 9, "batch_size": 2}.items()
    ),
    *(
        ("as it is", f"controls.triattention.{key}", value, {"train_generator"})
        for key, value in {
            "scheme": "siamese", "mask_init": "random", "mask_mlp_modulation": "image", "lora.rank": 8, "lora.alpha": 2,
            "lora.branches": ["mask"], "start_from": "start.pt", "steps": 21, "batch_size": 3, "accumulate": 2, "processes": 2,
            "optimiser": "adamw_8bit", "learning_rate": 0.1, "schedule": "constant", "warmup": 1, "weight_decay": 0.1, "clip_norm": 2.0,
            "ema": 0.9, "density": "logit_normal", "flip": 0.1, "caption_dropout": 0.2, "mask_dropout": 0.1, "precision": "bf16", "seed": 1,
        }.items()
    ),
    ("as it is", "controls.triattention.mask_code", "grey_compat", {"train_generator"}),
    ("as it is", "controls.triattention.validate_every", 5, {"train_generator"}),
    ("looking", "controls.triattention.patience", 1, {"train_generator"}),
    ("looking", "controls.triattention.validation_share", 0.3, {"train_generator"}),
    ("controlnet", "controls.triattention.controlnet_layers", 1, {"train_generator"}),
    ("without lora", "controls.triattention.trainable", ["mask"], {"train_generator"}),
    *(
        ("as it is", f"controls.triattention.{key}", value, set())
        for key, value in {
            "parallel": "fsdp", "gradient_checkpointing": True, "compile": True, "checkpoint_every": 6, "keep_checkpoints": 3,
        }.items()
    ),
    *(
        ("as it is", f"samplers.crfm.{key}", value, SAMPLING)
        for key, value in {
            "num_steps": 3, "preset": "paper", "rectify": {"steps": 2}, "guidance_scale": 2, "mask_guidance_scale": 2,
            "critic_decoder": "decoder",
        }.items()
    ),
    ("as it is", "samplers.crfm.layouts", "rich", {"synthesise_shard"}),
    *(
        ("as it is", f"layouts.rich.{key}", value, {"draw_layouts"})
        for key, value in {"seed": 1, "turn": False, "scale": [1, 1], "paste": 1, "min_piece": 4, "shares": "uniform"}.items()
    ),
    ("new layouts", "recipes.crfm.synthetic_per_real", 2, {"draw_layouts"}),
    *(("as it is", f"samplers.crfm.{key}", value, set()) for key, value in {"batch_size": 2, "pad": True, "compile": "default"}.items()),
    *(
        ("as it is", f"segmentors.segformer_tiny.{key}", value, {"train_segmentor"})
        for key, value in {
            "architecture": "pspnet_r50", "iterations": 7, "batch_size": 4, "learning_rate": 0.1, "optimiser": "SGD", "weight_decay": 0.1,
            "warmup": 1, "poly_power": 0.5, "class_weights": "median_frequency", "precision": "bf16", "processes": 2, "validate_every": 2,
        }.items()
    ),
    ("as it is", "segmentors.segformer_tiny.checkpoint_every", 3, set()),
    (
        "as it is",
        "segmentors.segformer_tiny",
        {"config": "network.py", "iterations": 6, "batch_size": 2, "learning_rate": 2e-3, "pretrained": WEIGHTS},
        {"train_segmentor"},
    ),
    *(
        ("as it is", f"segmentors.segformer_tiny.pretrained.{key}", value, {"fetch_weights"})
        for key, value in {"url": "http://127.0.0.1/b.pth", "sha256": "1" * 16, "path": "b.pth"}.items()
    ),
    ("as it is", "filters.pixel.margin", 1.5, {"filter_tiles"}),
    ("as it is", "filters.pixel.statistics_split", "reference", {"filter_tiles"}),
    ("as it is", "filters.agreement.keep", 0.6, {"filter_tiles"}),
    ("as it is", "filters.clip.after", None, {"filter_tiles"}),
    ("as it is", "filters.clip.kind", "agreement", {"filter_tiles"}),
    ("as it is", "resamplings.rare", {"kind": "hardness", "seed": 1}, {"resample_tiles"}),
    *(
        ("as it is", f"resamplings.rare.{key}", value, {"resample_tiles"})
        for key, value in {"worst": 3, "classes": ["water"], "min_pixels": 20, "survival": 0.4}.items()
    ),
    ("as it is", "clip.path", "models/other", {"fetch_model"}),
    ("as it is", "clip.repo", "owner/other", {"fetch_model"}),
    ("as it is", "clip.revision", "1" * 40, {"fetch_model"}),
    *(
        ("as it is", f"recipes.crfm.{key}", value, {"mix_tiles"})
        for key, value in {
            "split": "reference", "schedule": 2, "filter": "agreement", "resample": "hardness", "real_weight": 2, "sampler": "other",
        }.items()
    ),
    ("pseudo", "recipes.crfm.pseudo", False, {"mix_tiles", "check_splits", "draw_data_sheet"}),
    ("pseudo", "recipes.crfm.pseudo_weight", 2, {"mix_tiles"}),
    ("pseudo", "pseudo_labels.keep", 0.5, {"label_tiles"}),
    ("pseudo", "critic", {"path": "critic.pth"}, SAMPLING | GUIDED | {"label_tiles"}),
    ("pseudo", "evaluation.flip", True, SCORING | {"label_tiles"}),
    ("pseudo", "evaluation.batch_size", 4, set()),
    ("pseudo", "captions.template", "a {classes}", {"caption_tiles"}),
    ("as it is", "pseudo_labels.keep", 0.5, set()),
    ("as it is", "recipes.crfm.control", "other", {"mix_tiles"}),
    ("as it is", "recipes.crfm.synthetic_per_real", 2, {"synthesise_shard"}),
    ("as it is", "critic.recipe", "reference", SAMPLING | GUIDED),
    ("as it is", "critic.segmentor", "unet_tiny", SAMPLING | GUIDED),
    ("as it is", "critic.seed", 1, SAMPLING | GUIDED),
    ("as it is", "critic", {"path": "critic.pth"}, SAMPLING | GUIDED),
    *(("as it is", f"judge.{key}", value, JUDGED) for key, value in {"recipe": "real", "segmentor": "segformer_tiny", "seed": 0}.items()),
    ("as it is", "judge", {"path": "critic.pth"}, JUDGED),
    *(
        ("as it is", f"comparison.{key}", value, {"compare_corrections"})
        for key, value in {"steps": [2], "num_steps": 3, "masks": 3, "seeds": [1], "batch_size": 1}.items()
    ),
    ("as it is", "comparison.control", "other", {"compare_corrections"}),
    ("as it is", "comparison.presets", ["paper"], set()),
    *(
        ("as it is", f"evaluation.{key}", value, SCORING)
        for key, value in {"mode": "slide", "window": 16, "stride": 8, "scales": [1.0, 1.5], "flip": True}.items()
    ),
    ("as it is", "evaluation.batch_size", 4, set()),
    *(
        ("as it is", f"generation.{key}", value, {"measure_generation"})
        for key, value in {"features": "clip", "cmmd": True, "split": "reference", "subset": 20}.items()
    ),
    ("as it is", "generation.batch_size", 8, set()),
    *(
        ("fetched", f"generation.weights.{key}", value, {"fetch_weights"})
        for key, value in {"url": "http://127.0.0.1/b.pth", "sha256": "1" * 16, "path": "b.pth"}.items()
    ),
    *(
        ("as it is", f"experiments.main.{key}", value, set())
        for key, value in {
            "title": "?", "recipes": ["real", "crfm"], "segmentors": ["unet_tiny"], "datasets": ["small"], "baseline": "crfm",
            "generation": True, "paper": "main",
        }.items()
    ),
    # keys of a dataset's file
    ("as it is", "dataset.about", "another", {"draw_data_sheet"}),
    ("as it is", "dataset.licence", "another", {"tile_scenes"}),
    ("as it is", "dataset.classes", ["b", *WORLD["classes"][1:]], {"list_scenes"}),
    ("as it is", "dataset.palette", [[1, 1, 1]] * 7, {"draw_data_sheet", "predict_scene", "sample_validation"}),
    ("as it is", "dataset.label_map", {0: 1}, {"list_scenes"}),
    *(("as it is", f"dataset.source.{key}", value, {"list_scenes"}) for key, value in {"scenes.train": 3, "size": 128, "seed": 1}.items()),
    ("as it is", "dataset.source.country", "other", {"list_scenes"}),
    ("unlabelled", "dataset.source.unlabelled", 2, {"list_scenes"}),
    *(
        ("as it is", f"dataset.tile.{key}", value, {"list_scenes"})
        for key, value in {
            "size": 16, "stride": 16, "edge": "pad", "min_labelled": 0.1, "bands": [1, 2, 3], "scale.low": 2, "scale.high": 90,
            "scale.over": "dataset", "ground_distance": 0.5, "format": "png",
        }.items()
    ),
    *(
        ("as it is", f"dataset.select.reference.{key}", value, {"tile_scenes"})
        for key, value in {"tiles": 5, "seed": 1}.items()
    ),
    *(
        ("as it is", "dataset.select.reference", {key: value}, {"tile_scenes"})
        for key, value in {"fraction": 0.5, "n_shot": 2, "ids": "ids.txt"}.items()
    ),
    ("without val", "dataset.train", "reference", {"list_scenes"}),
    ("as it is", "dataset.test", "extra", {"check_splits"}),
    ("as it is", "dataset.held_out", None, {"check_splits", "sample_validation"}),
    ("as it is", "dataset.select.rest", {"rest_of": "reference", "tiles": 1}, {"tile_scenes"}),
    ("as it is", "dataset.val", None, {"draw_data_sheet", "train_segmentor"}),
]  # fmt: skip

#: Sources of scenes beside the embedded one, and other values of their keys; a split of the dataset's, too, where the source has none.
SHARES = {"train": 0.6, "test": 0.2, "reference": 0.2}
BY_GROUP, BY_BLOCKS = {"by": "group", "group": "scene", "shares": SHARES}, {"by": "blocks", "block": 64, "shares": SHARES}
FOLDER, GEOTIFF = (
    {"kind": "folder", "root": "scenes", "images": "*.png", "labels": "*.png"},
    {"kind": "geotiff", "root": "scenes", "labels": "*.tif"},
)
SOURCES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (
        FOLDER,
        BY_GROUP,
        {"root": "other", "images": "*.jpg", "labels": "*.tif", "label_suffix": "_label", "exclude": ["a*"], "unlabelled": "b"},
    ),
    (
        {"kind": "folder", "root": "scenes", "splits": {name: {"images": "a", "labels": "b"} for name in SHARES}},
        {},
        {"splits": {name: {"images": "c", "labels": "b"} for name in SHARES}},
    ),
    (GEOTIFF | {"splits": dict.fromkeys(SHARES, "*.tif")}, {}, {"splits": dict.fromkeys(SHARES, "*.vrt")}),
    (
        GEOTIFF | {"images": "*.tif", "attribute": "kind"},
        BY_BLOCKS,
        {
            "root": "other",
            "images": "*.vrt",
            "labels": "*.shp",
            "attribute": "use",
            "layer": "l",
            "background": 0,
            "exclude": ["a*"],
            "unlabelled": "b",
        },
    ),
    (
        {"kind": "released", "root": "r", "splits": dict.fromkeys(SHARES, "i")},
        {},
        {"root": "o", "splits": dict.fromkeys(SHARES, "j"), "unlabelled": "b"},
    ),
    ({"kind": "loveda"}, {}, {"root": "other", "download": False, "unlabelled": "b"}),
    (
        {"kind": "fusu"},
        BY_GROUP,
        {"root": "other", "download": False, "repo": "o/other", "revision": "1" * 40, "date": 2, "unlabelled": "b"},
    ),
    ({"kind": "fusu", "splits": ["train", "test", "val"]}, {}, {"splits": ["train", "test", "val", "more"]}),
]

#: The dataset without what asks for splits of the embedded source.
PLAIN_WORLD = {key: value for key, value in WORLD.items() if key not in ("val", "held_out", "select")}

#: Other values of what makes the splits.
SPLITS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (BY_GROUP, {"group": "folder", "shares": SHARES | {"train": 0.5}, "seed": 1}),
    (BY_BLOCKS, {"block": 128, "buffer": 8, "shares": SHARES | {"train": 0.5}, "seed": 1}),
]

#: Keys that no other value is tried of, and why.
ELSEWHERE = {
    "results": "another folder: everything is made there",
    "datasets": "other datasets: all of theirs is made",
    "dataset.name": "another name is another folder",
    **dict.fromkeys(["controls.*.unlabelled_share", "controls.*.unlabelled_masks"], "the dataset has no unlabelled scenes"),
    **dict.fromkeys(["base_model.kind", "layouts.*.kind", "dataset.source.kind", "dataset.split.by"], "another kind is another section"),
}


class Start:
    """Folders in which everything is made, one for each configuration to start from."""

    def __init__(self, root: Path):
        self.root = root

    def reruns(
        self, start: str, config: dict[str, Any], world: dict[str, Any], key: str, value: Any, *targets: str
    ) -> tuple[set[str], set[str]]:
        """What a change of ``key`` makes again of what ``config`` and the dataset ``world`` have made."""
        folder = self.root / re.sub(r"\W", "_", start)
        config = config | {"datasets": ["world.yaml"]}
        if not folder.exists():
            folder.mkdir()
            for name in ("start.pt", "critic.pth", "ids.txt"):
                (folder / name).touch()
            (folder / "network.py").write_text("model = dict(type='EncoderDecoder')")
            self.write(folder, config, world)
            finish(folder, Path("config.yaml"), targets)
        if key.startswith("dataset."):
            self.write(folder, config, changed(world, (key.removeprefix("dataset."), value)))
        else:
            self.write(folder, changed(config, (key, value)), world)
        return reruns(folder, Path("config.yaml"), targets)

    @staticmethod
    def write(folder: Path, config: dict[str, Any], world: dict[str, Any]) -> None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        (folder / "world.yaml").write_text(yaml.safe_dump(world, sort_keys=False))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Start:
    return Start(tmp_path_factory.mktemp("made"))


@pytest.mark.slow
@pytest.mark.parametrize(("start", "key", "value", "rules"), TABLE, ids=[f"{key}, {start}" for start, key, _, _ in TABLE])
def test_a_key_makes_again_what_depends_on_it_and_nothing_else(made, start, key, value, rules):
    config, world = changed(BASE, *STARTS[start][0]), changed(WORLD, *STARTS[start][1])
    own, following = made.reruns(start, config, world, key, value, *TARGETS)
    assert own - ALWAYS == rules
    assert own | following >= ALWAYS or "make_report" in own | following


@pytest.mark.slow
def test_critic_and_judge_that_change_places_are_noticed(made):
    """The engine compares inputs as a set, to which it makes no difference."""
    config = BASE | {"critic": BASE["judge"], "judge": BASE["critic"]}
    assert made.reruns("as it is", BASE, WORLD, "scale", "smallest", *TARGETS) == (set(), set())
    folder = made.root / "as_it_is"
    made.write(folder, config | {"datasets": ["world.yaml"]}, WORLD)
    own, _ = reruns(folder, Path("config.yaml"), TARGETS)
    assert own >= {"compare_corrections", "measure_reconstruction"}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "split", "others"), SOURCES, ids=[f"{one['kind']}-{'-'.join(others)}" for one, _, others in SOURCES])
def test_every_key_of_a_source_lists_the_scenes_again(made, source, split, others):
    """Of published sources what says where they lie is made again first."""
    world = PLAIN_WORLD | {"source": source, "split": split or None}
    world |= {"test": "val"} if source["kind"] == "loveda" else {}
    world |= {"label_map": {name: index for index, name in enumerate(WORLD["classes"])}} if "attribute" in source else {}
    for key, value in others.items():
        start = f"{source['kind']} {sorted(others)}"
        own, following = made.reruns(start, source_config(), world, f"dataset.source.{key}", value, "results/small/tiles/train.parquet")
        assert {"list_scenes", "tile_scenes"} <= own | following, key
        assert ("fetch_dataset" in own) == (source["kind"] in ("loveda", "fusu")), key


def source_config() -> dict[str, Any]:
    """A configuration that asks for no split of its own."""
    recipes = {name: {key: value for key, value in one.items() if key != "split"} for name, one in read("smallest.yaml")["recipes"].items()}
    return read("smallest.yaml") | {"recipes": recipes}


@pytest.mark.slow
@pytest.mark.parametrize(("split", "others"), SPLITS, ids=[split["by"] for split, _ in SPLITS])
def test_every_key_of_the_split_lists_the_scenes_again(made, split, others):
    world = PLAIN_WORLD | {"source": FOLDER, "split": split}
    for key, value in others.items():
        own, _ = made.reruns(
            f"split {split['by']}", source_config(), world, f"dataset.split.{key}", value, "results/small/tiles/train.parquet"
        )
        assert own == {"list_scenes"}, key


# ------------------------------------------------------------------------------------------------------------- completeness


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys of a section that hold values, those of named sections as "controls.*.steps"."""
    for name, field in model.model_fields.items():
        yield from _keys(field.annotation, prefix + name)


def _keys(kind: Any, path: str) -> Iterator[str]:
    sections = list(_sections(kind))
    if typing.get_origin(kind) is dict and (named := list(_sections(typing.get_args(kind)[1]))) and not path.endswith("source.splits"):
        sections, path = named, f"{path}.*"
    for one in sections:
        yield from keys_of(one, f"{path}.")
    if not sections:
        yield path


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value may be: one, or one of several kinds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    elif typing.get_origin(kind) in (typing.Annotated, typing.Union, types.UnionType):
        for one in typing.get_args(kind):
            yield from _sections(one)


def tried() -> set[str]:
    """The keys of the tables above, as :func:`keys_of` writes them."""
    found = {f"dataset.source.{key}" for _, _, others in SOURCES for key in others} | {
        f"dataset.split.{key}" for _, others in SPLITS for key in others
    }
    for _, key, value, _ in TABLE:
        key = re.sub(r"^(controls|layouts|samplers|segmentors|filters|resamplings|recipes|experiments|dataset\.select)\.\w+", r"\1.*", key)
        found |= {key} | ({f"{key}.{inner}" for inner in value} if isinstance(value, dict) else set())
    return {"dataset.source.scenes" if key.startswith("dataset.source.scenes") else key for key in found}


def test_every_key_of_the_configuration_is_in_the_table():
    known = set(keys_of(Settings)) | set(keys_of(Dataset, "dataset."))
    assert known - tried() == set(ELSEWHERE)


# -------------------------------------------------------------------------------------------------------------- one stage


def test_every_rule_has_a_target_in_the_documented_table_of_stages(tmp_path):
    """What is named there is made by the rules that are named beside it."""
    page = (ROOT / "docs" / "stages-and-targets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", page[page.index("| stage |") :], re.MULTILINE)
    named = {name for _, column in rows for name in re.findall(r"`(\w+)`", column)}
    rules = {name for file in (ROOT / "rules").glob("*.smk") for name in re.findall(r"\brule (\w+):", file.read_text(encoding="utf-8"))}
    assert rules <= named


def test_forcing_a_rule_makes_it_again_with_what_follows(tmp_path):
    for file in CONFIGS.iterdir():
        shutil.copy(file, tmp_path)
    finish(tmp_path, Path("smallest.yaml"))
    dag = plan(tmp_path, Path("smallest.yaml"), forcerun={"train_generator"})
    again = {job.rule.name for job in dag.jobs if dag.reason(job).forced or dag.reason(job).updated_input_run}
    assert again >= {"train_generator", "sample_validation", "synthesise_shard", "train_segmentor", "make_report"}
    assert not again & {"list_scenes", "tile_scenes", "caption_tiles", "build_base_model", "encode_latents", "measure_class_losses"}
