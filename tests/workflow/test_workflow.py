"""The workflow as a user meets it: what it plans, what it refuses and how it says so, and that it continues where it stopped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import rasterio
import yaml
from engine import plan
from paths import CONFIGS, ROOT
from workflow_runs import folder_dataset, kill, planned, rewrite, rules, run, start, succeed, wait_for, write_scene

from crfm_core.manifest import read_manifest

SMALLEST = ("--configfile", "smallest.yaml")

#: Rules that a run uses only for files that are asked for by name.
ON_DEMAND = {"export_sd3", "synthesise_scene", "mosaic_tiles", "predict_tiles", "predict_scene", "zip_predictions", "plan", "preflight"}

#: Rules that stand for what a configuration gives instead of the embedded world and its base model.
GIVEN = {"check_base_model", "fetch_model", "fetch_dataset", "fetch_weights"}

#: Rules for unlabelled tiles and new layouts, which neither the default nor the paper has.
BEYOND_THE_PAPER = {"label_tiles", "draw_layouts"}

#: Rules of curation that only tables beside main use.
OTHER_TABLES = {"resample_tiles"}


# ------------------------------------------------------------------------------------------------------------- planning


def test_the_default_run_uses_every_rule_but_the_one_for_a_given_base_model(tmp_path):
    jobs = planned(succeed(tmp_path, "--dry-run"))
    assert set(jobs) == rules() - ON_DEMAND - GIVEN - BEYOND_THE_PAPER - OTHER_TABLES
    assert set(planned(succeed(tmp_path, "--dry-run", "--config", "tables=all"))) == rules() - ON_DEMAND - GIVEN - BEYOND_THE_PAPER
    assert jobs["synthesise_shard"] == 4 and jobs["train_segmentor"] == 13
    assert not (tmp_path / "results").exists()


def test_the_papers_scale_is_planned_in_seconds(tmp_path):
    before = os.times()
    said = succeed(tmp_path, "--dry-run", "--configfile", str(ROOT / "configs" / "paper.yaml"), "--config", "tables=all")
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10, "of the processor"
    assert {"results/paper/fusu4k/scenes.parquet", "results/paper/loveda5k/scenes.parquet"} <= set(
        re.findall(r"results/\S+\.parquet", said)
    )
    jobs = planned(said)
    assert set(jobs) == rules() - ON_DEMAND - BEYOND_THE_PAPER - {"build_base_model", "check_base_model"}
    assert jobs["synthesise_shard"] == 17 * 32 and jobs["tile_scenes"] == 12, "no job per tile or scene"


def test_training_asks_for_as_many_gpus_as_it_has_processes(small):
    training = {"steps": 5, "batch_size": 1, "learning_rate": 1e-3, "processes": 4}
    rewrite(small / "smallest.yaml", device="cuda", controls={"triattention": training})
    status, said = run(small, "results/small/generators/triattention", *SMALLEST)
    assert status and "device: cuda needs 4 GPU for one job, this machine shows 0" in said


def test_naming_a_file_plans_its_stage_and_what_it_needs(tmp_path):
    said = succeed(tmp_path, "--dry-run", "results/embedded/tiles/train.parquet")
    assert planned(said) == {"list_scenes": 1, "tile_scenes": 1}


@pytest.mark.parametrize(
    "files", [["config.yaml"], ["config.yaml", "configs/dubai.yaml"], ["configs/paper.yaml"]], ids=lambda files: files[-1]
)
def test_what_selects_or_tunes_never_looks_at_the_test_split(tmp_path, files):
    config = {"results": "made", "tables": "all"}
    dag = plan(tmp_path, [ROOT / file for file in files], overrides=config)
    looking = [job for job in dag.jobs if job.rule.name in ("sample_validation", "compare_corrections")]
    assert looking
    for job in looking:
        assert not [file for file in job.input if re.search(r"(tiles|captions|prompts)/(test|val)\.", str(file))], job
        assert [file for file in job.input if "/held_out." in str(file)]


def test_without_held_out_tiles_nothing_is_compared_and_the_target_is_refused_by_the_key(small):
    world = yaml.safe_load((small / "small_world.yaml").read_text())
    rewrite(small / "small_world.yaml", held_out=None, source=world["source"] | {"scenes": {"train": 2, "test": 2, "reference": 2}})
    jobs = planned(succeed(small, "--dry-run", *SMALLEST))
    assert not {"sample_validation", "compare_corrections"} & jobs.keys()
    status, said = run(small, "--dry-run", "results/small/validation/triattention/final.png", *SMALLEST)
    assert status and "dataset small: held_out: names no split, nor does val" in said


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": 3}, "shard: unknown key; allowed: scale, results, device"),
        ({"judge": {"recipe": "ideal", "segmentor": "unet_tiny"}}, "judge.recipe: unknown name 'ideal'; allowed: real, crfm, reference"),
        (
            {"datasets": ["nowhere"]},
            "allowed: a path, or one of countries, dubai, embedded, embedded-25, embedded-50, folder, fusu, fusu4k,",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_made(small, changes, message):
    rewrite(small / "smallest.yaml", **changes)
    status, said = run(small, *SMALLEST)
    assert status != 0 and message in said and "Traceback" not in said
    assert not (small / "results").exists() and "Job stats" not in said


def gpus() -> bool:
    return (
        bool(shutil.which("nvidia-smi"))
        and "GPU " in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    )


@pytest.mark.skipif(gpus(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_missed_at_the_start(small):
    rewrite(small / "smallest.yaml", device="cuda")
    status, said = run(small, *SMALLEST)
    assert status != 0 and "device: cuda needs 1 GPU for one job, this machine shows 0; set `device: cpu` or fewer" in said
    assert not list(small.glob("results/**/*.parquet"))


def test_too_little_disk_is_noticed_at_the_start(small):
    rewrite(small / "smallest.yaml", disk_gb=1e9)
    status, said = run(small, *SMALLEST)
    assert status != 0 and "results: 1000000000.0 GB needed" in said and "free some space or set `results` to another disk" in said
    assert not list(small.glob("results/**/*.parquet"))


def test_a_base_model_that_is_not_whole_is_missed_at_the_start(small):
    (small / "model" / "vae").mkdir(parents=True)
    rewrite(small / "smallest.yaml", base_model={"kind": "folder", "path": "model"})
    status, said = run(small, *SMALLEST)
    assert status != 0 and "base_model.path: model lacks model_index.json, transformer, scheduler, text_encoder," in said
    assert "hf download" in said and not list(small.glob("results/**/*.parquet"))


def test_a_missing_folder_of_scenes_is_named_with_the_remedy(small):
    folder_dataset(small)
    status, said = run(small, "results/small/scenes.parquet", *SMALLEST)
    assert status != 0 and f"{small / 'scenes'}: no such folder; set source.root of dataset small to where its scenes lie" in said


def test_a_label_of_another_size_is_named_with_the_remedy(small):
    folder_dataset(small)
    for index, split in enumerate(("train", "test", "reference")):
        write_scene(small / "scenes" / split / "images" / f"s{index}.png", index, 64, (3,))
        write_scene(small / "scenes" / split / "labels" / f"s{index}.png", index, 48 if split == "test" else 64)
    status, said = run(small, "results/small/scenes.parquet", *SMALLEST)
    assert status != 0 and re.search(r"error: \S*test/labels/s1\.png: 48x48 pixels, but its image .* has 64x64; resample the label", said)
    assert not (small / "results" / "small" / "scenes.parquet").exists()


# ----------------------------------------------------------------------------------------------------------------- runs


def test_the_first_stages_run_and_a_second_run_has_nothing_to_do(small):
    targets = ["results/small/captions/train.parquet", "results/small/tiles/test.parquet"]
    said = succeed(small, *targets, *SMALLEST)
    assert planned(said) == {"list_scenes": 1, "tile_scenes": 2, "caption_tiles": 1}
    table = read_manifest(small / targets[0])
    assert len(table) == 8 and all(caption.startswith("a satellite image of ") for caption in table.caption)
    for rule in ("list_scenes", "tile_scenes-train", "caption_tiles-train"):
        assert (small / "results" / "logs" / "small" / f"{rule}.log").is_file()
        assert (small / "results" / "benchmarks" / "small" / f"{rule}.tsv").is_file()
    assert "Nothing to be done" in succeed(small, *targets, *SMALLEST)


def test_a_lock_protects_a_living_run_and_is_cleared_after_a_killed_one(small):
    target = "results/small/scenes.parquet"
    rewrite(
        small / "endless.yaml",
        small / "small_world.yaml",
        source={"kind": "embedded", "scenes": {"train": 10**4, "test": 1, "reference": 1, "held_out": 1}},
    )
    rewrite(small / "long.yaml", small / "smallest.yaml", datasets=["endless.yaml"])
    long = start(small, target, "--configfile", "long.yaml")
    try:
        wait_for(long, lambda: (small / "results" / "logs" / "small" / "list_scenes.log").exists())
        status, said = run(small, target, *SMALLEST)
        assert status != 0 and "cannot be locked" in said
        assert long.poll() is None
    finally:
        kill(long)
    assert list((small / ".snakemake").glob("locks/*")), "the killed run left its locks"
    succeed(small, target, *SMALLEST)
    assert (small / target).is_file()
    assert list((small / ".snakemake").glob("locks/*")) == []


# ------------------------------------------------------------------------------------------------------- the whole chain


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "results" / "tables").glob("*.csv")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A working folder with a whole undisturbed run."""
    folder = tmp_path_factory.mktemp("finished")
    for file in CONFIGS.iterdir():
        shutil.copy(file, folder)
    said = succeed(folder, *SMALLEST)
    assert set(planned(said)) == rules() - ON_DEMAND - GIVEN - BEYOND_THE_PAPER - OTHER_TABLES
    return folder


@pytest.mark.slow
def test_the_whole_chain_ends_in_tables_and_a_report(finished):
    assert list(tables(finished)) == ["main.csv"]
    assert len(pd.read_csv(finished / "results" / "tables" / "main.csv")) == 2
    page = (finished / "results" / "report.html").read_text(encoding="utf-8")
    assert f"snakemake --cores all results/report.html --snakefile {os.path.relpath(ROOT / 'Snakefile', finished)} --configfile" in page
    assert not list((finished / "results").rglob("*unfinished")), "no state is left over"
    assert "Nothing to be done" in succeed(finished, *SMALLEST)


@pytest.mark.slow
def test_snakemakes_own_report_holds_tables_report_and_data_sheets_and_a_plan_has_nothing_left(finished):
    succeed(finished, *SMALLEST, "--report", "run.html")
    page = (finished / "run.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("main.csv", "report.html", "index.html", "Data sheet of"))
    assert "Nothing to do: " in succeed(finished, "plan", *SMALLEST)


@pytest.mark.slow
def test_a_generator_is_trained_in_two_processes_sampled_and_exported_by_naming_its_files(finished):
    pair, results = ("--configfile", "smallest.yaml", "pair.yaml"), finished / "results" / "small"
    scheme = {"scheme": "siamese", "steps": 20, "batch_size": 1, "learning_rate": 1e-3, "processes": 2, "checkpoint_every": 5}
    (finished / "pair.yaml").write_text(yaml.safe_dump({"controls": {"pair": scheme}}))
    targets = ["results/small/validation/pair/final.png", "results/small/exports/pair"]
    jobs = planned(succeed(finished, "--cores", "2", *targets, *pair))
    assert jobs == {"train_generator": 1, "sample_validation": 1, "export_sd3": 1}
    assert "generator step 20/20" in (finished / "results" / "logs" / "small" / "train_generator-pair.log").read_text()
    assert (results / "exports" / "pair" / "model_index.json").is_file()
    assert not list(results.rglob("*.unfinished"))


@pytest.mark.slow
def test_a_whole_scene_is_drawn_by_naming_its_file_and_lies_where_its_mask_lies(finished):
    target = finished / "results" / "small" / "synthetic_scenes" / "triattention" / "crfm" / "test-000.tif"
    assert planned(succeed(finished, str(target.relative_to(finished)), *SMALLEST)) == {"synthesise_scene": 1}
    with rasterio.open(target) as image, rasterio.open(finished / "results" / "small" / "scenes" / "test" / "test-000_label.tif") as mask:
        assert (image.crs, image.transform, image.shape) == (mask.crs, mask.transform, mask.shape) and image.count == 3
    status, _ = run(finished, str(target.with_name("nowhere.tif").relative_to(finished)), *SMALLEST)
    assert status
    log = finished / "results" / "logs" / "small" / "synthesise_scene-triattention-crfm-nowhere.log"
    assert "no scene 'nowhere'; it has " in log.read_text()


@pytest.mark.slow
def test_without_one_shard_only_that_shard_and_what_follows_is_made_again(finished):
    folder = finished / "results" / "small" / "synthetic" / "triattention" / "crfm"
    shard = folder / "shard-1-of-2.parquet"
    before, table = shard.read_bytes(), tables(finished)
    shard.unlink()
    jobs = planned(succeed(finished, *SMALLEST))
    assert jobs["synthesise_shard"] == jobs["gather_shards"] == jobs["filter_tiles"] == jobs["mix_tiles"] == 1
    assert jobs["train_segmentor"] == jobs["evaluate_segmentor"] == 2, "both seeds of the one recipe with synthetic tiles"
    assert not {"train_generator", "build_base_model", "encode_latents", "tile_scenes"} & set(jobs)
    log = finished / "results" / "logs" / "small" / "synthesise_shard-triattention-crfm-1-of-2.log"
    assert "4 images, 4 of them already there" in log.read_text()
    assert shard.read_bytes() == before and tables(finished) == table


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_with_the_same_tables(finished, small):
    results = small / "results" / "small"
    steps = [
        lambda: any((results / "generators" / "triattention.unfinished").glob("checkpoint-*.pt")),
        lambda: any((results / "synthetic" / "triattention" / "crfm" / "images").glob("*/*.tif")),
    ]
    for reached in steps:
        process = start(small, *SMALLEST)
        try:
            wait_for(process, reached)
        finally:
            kill(process)
        assert not (small / "results" / "report.html").exists()
    assert not (results / "synthetic" / "triattention" / "crfm" / "all.parquet").exists()
    succeed(small, *SMALLEST)
    assert tables(small) == tables(finished)
    log = (results.parent / "logs" / "small" / "synthesise_shard-triattention-crfm-1-of-2.log").read_text()
    log += (results.parent / "logs" / "small" / "synthesise_shard-triattention-crfm-2-of-2.log").read_text()
    assert re.search(r"4 images, [1-4] of them already there", log)
