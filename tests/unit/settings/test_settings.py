"""A wrong configuration is refused with the key and what is allowed; what ships agrees with itself."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from snakemake.utils import update_config

from crfm_core import ConfigError
from crfm_core.experiment import copies, selected_tables
from crfm_core.settings import Control, RectifySettings, Sampler, Settings, json_schema, load_dataset, load_datasets, load_settings
from crfm_core.settings.documentation import configuration_page

DATASETS = ROOT / "configs" / "datasets"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def changed(content: dict, key: str, value: object) -> dict:
    """A copy of ``content`` with another value at the dotted ``key``."""
    content = copy.deepcopy(content)
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    section[last] = value
    return content


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        # unknown keys
        ("shard", 2, "shard: unknown key; allowed: scale, results,"),
        ("base_model.vae.step", 5, "base_model.vae.step: unknown key; allowed: channels, latent_channels, steps"),
        ("controls.triattention.lr", 1, "controls.triattention.lr: unknown key; allowed: scheme, mask_init"),
        ("judge.weight", 1, "judge.weight: unknown key; allowed: recipe, segmentor, seed"),
        ("samplers.crfm.rectify.step", 1, "samplers.crfm.rectify.step: unknown key; allowed: steps, step_size, schedule"),
        # wrong types and values
        ("shards", 0, "shards: Input should be greater than 0 (found 0)"),
        ("device", "gpu", "device: Input should be 'cpu' or 'cuda' (found 'gpu')"),
        ("seeds", [], "seeds: List should have at least 1 item"),
        ("base_model.kind", "sdxl", "base_model.kind: unknown kind 'sdxl'; allowed: embedded, folder, hub"),
        ("controls.triattention.steps", "many", "controls.triattention.steps: Input should be a valid integer"),
        ("controls.triattention.trainable", ["sky"], "controls.triattention.trainable.0: Input should be 'image', 'mask' or 'text'"),
        ("controls.folder", {}, "controls.folder.steps: Field required"),
        ("controls.a/b", {}, "controls.a/b.[key]: String should match pattern"),
        ("recipes.crfm.schedule", "long", "recipes.crfm.schedule: Input should be 'longest' (found 'long')"),
        ("captions.template", "an image", "captions.template: must hold {classes}, {shares} or {words}, each at most once"),
        # the correction
        ("samplers.plain.rectify", {"steps": 1}, "samplers.plain.rectify: needs a preset to start from; allowed: paper, released, default"),
        ("samplers.crfm.rectify.steps", 24, "samplers.crfm.rectify.steps: 24 corrected steps of 23; allowed: at most num_steps"),
        ("samplers.crfm.rectify.step_size", -1, "samplers.crfm.rectify.step_size: Input should be greater than or equal to 0 (found -1)"),
        ("samplers.crfm.rectify.pixels", "all", "samplers.crfm.rectify.pixels: Input should be 'valid' or 'wrong' (found 'all')"),
        # names that are defined nowhere, or contradict each other
        ("recipes.crfm.sampler", "ddim", "recipes.crfm.sampler: unknown name 'ddim'; allowed: plain, crfm, crfm-many"),
        ("samplers.crfm.layouts", "rich", "samplers.crfm.layouts: unknown name 'rich'; allowed: training"),
        ("layouts.pseudo", {"kind": "augmented"}, "layouts.pseudo: pseudo stands for other tiles; give the layouts another name"),
        ("layouts.rich", {"kind": "drawn"}, "layouts.rich.kind: unknown kind 'drawn'; allowed: augmented, predicted"),
        ("layouts.rich", {"kind": "predicted", "paste": 3}, "layouts.rich.paste: belongs to kind augmented; predicted allows: kind, seed"),
        ("recipes.crfm.control", "lora", "recipes.crfm.control: unknown name 'lora'; allowed: triattention"),
        ("recipes.crfm.filter", "tile", "recipes.crfm.filter: unknown name 'tile'; allowed: pixel"),
        ("recipes.crfm.resample", "few", "recipes.crfm.resample: unknown name 'few'; allowed: hardness, rare"),
        ("recipes.real.filter", "pixel", "recipes.real.filter: is for synthetic tiles, and this recipe has none"),
        ("recipes.rare.filter", "agreement", "recipes.rare.filter: re-sampling of kind rare needs a filter of kind pixel before it"),
        ("recipes.real.resample", "rare", "recipes.real.resample: is for synthetic tiles, and this recipe has none"),
        ("filters.agreement.keep", None, "filters.agreement.keep: Input should be a valid number (found None)"),
        ("filters.agreement.margin", 2, "filters.agreement.margin: belongs to kind pixel; agreement allows: kind, after, keep"),
        ("filters.pixel.keep", 0.5, "filters.pixel.keep: belongs to kind agreement, clip; pixel allows: kind, after, margin"),
        ("filters.agreement.after", "agreement-pixel", "filters.agreement.after: goes in a circle: agreement after agreement-pixel"),
        ("filters.agreement", {"kind": "clip", "keep": 0.5}, "filters.agreement.kind: clip needs the section clip; give path"),
        ("generation.cmmd", True, "generation: needs the section clip; give path of a CLIP-like model, or repo and revision"),
        ("clip", {"repo": "a/b"}, "clip.revision: repo and revision go together"),
        ("resamplings.rare.kind", "often", "resamplings.rare.kind: unknown kind 'often'; allowed: hardness, rare"),
        ("evaluation", {"window": 32, "stride": 33}, "evaluation.stride: 33 with windows of 32 pixels leaves gaps; allowed: 1...32"),
        ("recipes.real.control", "triattention", "recipes.real: control, sampler and synthetic_per_real go together"),
        ("experiments.main.recipes.1", "fake", "experiments.main.recipes.1: unknown name 'fake'; allowed: real, real-equal, triattention"),
        ("experiments.main.segmentors", ["unet"], "experiments.main.segmentors.0: unknown name 'unet'; allowed: segformer_tiny, unet_tiny"),
        ("experiments.main.baseline", "reference", "experiments.main.baseline: 'reference' is not among the recipes; allowed: real, real-"),
        ("tables", ["mine"], "tables.0: unknown name 'mine'; allowed: main, control_schemes, crfm_steps"),
        ("tables", "main,mine", "tables.1: unknown name 'mine'; allowed: main, control_schemes, crfm_steps"),
        ("segmentors.unet_tiny.config", "my.py", "segmentors.unet_tiny.architecture: give the name of one, or config"),
        ("segmentors.unet_tiny.processes", 3, "segmentors.unet_tiny.batch_size: 8 tiles cannot be shared out evenly over 3 processes"),
        ("segmentors.unet_tiny.batch_size", 1, "segmentors.unet_tiny.batch_size: Input should be greater than or equal to 2 (found 1)"),
        ("segmentors.unet_tiny.warmup", 1000, "segmentors.unet_tiny.warmup: 1000 leaves nothing of the 1000 iterations on ref"),
        ("filters.none", {"kind": "pixel"}, "filters.none: none stands for no filter; give it another name"),
        ("segmentors.unet_tiny.class_weights", [0, 0], "segmentors.unet_tiny.class_weights: all are 0; nothing would be learned"),
        ("segmentors.unet_tiny.pretrained", {"url": "ftp://a"}, "segmentors.unet_tiny.pretrained"),
        ("critic.recipe", "crfm", "critic.recipe: must train on real tiles only; 'crfm' has synthetic ones"),
        ("judge", {"recipe": "real", "segmentor": "segformer_tiny", "seed": 0}, "judge: is the critic itself"),
        # missing masks, and looks at held-out tiles
        ("samplers.crfm.mask_guidance_scale", 0.5, "samplers.crfm.mask_guidance_scale: Input should be greater than or equal to 1"),
        ("samplers.crfm.mask_guidance_scale", 2, "samplers.crfm.mask_guidance_scale: controls.triattention never sees a missing mask; set"),
        ("controls.triattention.patience", 2, "controls.triattention.patience: nothing is looked at while training; set validate_every"),
        ("controls.triattention.unlabelled_masks", "predicted", "controls.triattention.unlabelled_masks: predicted, and no sample is of"),
        ("controls.triattention.mask_dropout", 1, "controls.triattention.mask_dropout: 1 leaves all masks out, and the branch mask would"),
        # from elsewhere
        ("critic.path", "critic.pth", "critic.recipe: give recipe and segmentor of one to train, or the path of one from elsewhere"),
        ("critic", {"path": ""}, "critic.recipe: give recipe and segmentor of one to train, or the path of one from elsewhere"),
        ("judge", {"recipe": "real"}, "judge.recipe: give recipe and segmentor of one to train, or the path of one from elsewhere"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused_with_its_key_and_what_is_allowed(key, value, message):
    content = read(ROOT / "config.yaml")
    if key == "experiments.main.recipes.1":
        content["experiments"]["main"] |= {"recipes": ["real", value], "baseline": "real"}
    else:
        content = changed(content, key, value)
    with pytest.raises(ConfigError, match=f"(?m)^  {re.escape(message)}"):
        load_settings(content)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, False),
        ({"mask_dropout": 0.1}, True),
        ({"unlabelled_share": 0.5}, True),
        ({"unlabelled_share": 0.5, "unlabelled_masks": "predicted"}, False),
        ({"scheme": "adapter"}, True),
        ({"scheme": "controlnet"}, True),
        ({"scheme": "adapter", "trainable": ["image", "mask"]}, False),
        ({"scheme": "adapter", "start_from": "somewhere"}, False),
    ],
)
def test_a_generator_knows_missing_masks_of_samples_that_had_none_or_of_a_base_that_stays(changes, known):
    assert Control(steps=1, batch_size=1, learning_rate=1e-3, **changes).knows_missing_masks == known


def test_later_keys_at_their_defaults_are_no_part_of_what_results_depend_on():
    plain, guided = Sampler(), Sampler(mask_guidance_scale=2)
    assert "mask_guidance_scale" not in plain.result_keys() and guided.result_keys()["mask_guidance_scale"] == 2
    control = Control(steps=1, batch_size=1, learning_rate=1e-3, validate_every=1)
    assert set(Control.LATER_KEYS) & set(control.result_keys()) == {"validate_every"}
    assert Control(**control.result_keys(), **control.performance_keys()) == control


def test_critic_and_judge_from_elsewhere_differ():
    content = changed(read(ROOT / "config.yaml"), "critic", {"path": "one.pth"})
    assert load_settings(changed(content, "judge", {"path": "other"})).judge.recipe is None
    with pytest.raises(ConfigError, match="judge: is the critic itself"):
        load_settings(changed(content, "judge", {"path": "one.pth"}))


def test_every_fault_is_listed_at_once():
    content = changed(changed(read(ROOT / "config.yaml"), "recipes.crfm.sampler", "ddim"), "judge.recipe", "ideal")
    with pytest.raises(ConfigError, match=r"recipes\.crfm\.sampler: (.|\n)*judge\.recipe: "):
        load_settings(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("palette", [[0, 0, 0]], "palette has 1 colours for 7 classes"),
        ("label_map", {1: 7}, "label_map: 1 -> 7 is no class id; allowed: 0...6 and 255"),
        ("test", "val", "test: 'val' is no split of the source; it has: train, test, reference"),
        ("source.kind", "zip", "source.kind: unknown kind 'zip'; allowed: embedded, folder, fusu, geotiff, loveda, released"),
        ("source.scene", {}, "source.scene: unknown key; allowed: kind, scenes, size, seed"),
        ("source.scenes.train", 0, "source.scenes.train: Input should be greater than 0 (found 0)"),
        ("tile.size", "64px", "tile.size: Input should be a valid integer"),
    ],
)
def test_a_wrong_dataset_is_refused_with_its_key_and_what_is_allowed(tmp_path, key, value, message):
    file = tmp_path / "d.yaml"
    file.write_text(yaml.safe_dump(changed(read(DATASETS / "embedded.yaml"), key, value), sort_keys=False))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_dataset(file)
    assert str(file) in str(caught.value)


def test_a_dataset_file_that_is_missing_or_no_yaml_is_named(tmp_path):
    embedded = load_settings(read(ROOT / "config.yaml"))
    with pytest.raises(
        ConfigError, match=r"datasets: no file .*nowhere\.yaml; allowed: a path, or one of countries, dubai, embedded, embedded-25,"
    ):
        load_datasets(embedded.model_copy(update={"datasets": ["nowhere"]}), ROOT)
    (tmp_path / "broken.yaml").write_text("name: [unclosed")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_dataset(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml: holds no keys"):
        load_dataset(tmp_path / "empty.yaml")


def test_nothing_may_train_on_the_test_split(tmp_path):
    config = read(ROOT / "config.yaml")
    with pytest.raises(ConfigError, match=r"recipes\.reference\.split: 'test' is the test split of embedded; nothing may train on it"):
        load_datasets(load_settings(changed(config, "recipes.reference.split", "test")), ROOT)
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(changed(read(DATASETS / "embedded.yaml"), "train", "test")))
    with pytest.raises(ConfigError, match="is the test split of embedded"):
        load_datasets(load_settings(changed(config, "datasets", [str(tmp_path / "d.yaml")])), ROOT)


def test_a_recipe_names_a_split_that_the_dataset_has():
    settings = load_settings(changed(read(ROOT / "config.yaml"), "recipes.reference.split", "val"))
    with pytest.raises(ConfigError, match=r"recipes\.reference\.split: embedded has no split 'val'; allowed: train, test, reference"):
        load_datasets(settings, ROOT)


def test_two_datasets_of_one_name_are_refused(tmp_path):
    (tmp_path / "again.yaml").write_text((DATASETS / "embedded.yaml").read_text())
    settings = load_settings(changed(read(ROOT / "config.yaml"), "datasets", ["embedded", str(tmp_path / "again.yaml")]))
    with pytest.raises(ConfigError, match="'embedded' occurs twice"):
        load_datasets(settings, ROOT)


# ------------------------------------------------------------------------------------------------------- what ships


@pytest.mark.parametrize("name", ["config.yaml", "configs/paper.yaml"])
def test_the_shipped_configurations_are_valid(name):
    settings = load_settings(read(ROOT / name))
    datasets = load_datasets(settings, ROOT)
    assert list(datasets)[: len(settings.datasets)] == settings.datasets and set(datasets) > set(settings.datasets)
    assert all(copies(settings, r.control, r.sampler) == 3 for r in settings.recipes.values() if r.control and r.sampler != "crfm-many")
    everything = load_settings(read(ROOT / name) | {"tables": "all"})
    assert everything.tables == list(settings.experiments) and copies(everything, "triattention", "crfm-many") == 5
    assert [table for table in ("main", "control_schemes", "crfm_steps", "rectification", "filters", "ratios", "few_shot", "segmentors")
            if table not in settings.experiments] == []  # fmt: skip


def test_the_overlay_for_dubai_fits_the_default():
    content = read(ROOT / "config.yaml")
    update_config(content, read(ROOT / "configs" / "dubai.yaml"))
    settings = load_settings(content)
    dataset = load_datasets(settings, ROOT)["dubai"]
    assert (
        settings.datasets == ["dubai"]
        and set(settings.controls) > {"triattention"}
        and settings.iterations("real", "segformer_tiny") == 500
    )
    assert {"train", "test", settings.recipes["reference"].split, settings.generation.split} == set(dataset.source.splits)


def test_tables_are_named_in_a_list_or_with_commas_or_are_all():
    content = read(ROOT / "config.yaml")
    for said, wanted in [(["main"], ["main"]), ("main, ratios", ["main", "ratios"]), ("ratios", ["ratios"])]:
        assert list(selected_tables(load_settings(content | {"tables": said}))) == wanted


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("filters.pixel.statistics_split", "test", "filters.pixel.statistics_split: 'test' is the test split of embedded"),
        ("filters.pixel.statistics_split", "val", "filters.pixel.statistics_split: embedded has no split 'val'; allowed: train, test"),
        ("generation.split", "val", "generation.split: embedded has no split 'val'; allowed: train, test, reference"),
        ("evaluation", {"mode": "slide", "stride": 65}, "evaluation.stride: 65 with windows of embedded's tile size, 64, leaves gaps"),
        ("resamplings.rare.classes", ["sea"], "resamplings.rare.classes: embedded has no class 'sea'; allowed: background, building"),
        ("layouts.rich", {"kind": "augmented", "shares": {"sea": 0.1}}, "layouts.rich.shares: embedded has no class 'sea'; allowed: back"),
        ("layouts.reference", {"kind": "predicted"}, "layouts.reference: is the name of a split of embedded; give the layouts another"),
        ("segmentors.unet_tiny.class_weights", [1, 2], "segmentors.unet_tiny.class_weights: 2 numbers for the 7 classes of embedded"),
        ("controls.siamese.unlabelled_share", 0.5, "controls.siamese.unlabelled_share: embedded has no unlabelled scenes; name them in"),
        ("experiments.few_shot.datasets", ["embedded", "fewer"], "datasets: no file"),
        ("experiments.few_shot.datasets", ["folder"], "experiments.few_shot.datasets:"),
    ],
)
def test_what_does_not_fit_a_dataset_is_refused_with_its_key(key, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_datasets(load_settings(changed(read(ROOT / "config.yaml"), key, value)), ROOT)


def test_predicted_layouts_are_drawn_only_where_there_are_unlabelled_scenes():
    content = changed(read(ROOT / "config.yaml"), "layouts", {"guessed": {"kind": "predicted"}})
    load_datasets(load_settings(content), ROOT)  # no sampler draws them
    with pytest.raises(ConfigError, match=r"samplers\.crfm\.layouts: of kind predicted, and embedded has no unlabelled scenes; name some"):
        load_datasets(load_settings(changed(content, "samplers.crfm.layouts", "guessed")), ROOT)


def test_what_the_readme_says_of_own_data_is_a_valid_configuration():
    """Own classes and splits fit the embedded default with the overlay that is printed there, whatever other tables name."""
    (overlay,) = re.findall(r"printf '([^']+)' > my_run.yaml", (ROOT / "README.md").read_text())
    content = read(ROOT / "config.yaml")
    for key, value in yaml.safe_load(overlay.replace("\\n", "\n")).items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    path = DATASETS / "geotiff.yaml"
    dataset = load_dataset(path)
    content["resamplings"]["rare"]["classes"] = dataset.classes[:1]
    content["segmentors"]["unet_tiny"]["class_weights"] = [1.0] * len(dataset.classes)
    settings = load_settings(content | {"datasets": [str(path)]})
    assert load_datasets(settings, ROOT)["my_scenes"] == dataset
    with pytest.raises(ConfigError, match="of embedded"):
        load_datasets(load_settings(content | {"datasets": [str(path)], "tables": "all"}), ROOT)


def test_a_dataset_like_another_differs_in_what_it_says():
    whole, half = load_dataset(DATASETS / "embedded.yaml"), load_dataset(DATASETS / "embedded-50.yaml")
    assert half.select["train"].fraction == 0.5 and half.name == "embedded-50"
    assert half.model_copy(update={key: getattr(whole, key) for key in ("name", "about", "select")}) == whole


def test_a_dataset_like_itself_or_like_a_path_is_refused(tmp_path):
    for name, other in [("a", "b"), ("b", "a"), ("c", "../a")]:
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nlike: {other}\n")
    for name, message in [("a", "goes in a circle"), ("c", "'../a' is no name")]:
        with pytest.raises(ConfigError, match=message):
            load_dataset(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(("file", "written"), [("configs/schema.json", json_schema), ("docs/configuration.md", configuration_page)])
def test_what_is_generated_from_the_settings_is_in_step_with_them(file, written):
    assert (ROOT / file).read_text(encoding="utf-8") == written()


def test_the_embedded_default_shows_every_key_that_it_could_set():
    content = read(ROOT / "config.yaml")
    assert set(content) == set(Settings.model_fields)
    assert set(content["controls"]["triattention"]) == set(Settings.model_json_schema()["$defs"]["Control"]["properties"])


def test_the_presets_are_the_published_ones():
    # steps k, inner steps J, schedule, pixels, batch reduction, normalise, shrink, clamp
    table = {
        "paper": (4, 1, "constant", "valid", "sum", "none", False, False),
        "released": (4, 1, "linear_decrease", "wrong", "mean", "none", False, True),
    }
    for name, row in table.items():
        preset = getattr(RectifySettings, name)()
        columns = ("steps", "inner_steps", "schedule", "pixels", "reduction", "normalise", "shrink", "clamp")
        assert tuple(getattr(preset, column) for column in columns) == row
        assert preset.step_size == 0.1
    assert RectifySettings.released().step_sizes(23) == pytest.approx([0.1 * (1 - i / 23) for i in (1, 2, 3, 4)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        RectifySettings().steps = 5


def pins() -> dict[str, str]:
    files = [ROOT / "requirements.txt", ROOT / "requirements-without-dependencies.txt"]
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    assert [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    return dict(line.split("==") for line in lines if line)


@pytest.mark.parametrize("name", ["data", "generator", "segmentor", "synthesis", "report"])
def test_environments_are_pinned_as_the_requirements_are(name):
    required = pins()
    *_, listed = read(ROOT / "envs" / f"{name}.yaml")["dependencies"]
    named = dict(pin.split("==") for pin in listed["pip"])
    assert len(named) >= 9 and named == {package: required[package] for package in named}
