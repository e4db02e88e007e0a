"""How much work the jobs of a configuration are: tiles, images, steps and files are counted before any of them is made."""

from __future__ import annotations

import numpy as np
import pytest
from planned_jobs import RATES, configuration, planned, shard
from results_tree import draw_tile

from crfm_core.manifest import write_manifest
from crfm_core.planning.jobs import Job
from crfm_core.planning.workload import Workload
from crfm_core.settings import Selection


@pytest.mark.parametrize(
    ("datasets", "name", "split", "tiles", "basis"),
    [
        (["embedded"], "embedded", "test", 12 * 16, "of scenes to draw"),
        (["embedded-25"], "embedded-25", "train", 12, "a share of 48"),
        (["loveda"], "loveda", "train", 2522 * 4, "published number of scenes"),
        (["loveda5k"], "loveda5k", "train", 5000, "as selected"),
        (["fusu"], "fusu", "test", 12550, "about, share of the published number"),
        (["geotiff"], "my_scenes", "train", None, "unknown until they are cut"),
    ],
)
def test_tiles_are_counted_from_the_configuration_or_said_to_be_unknown(tmp_path, datasets, name, split, tiles, basis):
    changes = {"datasets": datasets, "recipes.reference": {}, "generation.split": None, "experiments.few_shot.datasets": None}
    settings, found = configuration("config.yaml", tmp_path, changes)
    count = Workload(settings, found, RATES).tile_count(name, split)
    assert (count.tiles, count.basis) == (tiles, basis)


def test_scenes_without_labels_and_their_tiles_are_counted(tmp_path):
    settings, found = configuration("config.yaml", tmp_path, {"datasets": ["embedded"]})
    plain = found["embedded"]
    source = plain.source.model_copy(update={"unlabelled": 3})
    selected = plain.model_copy(update={"source": source, "select": {"unlabelled": Selection(fraction=0.25)}})
    more = Workload(settings, {"embedded": selected}, RATES)
    assert more.before_selection(selected, "unlabelled").tiles == 3 * 16 and more.tile_count("embedded", "unlabelled").tiles == 12
    job = Job("list_scenes", {"dataset": "embedded"})
    drawn = [Workload(settings, {"embedded": one}, RATES).count("drawn_scenes", job) for one in (plain, selected)]
    assert drawn[1] - drawn[0] == pytest.approx(3 * (plain.source.size / 256) ** 2)
    assert more.count("prompts", Job("encode_prompts", {"dataset": "embedded", "split": "unlabelled"})) == 2
    settings, found = configuration("config.yaml", tmp_path, {"datasets": ["loveda"], "recipes.reference": {}, "generation.split": None})
    assert Workload(settings, found, RATES).tile_count("loveda", "unlabelled").tiles is None


def test_cut_tiles_are_counted_unless_they_will_be_cut_again(tmp_path):
    row = draw_tile(tmp_path / "embedded" / "tiles", "t", np.random.default_rng(0), 2, "train", "embedded")
    write_manifest(tmp_path / "embedded" / "tiles" / "train.parquet", [row | {"tile_id": f"t{number}"} for number in range(5)])
    settings, found = configuration("config.yaml", tmp_path)
    assert Workload(settings, found, RATES).tile_count("embedded", "train").tiles == 5
    assert Workload(settings, found, RATES, frozenset({("embedded", "train")})).tile_count("embedded", "train").tiles == 48


def test_jobs_on_an_unknown_number_of_tiles_are_not_known_and_the_others_are(tmp_path):
    changes = {"datasets": ["geotiff"], "recipes.reference": {}, "generation.split": None, "experiments.few_shot.datasets": None}
    names = {"dataset": "my_scenes", "recipe": "real", "segmentor": "segformer_tiny", "seed": "0"}
    plan = planned([Job("evaluate_segmentor", names), Job("train_segmentor", names)], tmp_path, changes=changes)
    assert [stage.basis for stage in plan.stages] == ["not known", "scaled"]


@pytest.mark.parametrize(
    ("preset", "rectify", "corrections"),
    [
        (None, {}, 0),
        ("default", {"steps": 4}, 4),
        ("paper", {"steps": 2, "inner_steps": 3}, 6),
        ("adaptive", {"steps": 23, "measure": False}, 23),
    ],
)
def test_sampling_counts_passes_of_the_network_and_corrections_as_several(tmp_path, preset, rectify, corrections):
    changes = {"samplers.crfm.preset": preset, "samplers.crfm.rectify": rectify}
    settings, datasets = configuration("config.yaml", tmp_path, changes)
    passes = Workload(settings, datasets, RATES).count("passes", shard(tmp_path, 1))
    assert passes == pytest.approx(3 * 48 / 2 * (23 + (corrections + 0.5) * RATES.correction_passes["embedded"]))


@pytest.mark.parametrize(("by_prompt", "by_mask", "passes"), [(1, 1, 1), (3, 1, 2), (1, 3, 2), (3, 3, 3)])
def test_each_kind_of_guidance_is_one_more_pass(tmp_path, by_prompt, by_mask, passes):
    changes = {"samplers.crfm": {"num_steps": 5, "guidance_scale": by_prompt, "mask_guidance_scale": by_mask}}
    changes |= {"controls.triattention.caption_dropout": 0.1, "controls.triattention.mask_dropout": 0.1}
    settings, datasets = configuration("config.yaml", tmp_path, changes)
    counted = Workload(settings, datasets, RATES).count("passes", shard(tmp_path, 1))
    assert counted == pytest.approx(3 * 48 / 2 * (5 * passes + 0.5 * RATES.correction_passes["embedded"]))


def test_looks_at_held_out_tiles_are_counted_with_the_images_of_a_training(tmp_path):
    job = Job("train_generator", {"dataset": "embedded", "control": "triattention"})
    changes = {"controls.triattention": {"steps": 100, "batch_size": 4, "learning_rate": 1e-3, "mask_dropout": 0.5}}
    counts = []
    for validate_every in (None, 30):
        changes["controls.triattention"] |= {"validate_every": validate_every}
        settings, datasets = configuration("config.yaml", tmp_path, changes)
        workload = Workload(settings, datasets, RATES)
        counts.append(workload.count("generator_images", job))
    # 6 of 48 tiles at 8 noise levels, with and without masks, a third of the work of a trained image each
    assert counts == [400, pytest.approx(400 + 4 * 6 * 8 * 2 / 3)]


def test_layouts_are_counted_by_the_copies_that_samplers_draw_of_them(tmp_path):
    changes = {"layouts": {"rich": {"kind": "augmented"}}, "samplers.crfm.layouts": "rich"}
    settings, found = configuration("config.yaml", tmp_path, changes)
    workload, names = Workload(settings, found, RATES), {"dataset": "embedded", "split": "rich"}
    assert workload.count("layouts", Job("draw_layouts", {"dataset": "embedded", "layouts": "rich"})) == 3 * 48
    assert workload.count("captions", Job("caption_tiles", names)) == 3 * 48
    assert workload.count("prompts", Job("encode_prompts", names)) == 1 + min(3 * 48, 2**7 - 1)
    assert workload.count("shard_images", shard(tmp_path, 1)) == 3 * 48 / 2


def test_latents_take_the_room_that_is_planned(tmp_path):
    """Of the paper's size: mean and logarithm of the variance, and the mask's, flipped too, in half precision."""
    settings, found = configuration("configs/paper.yaml", tmp_path)
    workload, job = Workload(settings, found, RATES), Job("encode_latents", {"dataset": "fusu4k", "mask_code": "grey"})
    assert workload.bytes_of(job) == 4000 * 2 * 3 * 16 * 64 * 64 * 2 and workload.count("tiles", job) == 4000
