"""Recipes with labels of the critic: what is refused, what the defaults leave as it was, and which results they need."""

from __future__ import annotations

import copy

import pytest
import yaml
from paths import ROOT

from crfm_core import ConfigError
from crfm_core.experiment import Experiment
from crfm_core.layout import Layout
from crfm_core.settings import Dataset, PseudoLabels, Recipe, Settings, load_datasets, load_settings

RESULTS = Layout("results")
REFUSED = r"recipes\.pseudo\.pseudo: embedded has no unlabelled scenes; name some in its source\.unlabelled, or leave pseudo out of"


def content(recipes: dict, tables: dict, **changes) -> dict:
    """The default configuration with more recipes, and tables of them, the first of which is built."""
    found = copy.deepcopy(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    found["recipes"] |= copy.deepcopy(recipes)
    found["experiments"] |= {
        name: {"title": "?", "recipes": names, "segmentors": ["segformer_tiny"]} | more for name, (names, more) in tables.items()
    }
    return found | {"tables": list(tables)[:1]} | changes


MIXED = {"control": "triattention", "sampler": "crfm", "synthetic_per_real": 1}
RECIPES = {"pseudo": {"pseudo": True}, "both": MIXED | {"pseudo": True, "pseudo_weight": 0.5}}


@pytest.fixture
def unlabelled(monkeypatch):
    """Every dataset has unlabelled scenes."""
    monkeypatch.setattr(Dataset, "has_unlabelled", True, raising=False)


def experiment_of(config: dict) -> Experiment:
    settings = load_settings(config)
    return Experiment(settings, load_datasets(settings, ROOT))


def test_a_recipe_with_pseudo_labels_in_a_built_table_needs_unlabelled_scenes():
    with pytest.raises(ConfigError, match=REFUSED):
        experiment_of(content(RECIPES, {"one": (["real", "pseudo"], {})}))


def test_a_table_of_other_datasets_and_one_that_is_not_built_ask_for_none():
    experiment_of(content(RECIPES, {"one": (["real"], {}), "other": (["pseudo"], {})}))
    built = content(RECIPES, {"one": (["real"], {"datasets": ["embedded-50"]}), "other": (["pseudo"], {})})
    experiment_of(built)
    with pytest.raises(ConfigError, match=REFUSED):
        experiment_of(built | {"tables": ["one", "other"]})


def test_a_recipe_that_no_table_has_is_refused_when_its_file_is_asked_for():
    experiment = experiment_of(content(RECIPES, {"one": (["real"], {})}))
    assert experiment.pseudo_labels("embedded", "real") is None
    with pytest.raises(ConfigError, match=REFUSED):
        experiment.pseudo_labels("embedded", "pseudo")


@pytest.mark.parametrize("who", ["critic", "judge"])
def test_critic_and_judge_do_not_train_on_labels_that_the_critic_makes(unlabelled, who):
    config = content(RECIPES, {"one": (["real", "pseudo"], {})})
    config[who] = {"recipe": "pseudo", "segmentor": "unet_tiny", "seed": 7}
    with pytest.raises(ConfigError, match=rf"{who}\.recipe: must train on real labels only; 'pseudo' has labels that the critic makes; na"):
        load_settings(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipes.real.pseudo_weight": 2}, r"recipes\.real\.pseudo_weight: is for pseudo-labelled tiles, and this recipe has none; set"),
        ({"recipes.pseudo.pseudo_weight": 0}, r"recipes\.pseudo\.pseudo_weight: Input should be greater than 0 \(found 0\)"),
        ({"recipes.pseudo.pseudo": "some"}, r"recipes\.pseudo\.pseudo: Input should be a valid boolean"),
        ({"pseudo_labels.keep": 0}, r"pseudo_labels\.keep: Input should be greater than 0 \(found 0\)"),
        ({"pseudo_labels.keep": 1.1}, r"pseudo_labels\.keep: Input should be less than or equal to 1 \(found 1\.1\)"),
        ({"pseudo_labels.share": 1}, r"pseudo_labels\.share: unknown key; allowed: keep"),
    ],
)
def test_wrong_values_are_refused_with_their_key(values, message):
    config = content(RECIPES, {"one": (["real"], {})}, pseudo_labels={})
    for key, value in values.items():
        *path, last = key.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    with pytest.raises(ConfigError, match=message):
        load_settings(config)


def test_a_split_may_not_have_the_name_of_the_pseudo_labelled_tiles(tmp_path):
    world = yaml.safe_load((ROOT / "configs" / "datasets" / "embedded.yaml").read_text(encoding="utf-8"))
    world["source"]["scenes"]["pseudo"] = 1
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(world))
    config = content({}, {"one": (["real"], {})}, datasets=[str(tmp_path / "world.yaml")])
    with pytest.raises(ConfigError, match="split: embedded has a split 'pseudo', which is the name of unlabelled tiles"):
        experiment_of(config)


def test_defaults_leave_what_recipes_depend_on_as_it_was():
    assert set(Recipe().result_keys()) == {
        "split", "schedule", "control", "sampler", "filter", "resample", "synthetic_per_real", "real_weight",
    }  # fmt: skip
    assert Recipe(pseudo=True).result_keys()["pseudo"] is True and PseudoLabels().keep == 0.8
    assert Settings.model_fields["pseudo_labels"].default == PseudoLabels()


def test_labels_are_made_where_a_recipe_a_generator_or_layouts_need_them(unlabelled):
    labels = RESULTS.pseudo_labels("embedded")
    without = experiment_of(content(RECIPES, {"one": (["real", "crfm"], {})}))
    assert labels not in without.stage_files() and without.report_files("embedded")["pseudo_labels"] == {}
    for recipes in (["pseudo"], ["both"]):
        experiment = experiment_of(content(RECIPES, {"one": (["real", *recipes], {})}))
        assert experiment.pseudo_labels("embedded", recipes[0]) == labels in experiment.stage_files()
        assert experiment.report_files("embedded")["pseudo_labels"] == {"embedded": labels}
    assert experiment.pseudo_labels("embedded", "real") is None and experiment.samples("embedded", "both")
    trained = content(RECIPES, {"one": (["real", "crfm"], {})})
    trained["controls"]["triattention"] |= {"unlabelled_share": 0.5}
    assert labels not in experiment_of(trained).stage_files(), "unlabelled tiles without masks"
    trained["controls"]["triattention"] |= {"unlabelled_masks": "predicted"}
    assert labels in experiment_of(trained).stage_files()
    drawn = content(RECIPES, {"one": (["real", "crfm"], {})}, layouts={"guessed": {"kind": "predicted"}})
    drawn["samplers"]["crfm"] |= {"layouts": "guessed"}
    assert labels in experiment_of(drawn).stage_files()
