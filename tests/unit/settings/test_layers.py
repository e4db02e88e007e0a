"""Files over each other: a later one may choose another kind of a section, and what only the old kind has is dropped and named."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import engine
import pytest
import yaml
from paths import CONFIGS, ROOT
from snakemake.utils import update_config

from crfm_core import ConfigError
from crfm_core.settings import load_dataset, load_settings, merge_layers

DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("overlay", "unused"),
    [
        # discriminated by kind
        ("base_model: {kind: folder, path: models/mine}", ["base_model.seed", "base_model.vae", "base_model.transformer"]),
        ("base_model: {kind: hub}", ["base_model.seed", "base_model.vae", "base_model.transformer"]),
        ("filters: {agreement: {kind: pixel, margin: 2}}", ["filters.agreement.keep"]),
        ("filters: {pixel: {kind: agreement, keep: 0.5}}", ["filters.pixel.margin"]),
        ("resamplings: {rare: {kind: hardness}}", ["resamplings.rare.worst", "resamplings.rare.min_pixels", "resamplings.rare.survival"]),
        # one of several ways to say the same
        ("critic: {path: critic.pth}", ["critic.recipe", "critic.segmentor", "critic.seed"]),
        ("segmentors: {unet_tiny: {config: mine.py}}", ["segmentors.unet_tiny.architecture"]),
        # the same kind again, or none
        ("base_model: {kind: embedded, seed: 1}", []),
        ("base_model: {vae: {steps: 3}}", []),
        ("filters: {mine: {kind: agreement, keep: 0.5}}", []),
        ("critic: {seed: 3}", []),
    ],
)
def test_keys_of_the_kind_before_are_dropped_and_named(overlay, unused):
    before = copy.deepcopy(DEFAULT)
    merged, found = merge_layers([before, yaml.safe_load(overlay)])
    assert found == unused and before == DEFAULT
    table = {"title": "What is there?", "recipes": ["real"], "segmentors": ["segformer_tiny"]}
    recipes = {name: one for name, one in merged["recipes"].items() if not one.get("resample")}
    load_settings(merged | {"experiments": {"main": table}, "recipes": recipes})


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("base_model: {kind: folder, path: x, vae: {steps: 3}}", "base_model.vae: belongs to kind embedded; folder allows: kind, path"),
        ("base_model: {kind: folder, path: x, colour: red}", "base_model.colour: unknown key; allowed: kind, path"),
        ("base_model: {kind: folder}", "base_model.path: Field required"),
        ("base_model: {kind: sdxl}", "base_model.kind: unknown kind 'sdxl'; allowed: embedded, folder, hub"),
        ("base_model: {kind: [folder]}", "base_model.kind: "),
        (
            "filters: {pixel: {kind: clip, keep: 0.5, margin: 2}}",
            "filters.pixel.margin: belongs to kind pixel; clip allows: kind, after, keep",
        ),
        ("filters: {pixel: {keep: 0.5}}", "filters.pixel.keep: belongs to kind agreement, clip; pixel allows: kind, after, margin"),
        ("critic: {path: critic.pth, recipe: real}", "critic.recipe: give recipe and segmentor of one to train, or the path of one"),
    ],
)
def test_a_key_of_another_kind_in_the_file_that_sets_the_kind_is_an_error(overlay, message):
    merged, _ = merge_layers([DEFAULT, yaml.safe_load(overlay)])
    with pytest.raises(ConfigError, match=f"(?m)^  {re.escape(message)}"):
        load_settings(merged)


def test_a_key_that_a_file_after_the_kind_sets_is_an_error_too():
    layers = [DEFAULT, {"base_model": {"kind": "folder", "path": "x"}}, {"base_model": {"seed": 1}}]
    with pytest.raises(ConfigError, match=r"base_model\.seed: belongs to kind embedded"):
        load_settings(merge_layers(layers)[0])


def test_the_last_of_several_kinds_holds():
    merged, unused = merge_layers([DEFAULT, {"base_model": {"kind": "folder", "path": "x"}}, {"base_model": {"kind": "embedded"}}])
    assert merged["base_model"] == {"kind": "embedded"}
    assert unused == ["base_model.seed", "base_model.vae", "base_model.transformer", "base_model.path"]


@pytest.mark.parametrize("files", [["config.yaml", "configs/dubai.yaml"], ["configs/paper.yaml", "configs/gpu_24gb.yaml"]])
def test_without_another_kind_files_are_merged_as_the_engine_merges_them(files):
    layers = [yaml.safe_load((ROOT / file).read_text()) for file in files]
    expected: dict = {}
    for layer in copy.deepcopy(layers):
        update_config(expected, layer)
    assert merge_layers(layers) == (expected, [])


def test_a_dry_run_takes_another_kind_from_a_second_file_or_the_command_line(tmp_path):
    (tmp_path / "small_world.yaml").write_text((CONFIGS / "small_world.yaml").read_text())
    (tmp_path / "mine.yaml").write_text("base_model: {kind: folder, path: models/mine}\n")
    smallest = CONFIGS / "smallest.yaml"

    def rules(*files, **overrides):
        return {job.rule.name for job in engine.plan(tmp_path, [smallest, *files], overrides=overrides).jobs}

    assert "build_base_model" in rules()
    by_file, by_command = rules(tmp_path / "mine.yaml"), rules(base_model={"kind": "folder", "path": "models/mine"})
    assert by_file == by_command and "check_base_model" in by_file and "build_base_model" not in by_file


def test_a_run_names_what_it_does_not_use(tmp_path):
    (tmp_path / "small_world.yaml").write_text((CONFIGS / "small_world.yaml").read_text())
    (tmp_path / "mine.yaml").write_text("base_model: {kind: folder, path: models/mine}\n")
    files = ["--configfile", CONFIGS / "smallest.yaml", "mine.yaml"]
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--cores", "1", "--dry-run", "--quiet", "all", *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("unused settings: base_model.vae, base_model.transformer\n") == 1, done.stderr


def test_a_dataset_like_another_takes_its_source_and_split_whole(tmp_path):
    """So another kind of either needs no key of the first to go."""
    dataset = {
        "name": "first", "classes": ["a", "b"], "palette": ["#000000", "#FFFFFF"], "tile": {"size": 64},
        "source": {"kind": "geotiff", "root": "x", "images": "*.tif", "labels": "*.gpkg", "attribute": "kind"},
        "label_map": {"house": 0, "field": 1}, "split": {"by": "blocks", "block": 128, "buffer": 8, "shares": {"train": 1, "test": 1}},
    }  # fmt: skip
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(dataset))
    (tmp_path / "second.yaml").write_text(
        "like: first\nname: second\nsource: {kind: folder, root: y, images: '*.png', labels: '*.tif'}\nlabel_map: {1: 0, 2: 1}\n"
        "split: {by: group, shares: {train: 3, test: 1}}\n"
    )
    second = load_dataset(tmp_path / "second.yaml")
    assert (second.source.kind, second.split.by, second.classes) == ("folder", "group", ["a", "b"])
    (tmp_path / "third.yaml").write_text("like: first\nname: third\nsource: {kind: loveda}\nlabel_map: null\n")
    with pytest.raises(ConfigError, match=r"split: a source of kind loveda has splits of its own here \(train, val\); leave one out"):
        load_dataset(tmp_path / "third.yaml")
