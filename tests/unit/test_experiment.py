"""What follows from a configuration, without the workflow engine: tables, runs, copies, iterations, filters, and the files of each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml
from paths import ROOT

from crfm_core import ConfigError
from crfm_core.experiment import Experiment, copies, downloads, filter_chain, hub_models, keeps_every_image, layout_copies, selected_tables
from crfm_core.layout import Layout
from crfm_core.settings import load_datasets, load_settings

RESULTS = Layout("results")


def settings_of(**changes):
    content = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and content[key] else value
    return load_settings(content)


def world(**changes) -> Experiment:
    settings = settings_of(**changes)
    return Experiment(settings, load_datasets(settings, ROOT))


# ----------------------------------------------------------------------------------------------------- of settings alone


def test_an_equal_recipe_trains_as_long_as_the_longest_of_the_tables():
    settings = settings_of()
    longest = settings.iterations("crfm", "segformer_tiny")
    assert longest == 2 * settings.segmentors["segformer_tiny"].iterations == settings.iterations("real-equal", "segformer_tiny")
    assert settings.iterations("real", "segformer_tiny") == longest // 2


def test_the_longest_recipe_counts_whether_its_table_is_built_or_not():
    settings = settings_of(recipes={"hardness": {"schedule": 4}}, tables=["main"])
    assert settings.iterations("real-equal", "segformer_tiny") == 4 * settings.segmentors["segformer_tiny"].iterations


def test_filters_come_in_the_order_in_which_they_are_applied():
    settings = settings_of()
    assert filter_chain(settings, "agreement-pixel") == ["agreement", "agreement-pixel"] and filter_chain(settings, None) == []


def test_as_many_copies_are_made_as_the_built_tables_take_and_no_more():
    assert copies(settings_of(), "triattention", "crfm") == 3
    assert copies(settings_of(), "triattention", "crfm-many") == 5, "no built table uses it: as the most demanding recipe of all"
    one = {"only": {"title": "?", "recipes": ["real", "ratio-1"], "segmentors": ["segformer_tiny"]}}
    assert copies(settings_of(experiments=one, tables=["only"]), "triattention", "crfm-many") == 1
    assert copies(settings_of(), "siamese", "released") == 1, "what no recipe uses"


def test_there_are_layouts_for_the_most_demanding_of_the_samplers_that_draw_them():
    layouts = {"rich": {"kind": "augmented"}, "unused": {"kind": "augmented"}}
    drawn = {name: settings_of().samplers[name].model_dump() | {"layouts": "rich"} for name in ("crfm", "crfm-many")}
    settings = settings_of(layouts=layouts, samplers=drawn)
    assert layout_copies(settings, "rich") == 5 and layout_copies(settings, "unused") == 1
    experiment = Experiment(settings, load_datasets(settings, ROOT))
    assert experiment.manifest_of_masks("embedded", "crfm") == RESULTS.layouts("embedded", "rich") in experiment.stage_files()
    assert experiment.masks_of("embedded", "crfm") == "rich" and experiment.masks_of("embedded", "plain") == "train"
    assert experiment.manifest_of_masks("embedded", "plain") == RESULTS.tiles("embedded", "train")
    assert RESULTS.layouts("embedded", "rich") not in world().stage_files()


def test_a_table_named_twice_is_built_once():
    assert list(selected_tables(settings_of(tables=["ratios", "main", "ratios"]))) == ["ratios", "main"]


def test_only_filters_of_pixels_leave_every_image():
    settings = settings_of()
    kept = {name: keeps_every_image(settings, name) for name in ("real", "crfm", "unfiltered", "agreement", "agreement-pixel", "hardness")}
    assert kept == {"real": True, "crfm": True, "unfiltered": True, "agreement": False, "agreement-pixel": False, "hardness": False}


def test_what_is_to_be_fetched_is_named_like_its_note():
    paper = load_settings(yaml.safe_load((ROOT / "configs" / "paper.yaml").read_text(encoding="utf-8")))
    assert list(hub_models(paper)) == ["base_model", "clip_model"] and hub_models(settings_of()) == {}
    assert list(downloads(paper)) == [*paper.segmentors, "inception"] and downloads(settings_of()) == {}
    weights = {"url": "https://example.org/a.pth", "sha256": "0" * 8}
    unet = settings_of().segmentors["unet_tiny"].model_dump() | {"pretrained": weights}
    settings = settings_of(segmentors={"inception": unet}, generation={"features": "inception", "weights": weights})
    with pytest.raises(ConfigError, match=r"segmentors\.inception: .* give it another name"):
        downloads(settings)


# ------------------------------------------------------------------------------------------------------- what is compared


def test_runs_of_several_tables_are_each_named_once():
    found = world(tables=["main", "segmentors"])
    assert found.runs() == list(dict.fromkeys(found.runs())) and set(found.runs()) >= {
        ("embedded", "crfm", "segformer_tiny"),
        ("embedded", "crfm", "unet_short"),
    }
    assert found.used_recipes("embedded") == ["real", "real-equal", "triattention", "crfm"]
    assert found.used_pairs("embedded") == [("triattention", "plain"), ("triattention", "crfm")]
    assert found.used_controls("embedded") == ["triattention"]


def test_a_table_may_name_datasets_that_are_not_the_runs_own():
    found = world(tables=["few_shot"])
    assert found.own == ["embedded"] and found.used_datasets == ["embedded", "embedded-25"]
    assert world(tables=["main"]).used_datasets == ["embedded"]


def test_filters_and_resamplings_of_the_used_recipes_come_with_those_that_go_before():
    found = world(tables=["filters"])
    names = [name for _, _, name in found.used_filters("embedded")]
    assert set(names) == {"pixel", "agreement", "agreement-pixel"} and names.index("agreement") < names.index("agreement-pixel")
    assert found.used_resamplings("embedded") == [("triattention", "crfm", "pixel", name) for name in ("hardness", "rare")]


def test_every_split_that_is_trained_on_or_scored_is_used():
    assert set(world().used_splits("embedded")) >= {"train", "test", "reference"}


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, False),
        ({"recipes": {"r": SimpleNamespace(split=None, pseudo=False)}, "controls": {"c": SimpleNamespace(unlabelled_share=0)}}, False),
        ({"recipes": {"r": SimpleNamespace(split=None, pseudo=True)}}, True),
        ({"controls": {"c": SimpleNamespace(unlabelled_share=0.5)}}, True),
        ({"layouts": {"l": SimpleNamespace(NEEDS_UNLABELLED=True)}}, True),
        ({"layouts": {"l": SimpleNamespace(NEEDS_UNLABELLED=False)}}, False),
    ],
)
def test_tiles_without_labels_are_used_where_something_reads_them_and_the_dataset_has_some(changes, used):
    found = world()
    found.settings = SimpleNamespace(**dict(found.settings) | {"layouts": {}} | changes)
    assert "unlabelled" not in found.used_splits("embedded")
    dataset = found.datasets["embedded"]
    found.datasets["embedded"] = dataset.model_copy(update={"source": dataset.source.model_copy(update={"unlabelled": 2})})
    assert ("unlabelled" in found.used_splits("embedded")) == used


# ------------------------------------------------------------------------------------------------------------------ files


def test_a_recipe_mixes_in_what_its_filters_and_resampling_leave():
    found = world(tables="all")
    assert found.samples("embedded", "real") is None
    assert found.samples("embedded", "unfiltered") == "results/embedded/synthetic/triattention/crfm/all.parquet"
    assert found.samples("embedded", "crfm") == "results/embedded/filtered/triattention/crfm/pixel.parquet"
    assert found.samples("embedded", "rare") == "results/embedded/resampled/triattention/crfm/pixel/rare.parquet"
    assert found.filtered("embedded", "triattention", "crfm", "none") == found.samples("embedded", "unfiltered")


def test_a_recipe_that_takes_more_copies_than_the_built_tables_make_is_refused():
    changes = {"experiments": {"only": {"title": "?", "recipes": ["real", "ratio-1"], "segmentors": ["segformer_tiny"]}}}
    with pytest.raises(ConfigError, match=r"recipes\.ratio-5\.synthetic_per_real: 5, and the tables that are built need only 1 per real"):
        world(**changes, tables=["only"]).samples("embedded", "ratio-5")


def test_a_table_is_made_from_the_scores_of_every_run_and_seed():
    found = world()
    table = found.tables["main"]
    assert len(found.scores(table)) == len(found.runs()) * len(found.settings.seeds)
    assert RESULTS.scores("embedded", "crfm", "segformer_tiny", 2) in found.scores(table)
    assert RESULTS.mix("embedded", "crfm") in found.mixes(table)
    shown = found.settings.experiments["crfm_steps"]
    pair = ("embedded", "triattention", "crfm")
    assert found.generation(found.settings.experiments["filters"]) == []
    assert {RESULTS.generation(*pair), RESULTS.agreement(*pair)} <= set(found.generation(shown))


def test_the_critic_is_the_trained_one_or_the_users():
    found = world(critic={"recipe": None, "segmentor": None, "path": "mine.pth"})
    assert found.checkpoint_of(found.settings.critic, "embedded") == "mine.pth"
    judge = found.settings.judge
    trained = RESULTS.checkpoint("embedded", judge.recipe, judge.segmentor, judge.seed)
    assert found.checkpoint_of(judge, "embedded") == trained


@pytest.mark.parametrize("tables", ["main", "few_shot", "all"])
def test_stages_name_files_of_the_layout_each_once(tables):
    found = world(tables=tables)
    stages = found.stage_files()
    assert len(stages) == len(set(stages)) and all(RESULTS.find(path) for path in stages)
    assert {RESULTS.find(path).kind for path in stages} == {
        "scenes", "captions", "generator", "shard", "synthetic", "mix", "checkpoint",
    }  # fmt: skip


def test_corrections_are_compared_on_the_runs_own_datasets_if_at_all():
    found = world(tables=["few_shot"])
    presets = ["plain", *found.settings.comparison.presets]
    compared = {name: list(found.report_files(name)["comparison"].values()) for name in ("embedded", *found.used_datasets)}
    assert compared.pop("embedded") == [RESULTS.comparison("embedded", preset) for preset in presets]
    assert not any(compared.values())
    assert world(comparison=None).report_files("embedded")["comparison"] == {}
