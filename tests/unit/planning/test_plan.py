"""What a run still takes: the jobs are the workflow's own, and the times follow from what was measured, or say that they guess."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
import yaml
from paths import CONFIGS, ROOT
from results_tree import draw_tile

from crfm_core import ConfigError
from crfm_core.manifest import write_manifest
from crfm_core.planning.listing import list_outputs
from crfm_core.planning.plan import make_plan, read_jobs, read_rates
from crfm_core.planning.workload import Job, Workload
from crfm_core.settings import Settings, load_datasets, load_settings

RATES = read_rates(ROOT / "configs" / "rates.yaml")
COMMAND = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
HOUR = 3600

# -------------------------------------------------------------------------------------------------------- in the workflow


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """What the workflow says in ``folder``."""
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([*COMMAND, *arguments], cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr + done.stdout  # what is printed stands last


def counted(said: str, heading: str) -> dict[str, int]:
    """Names and numbers of the lines after a heading, without sums, and without `all`, which does nothing."""
    table = said[said.rindex(heading) :]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)\b", table, re.MULTILINE) if name not in ("total", "all")}


def agreed(folder: Path, *arguments: str) -> tuple[str, dict[str, int]]:
    """What the plan says and its jobs, which must be those of a dry run of the same configuration."""
    said = run(folder, "plan", *arguments)
    jobs = counted(said, "Still to be done")
    assert jobs == counted(run(folder, "--dry-run", *arguments), "Job stats:")
    return said, jobs


@pytest.fixture
def small(tmp_path) -> Path:
    """A working folder with the smallest configuration."""
    for file in CONFIGS.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_papers_scale_is_priced_in_seconds_with_the_jobs_of_a_dry_run(tmp_path):
    before = os.times()
    arguments = ("--configfile", str(ROOT / "configs" / "paper.yaml"), "--config", "disk_gb=0.1", "shards=5")
    said = run(tmp_path, "plan", *arguments, "--resources", "gpu=8")
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 15, "of the processor"
    assert counted(said, "Still to be done") == counted(run(tmp_path, "--dry-run", *arguments), "Job stats:")
    assert re.search(r"synthesise_shard +20 ", said) and "GPU-hours" in said and "with 8 GPUs and 2 cores" in said
    assert re.search(r"train_generator +2 .* guess", said) and re.search(r"fetch_dataset +2 +- +\? .*not known", said)
    assert "Tiles of loveda5k: train 5,000 (as selected), val 6,676 (published number of scenes)" in said
    assert not list(tmp_path.glob("results*")) and not list(tmp_path.glob("models"))


def test_a_plan_tells_what_is_left_and_makes_nothing(small):
    arguments = ("--configfile", "smallest.yaml")
    run(small, "results/small/captions/train.parquet", "results/small/tiles/test.parquet", *arguments)
    made = files(small / "results")
    said, left = agreed(small, *arguments)
    assert "list_scenes" not in left and left["tile_scenes"] == left["caption_tiles"] == 1
    assert "train 8 (cut), test 8 (cut), reference 8 (of scenes to draw)" in said
    assert re.search(r"^tile_scenes +1 .* measured$", said, re.MULTILINE)
    assert files(small / "results") == made

    (small / "results" / "small" / "tiles" / "train.parquet").unlink()
    _, left = agreed(small, *arguments)
    assert left["tile_scenes"] == left["caption_tiles"] == 2

    # a job that was stopped leaves this mark, and its files may be fragments
    mark = urlsafe_b64encode(b"results/small/scenes.parquet").decode()
    (small / ".snakemake" / "incomplete").mkdir(exist_ok=True)
    (small / ".snakemake" / "incomplete" / mark).touch()
    _, left = agreed(small, *arguments)
    assert left["list_scenes"] == 1 and left["tile_scenes"] == 3


def test_the_engines_report_shows_what_is_done_and_needs_no_network(small):
    target, offline = "results/small/data_sheet", dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    run(small, target, "--configfile", "smallest.yaml")
    run(small, target, "--configfile", "smallest.yaml", "--report", "run.html", **offline)
    page = (small / "run.html").read_text(encoding="utf-8")
    for said in ("Data sheet of <em>small</em>", "What a run of scale smallest made", "index.html"):
        assert said in page
    assert "<script src=" not in page and "<link href=" not in page


# ------------------------------------------------------------------------------------------------------------------- jobs

RULES = {
    "tile_scenes": {"outputs": [r"results/(?P<dataset>a|b)/tiles/(?P<split>\w+)\.parquet"], "benchmark": "{dataset}-{split}.tsv"},
    "make_report": {"outputs": ["results/report.html", "results/figures"], "benchmark": ""},
}


def listing(*rows: tuple[str, str, str]) -> str:
    return "\n".join("\t".join(row) for row in (("output_file", "rule", "plan"), *rows))


def test_a_job_with_several_files_counts_once_and_is_open_while_one_of_them_is():
    text = listing(
        ("results/report.html", "make_report", "no update"),
        ("results/figures", "make_report", "update pending"),
        ("results/a/tiles/train.parquet", "tile_scenes", "no update"),
    )
    assert read_jobs(text, RULES) == [
        Job("tile_scenes", {"dataset": "a", "split": "train"}, False, Path("a-train.tsv")),
        Job("make_report", {}, True, None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not listed in the form expected"),
        ("rule\tplan\nmake_report\tno update", "not listed in the form expected; it begins with 'rule"),
        (listing(("results/c/tiles/x.parquet", "tile_scenes", "no update")), "results/c/tiles/x.parquet as a file of rule tile_scenes"),
        (listing(("results/x", "unheard_of", "no update")), "results/x as a file of rule unheard_of, which makes no such file"),
    ],
)
def test_a_listing_that_does_not_fit_the_rules_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_jobs(text, RULES)


def test_what_the_listing_program_complains_of_is_passed_on(tmp_path):
    with pytest.raises(ConfigError, match="cannot be listed: no such key"):
        list_outputs([sys.executable, "-c", "import sys; sys.exit('no such key')"], tmp_path)


def test_files_whose_jobs_were_stopped_are_asked_for_again(tmp_path):
    """Whatever the length of their names, and nothing else that has a mark."""
    short, long = "results/a.parquet", f"results/{'x' * 250}.parquet"
    mark = urlsafe_b64encode(long.encode()).decode()
    (tmp_path / f"@{mark[:200]}").mkdir()
    for path in (f"@{mark[:200]}/{mark[200:]}", urlsafe_b64encode(b"results/elsewhere").decode(), "no mark"):
        (tmp_path / path).touch()
    program = f"import sys; print('{short}\\tx\\n{long}\\tx', sys.argv[1:])"
    assert list_outputs([sys.executable, "-c", program], tmp_path).endswith(f"x ['--forcerun', '{long}']\n")


# ------------------------------------------------------------------------------------------------------------------ times


def configuration(name: str, results: Path, changes: dict | None = None) -> tuple[Settings, dict]:
    """The configuration of a file, its results elsewhere, and its datasets."""
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    for path, value in (changes or {}).items():
        *keys, last = path.split(".")
        section = content
        for key in keys:
            section = section[key]
        section[last] = value
    settings = load_settings(content | {"results": str(results)})
    return settings, load_datasets(settings, ROOT)


def planned(jobs, results, name="config.yaml", changes=None, gpu_rules=(), cores=2, gpus=1, gpu=None):
    return make_plan(jobs, *configuration(name, results, changes), RATES, gpu_rules, cores, gpus, gpu)


def shard(results: Path, number: int, sampler: str = "crfm", pending: bool = True, seconds: float | None = None) -> Job:
    benchmark = results / "benchmarks" / f"{sampler}-{number}.tsv"
    if seconds is not None:
        benchmark.parent.mkdir(parents=True, exist_ok=True)
        benchmark.write_text(f"s\tmax_rss\n{seconds}\t1\n")
    names = {"dataset": "embedded", "control": "triattention", "sampler": sampler, "shard": str(number), "shards": "2"}
    return Job("synthesise_shard", names, pending, benchmark)


def test_jobs_take_as_long_as_finished_ones_of_their_kind(tmp_path):
    jobs = [shard(tmp_path, 1, pending=False, seconds=1800), *(shard(tmp_path, number) for number in (2, 3))]
    plan = planned(jobs, tmp_path)
    (stage,) = plan.stages
    assert [one.seconds for one in stage.estimates] == pytest.approx([1800, 1800])
    assert stage.basis == "measured" and plan.total(False) == pytest.approx(HOUR)
    assert re.search(r"^synthesise_shard +2 +1\.00 .* measured$", plan.text(), re.MULTILINE)
    assert "finished" in plan.text() and "between" not in plan.text()
    assert plan.wall == pytest.approx((1800, 1800))


def test_another_kind_of_the_same_stage_is_scaled_by_what_it_has_to_do(tmp_path):
    jobs = [shard(tmp_path, 1, "plain", pending=False, seconds=1000), shard(tmp_path, 2, "crfm"), shard(tmp_path, 3, "plain")]
    plan = planned(jobs, tmp_path)
    corrected, plain = plan.stages[0].estimates
    assert (corrected.basis, plain.basis) == ("scaled", "measured")
    assert plain.seconds == pytest.approx(1000) and 3 * plain.seconds < corrected.seconds < 20 * plain.seconds


def test_the_time_of_a_job_that_has_to_be_done_again_does_not_count(tmp_path):
    """It may have been noted under another configuration."""
    plan = planned([shard(tmp_path, 1, seconds=10**6)], tmp_path)
    assert plan.stages[0].basis == "scaled" and plan.total(False) < HOUR


@pytest.mark.parametrize("content", ["", "s\n", "s\n-\n", "no table"])
def test_a_time_that_cannot_be_read_is_none(tmp_path, content):
    job = shard(tmp_path, 1, pending=False, seconds=1)
    job.benchmark.write_text(content)
    assert planned([job, shard(tmp_path, 2)], tmp_path).stages[0].basis == "scaled"


TRAINING = Job("train_generator", {"dataset": "fusu4k", "control": "triattention"})


@pytest.mark.parametrize(
    ("gpu", "peak", "said"),
    [
        (None, 989, "40 % of the peak of a GPU H100 (this machine shows none that is known)"),
        ("NVIDIA GeForce RTX 4090", 165, "40 % of the peak of a GPU RTX 4090 (this machine's)"),
    ],
)
def test_what_was_never_measured_is_counted_work_at_a_stated_speed_and_called_a_guess(tmp_path, gpu, peak, said):
    plan = planned([TRAINING], tmp_path, "configs/paper.yaml", gpu_rules=["train_generator"], gpu=gpu)
    assert plan.stages[0].basis == "guess"
    assert plan.total(True) == pytest.approx(200_000 * 2 * 17.31 / (0.4 * peak), rel=1e-3)
    assert said in " ".join(plan.text().split()) and plan.total(False) == 0


def test_several_processes_hold_as_many_gpus_for_a_shorter_time(tmp_path):
    changes = {"controls.triattention.processes": 8, "controls.triattention.steps": 25_000}
    arguments = {"name": "configs/paper.yaml", "gpu_rules": ["train_generator"], "gpus": 8}
    alone, shared = planned([TRAINING], tmp_path, **arguments), planned([TRAINING], tmp_path, changes=changes, **arguments)
    assert shared.stages[0].estimates[0].gpus == 8
    assert shared.total(True) == pytest.approx(alone.total(True), rel=0.01)
    assert shared.wall[1] == pytest.approx(alone.wall[1] / 8, rel=0.01)


def test_networks_that_were_measured_on_a_processor_alone_have_no_time_on_a_gpu(tmp_path):
    plan = planned([shard(tmp_path, 1)], tmp_path, changes={"device": "cuda"}, gpu_rules=["synthesise_shard"])
    assert plan.stages[0].basis == "not known" and re.search(r"^synthesise_shard +1 +\? +- ", plan.text(), re.MULTILINE)
    assert "without 1 not known" in plan.text() and "By the clock: not known." in plan.text()


@pytest.mark.parametrize(
    ("path", "value", "factor"),
    [
        ("controls.triattention.steps", 2800, 2),
        ("controls.triattention.accumulate", 4, 4),
        ("base_model.transformer.layers", 6, 2),
        ("base_model.transformer.heads", 6, 4),
        ("base_model.transformer.patch_size", 2, 4),
    ],
)
def test_rates_are_scaled_by_the_configured_sizes(tmp_path, path, value, factor):
    job = Job("train_generator", {"dataset": "embedded", "control": "triattention"})
    start = RATES.measured.start["other"]
    once, more = (planned([job], tmp_path, changes=changes).total(False) - start for changes in (None, {path: value}))
    assert once == pytest.approx(1400 * 16 * RATES.measured.work["train"]) and more == pytest.approx(factor * once)


@pytest.mark.parametrize(
    ("preset", "rectify", "corrections"),
    [
        (None, {}, {}),
        ("default", {"steps": 4}, {"gradient": 4, "look": 4}),
        ("default", {"steps": 4, "measure": False}, {"gradient": 4}),
        ("paper", {"steps": 2, "inner_steps": 3}, {"gradient": 6, "look": 2}),
        ("adaptive", {"steps": 23, "measure": False}, {"gradient": 23, "look": 23}),
    ],
)
def test_sampling_counts_steps_corrections_and_a_decoding_for_each_image(tmp_path, preset, rectify, corrections):
    changes = {"samplers.crfm.preset": preset, "samplers.crfm.rectify": rectify}
    settings, datasets = configuration("config.yaml", tmp_path, changes)
    work = workload(settings, datasets, tmp_path).of(shard(tmp_path, 1)).work
    images = 3 * 48 / 2
    once = {"encode": 1, "decode": 1, "step triattention": 23} | corrections
    assert work == pytest.approx({kind: images * amount for kind, amount in once.items()})


def test_what_a_job_needs_is_no_more_by_the_clock_than_stage_after_stage(tmp_path):
    jobs = [shard(tmp_path, 1, pending=False, seconds=60), *(shard(tmp_path, number) for number in range(2, 5))]
    jobs += [Job("train_generator", {"dataset": "embedded", "control": "triattention"})]
    plan = planned(jobs, tmp_path, cores=2)
    training = plan.stages[1].estimates[0].seconds
    # three shards in two lots, beside the training or before it
    assert plan.wall == pytest.approx((max(training, (180 + training) / 2), 120 + training))
    assert "By the clock, with 2 cores: between" in plan.text()


def test_nothing_left_is_said_in_one_line(tmp_path):
    assert planned([shard(tmp_path, 1, pending=False)], tmp_path).text() == f"Nothing is left to be done: {tmp_path} holds all of it.\n"


# ------------------------------------------------------------------------------------------------------------------ tiles


def workload(settings: Settings, datasets: dict, results: Path, uncut=frozenset()) -> Workload:
    return Workload(settings, datasets, RATES.counted.weights, RATES.measured.bytes, results, uncut)


@pytest.mark.parametrize(
    ("datasets", "name", "split", "tiles", "how"),
    [
        (["embedded"], "embedded", "test", 12 * 16, "of scenes to draw"),
        (["embedded-25"], "embedded-25", "train", 12, "a share of 48"),
        (["loveda"], "loveda", "train", 2522 * 4, "published number of scenes"),
        (["loveda5k"], "loveda5k", "train", 5000, "as selected"),
        (["fusu"], "fusu", "test", 12550, "about, share of the published number"),
        (["geotiff"], "my_scenes", "train", None, "unknown until they are cut"),
    ],
)
def test_tiles_are_counted_from_the_configuration_or_said_to_be_unknown(tmp_path, datasets, name, split, tiles, how):
    changes = {"datasets": datasets, "recipes.reference": {}, "generation.split": None, "experiments.few_shot.datasets": None}
    settings, found = configuration("config.yaml", tmp_path, changes)
    count = workload(settings, found, tmp_path).count(name, split)
    assert (count.tiles, count.how) == (tiles, how)


def test_cut_tiles_are_counted_unless_they_will_be_cut_again(tmp_path):
    import numpy as np

    row = draw_tile(tmp_path / "embedded" / "tiles", "t", np.random.default_rng(0), 2, "train", "embedded")
    write_manifest(tmp_path / "embedded" / "tiles" / "train.parquet", [row | {"tile_id": f"t{number}"} for number in range(5)])
    settings, found = configuration("config.yaml", tmp_path)
    assert workload(settings, found, tmp_path).count("embedded", "train").tiles == 5
    assert workload(settings, found, tmp_path, frozenset({("embedded", "train")})).count("embedded", "train").tiles == 48


def test_jobs_on_an_unknown_number_of_tiles_are_not_known_and_the_others_are(tmp_path):
    changes = {"datasets": ["geotiff"], "recipes.reference": {}, "generation.split": None, "experiments.few_shot.datasets": None}
    names = {"dataset": "my_scenes", "recipe": "real", "segmentor": "segformer_tiny", "seed": "0"}
    plan = planned([Job("evaluate_segmentor", names), Job("train_segmentor", names)], tmp_path, changes=changes)
    assert [stage.basis for stage in plan.stages] == ["not known", "scaled"]


# ------------------------------------------------------------------------------------------------------------------- disk


def test_latents_take_the_room_that_is_planned(tmp_path):
    """Of the paper's size: mean and logarithm of the variance, and the mask's, flipped too, in half precision."""
    settings, found = configuration("configs/paper.yaml", tmp_path)
    load = workload(settings, found, tmp_path).of(Job("encode_latents", {"dataset": "fusu4k", "mask_code": "grey"}))
    assert load.disk == 4000 * 2 * 3 * 16 * 64 * 64 * 2 and load.work == {"encode": 16000}


def test_a_full_disk_is_foreseen(tmp_path):
    jobs = [Job("synthesise_shard", shard(tmp_path, 1).names | {"dataset": "fusu4k", "sampler": "plain"})]
    enough = planned(jobs, tmp_path, "configs/paper.yaml", {"shards": 10**4})
    assert "less than may be needed" not in enough.text()
    short = planned(jobs, tmp_path, "configs/paper.yaml", {"shards": 1, "recipes.triattention.synthetic_per_real": 10**7})
    assert "That is less than may be needed: free some space, or set `results` to another disk." in short.text()


# ------------------------------------------------------------------------------------------------------------------ rates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": {"cpu": 0, "share": 0.4, "gpus": {"H100": 989}}}, "speed.cpu: Input should be greater than 0"),
        ({"speeds": 1}, "speeds: Extra inputs are not permitted"),
        ({"measured": {}}, "measured.where: Field required"),
    ],
)
def test_rates_that_are_not_whole_are_refused_by_key(tmp_path, change, message):
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(RATES.model_dump() | change))
    with pytest.raises(ConfigError, match=rf"rates.yaml: .*{re.escape(message)}.*; take the file that came with the workflow"):
        read_rates(file)


@pytest.mark.parametrize(("name", "gpu"), [("config.yaml", False), ("configs/paper.yaml", True)])
def test_every_kind_of_work_has_a_rate(tmp_path, name, gpu):
    """So that what is not known is downloads, or a user's own networks."""
    settings, found = configuration(name, tmp_path, {"tables": "all"})
    dataset = next(iter(found.values()))
    same = {"dataset": dataset.name, "split": dataset.train, "control": "triattention", "sampler": "crfm", "recipe": "real"}
    rules = ["encode_latents", "encode_prompts", "sample_validation", "measure_agreement", "measure_reconstruction", "measure_generation"]
    jobs = [Job(rule, same) for rule in (*rules, "measure_class_losses", "mix_tiles", "make_report")]
    jobs += [Job("train_generator", same | {"control": control}) for control in settings.controls]
    jobs += [Job(rule, same | {"segmentor": one}) for rule in ("train_segmentor", "evaluate_segmentor") for one in settings.segmentors]
    jobs += [Job("synthesise_shard", same | {"sampler": sampler}) for sampler in settings.samplers]
    jobs += [
        Job(f"filter_{'pixels' if one.kind == 'pixel' else 'images'}", same | {"filter": key}) for key, one in settings.filters.items()
    ]
    jobs += [Job("compare_corrections", same | {"preset": preset}) for preset in ("plain", *settings.comparison.presets)]
    gpu_rules = {job.rule for job in jobs} if gpu else ()
    cut = [Job("tile_scenes", same), Job("caption_tiles", same)]
    plan = planned(jobs + cut, tmp_path, name, {"tables": "all"}, gpu_rules)
    assert {stage.rule: stage.basis for stage in plan.stages if "not known" in stage.basis} == {}
    assert plan.total(gpu) > 600


def test_the_counted_work_is_that_of_the_networks():
    import torch

    from crfm_core.generator.memory import SD35_MEDIUM, CudaCount, meta_network, training_memory
    from crfm_core.settings import Control

    counted, weights = RATES.counted.work, RATES.counted.weights
    for scheme, checkpointing in (("triattention", True), ("adapter", False)):
        control = Control(scheme=scheme, steps=1, batch_size=1, learning_rate=1e-5, precision="bf16", gradient_checkpointing=checkpointing)
        network = meta_network(SD35_MEDIUM, control)
        kind = "train_checkpointing" if checkpointing else "train"
        assert counted[kind][scheme] == pytest.approx(training_memory(network, control, (16, 64, 64)).flops / 1e12, rel=0.005)
        size = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        assert weights["generator"][scheme] == pytest.approx(size / 1e9, rel=0.005)
        if checkpointing:
            continue
        with torch.device("meta"), CudaCount([network.requires_grad_(False)], True) as count:
            network(
                torch.empty(1, 16, 64, 64),
                torch.empty(1, 333, 4096),
                torch.empty(1, 2048),
                torch.empty(1),
                mask_latents=torch.empty(1, 16, 64, 64),
                return_dict=False,
            )
        assert counted["step"][scheme] == pytest.approx(count.forward / 1e12, rel=0.005)


@pytest.mark.parametrize("architecture", ["pspnet_r50", "segformer_b2", "upernet_convnext_t", "deeplabv3plus_r50"])
def test_the_counted_work_of_the_segmentors_is_theirs(architecture):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from crfm_core.segmentor.mmseg.networks import build_model

    network = build_model(architecture, 17).to("meta").train()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.decode_head.forward(network.extract_feat(torch.empty(2, 3, 512, 512)))
    assert RATES.counted.work["judge"][architecture] == pytest.approx(counter.get_total_flops() / 2e12, rel=0.01)
    size = sum(parameter.numel() for parameter in network.parameters())
    assert RATES.counted.weights["segmentor"][architecture] == pytest.approx(size / 1e9, rel=0.01)
