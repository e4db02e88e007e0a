"""Preflight lists all problems of a run before its first job, each with its remedy, and checks only what the jobs need."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from paths import CONFIGS, ROOT
from PIL import Image
from planned_jobs import RATES, without_scheme
from safetensors.numpy import save_file

from crfm_core.planning import preflight
from crfm_core.planning.jobs import Job
from crfm_core.planning.preflight import CheckResults, PendingRun, check_run
from crfm_core.planning.preflight.memory import training_size
from crfm_core.settings import Control, load_datasets, load_settings

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
#: What the wildcards of the jobs stand for.
NAMES = {
    "dataset": "small", "split": "train", "control": "triattention", "sampler": "crfm", "recipe": "real", "segmentor": "segformer_tiny",
    "seed": "0", "filter": "pixel", "shard": "1", "shards": "2", "weights": "segformer_tiny", "model": "base_model",
}  # fmt: skip
ON_GPUS = frozenset({"encode_latents", "train_generator", "train_segmentor", "synthesise_shard"})


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A working folder with the smallest configuration, on a machine without GPUs, tokens and mirrors."""
    for file in CONFIGS.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HF_ENDPOINT", "CXX", "CC", "CRFM_LEASES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", os.devnull)  # no login of whoever runs the tests
    return tmp_path


def rewrite(file: Path, changes: dict) -> None:
    """Set keys of a YAML file; dots lead into its sections."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *keys, last = path.split(".")
        section = content
        for key in keys:
            section = section[key]
        section[last] = value
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def look(folder: Path, *rules: str, changes: dict | None = None, dataset: dict | None = None, rates=RATES, **options) -> CheckResults:
    """What is found for one job of each rule."""
    rewrite(folder / "smallest.yaml", changes or {})
    rewrite(folder / "small_world.yaml", ({"held_out": None} if "source" in (dataset or {}) else {}) | (dataset or {}))
    settings = load_settings(yaml.safe_load((folder / "smallest.yaml").read_text(encoding="utf-8")))
    jobs = [Job(rule, NAMES) for rule in rules]
    return check_run(PendingRun(settings, load_datasets(settings, ROOT), jobs, rates, **options))


def nvidia_smi(folder: Path, mib: int, count: int = 1) -> None:
    """A machine with GPUs of so much memory, as its nvidia-smi says it."""
    cards = [f"GPU-{number}" for number in range(count)]
    listed = "\n".join(f"GPU {number}: One (UUID: {uuid})" for number, uuid in enumerate(cards))
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    said = "\n".join(f"{uuid}, {mib}" for uuid in cards)
    program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then echo "{listed}"; else echo "{said}"; fi\n')
    program.chmod(0o755)


def base_model(folder: Path, blocks: int = 1) -> None:
    """A folder with the parts of a base model that are looked at when it is whole; its transformer has a million weights a block."""
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    for name in ("transformer", "vae", *parts):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", "patch_size": 2}))
        save_file({f"{block}": np.zeros((1000, 1000), np.int8) for block in range(blocks)}, folder / name / "model.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1, 2, 3, 4]}))
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "SD3Transformer2DModel"]}))


HUB = {"kind": "hub"}
FOLDER = {"kind": "folder", "path": "model"}
WORLD = {name: {"images": f"{name}/*.png", "labels": f"{name}/*.tif"} for name in ("train", "test", "reference")}
RELEASED = {"kind": "released", "root": "scenes", "splits": {name: f"{name}.jsonl" for name in ("train", "test", "reference")}}
MODEL = {"kind": "vlm", "model": {"path": "sees"}}
SHORT = {"iterations": 1, "batch_size": 2, "learning_rate": 1}
ROW = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}


def nothing(folder: Path) -> None:
    """A machine as it is."""


def a_file_at(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).touch()


def scenes(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / "scenes" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "scenes" / split / "a.png")
        (folder / "scenes" / split / "a.tif").touch()


# fmt: off
FAULTS = [
    # weights
    (nothing, "filter_tiles", {"critic": {"path": "no.pth"}},
     "critic.path: no such file or folder: no.pth (from {here}); give a checkpoint"),
    (nothing, "measure_agreement", {"judge": {"path": "no"}}, "judge.path: no such file or folder: no (from {here}); give a checkpoint"),
    (nothing, "train_segmentor", {"segmentors.segformer_tiny.pretrained": "no.pth"},
     "segmentors.segformer_tiny.pretrained: no such file: no.pth (from {here}); give backbone weights"),
    (nothing, "train_segmentor", {"segmentors.segformer_tiny": {"config": "no.py"} | SHORT},
     "segmentors.segformer_tiny.config: no such file: no.py (from {here}); give a configuration file of mmsegmentation"),
    (nothing, "train_generator", {"controls.triattention.start_from": "no"},
     "controls.triattention.start_from: no such file or folder: no (from {here}); give a generator folder"),
    (nothing, "synthesise_shard", {"samplers.crfm.critic_decoder": "no"}, "samplers.crfm.critic_decoder: no has no config.json"),
    (nothing, "encode_latents", {"base_model": FOLDER}, "base_model.path: model lacks model_index.json, transformer, scheduler"),
    (nothing, "caption_tiles", {"captions": MODEL}, "captions.model.path: sees is no model folder, it has no config.json; give one"),
    (nothing, "measure_generation", {"generation": {"cmmd": True}, "clip": {"path": "sees"}}, "clip.path: sees is no model folder"),
    # tokens
    (nothing, "fetch_model", {"base_model": HUB},
     "accept its licence at https://huggingface.co/stabilityai/stable-diffusion-3.5-medium and `export HF_TOKEN=...`"),
    # datasets
    (nothing, "list_scenes", {"source": {"kind": "folder", "root": "scenes", "splits": WORLD}},
     "{here}/scenes: no such folder; set source.root of dataset small to where its scenes lie"),
    (scenes, "list_scenes", {"source": {"kind": "folder", "root": "scenes", "splits": WORLD}},
     "dataset small: no file matches reference/*.png below {here}/scenes; correct the glob or the root"),
    (scenes, "list_scenes", {"source": RELEASED | {"unlabelled": "more/*"}}, "dataset small: no file matches more/* below {here}/scenes"),
    (scenes, "list_scenes", {"source": RELEASED}, "{here}/scenes/train.jsonl: no such file; correct source.root or source.splits.train"),
    (nothing, "tile_scenes", {"select": {"train": {"ids": "no.txt"}}},
     "select.train.ids: no such file: no.txt (from {here}); give a file"),
    # the machine
    (nothing, "make_table", {"disk_gb": 1e9}, "results: 1000000000.0 GB needed"),
    (nothing, "synthesise_shard", {"recipes.crfm.synthetic_per_real": 10**8}, "GB needed (results in results"),
    (a_file_at("file"), "make_table", {"results": "file/results"},
     "file/results: cannot be written to (Not a directory); set `results` to"),
    (a_file_at("models"), "fetch_model", {"base_model": HUB},
     "cannot be written to (Not a directory); set base_model.path to a folder that you may write to"),
    (nothing, "train_generator", {"device": "cuda", "controls.triattention.processes": 2},
     "device: cuda needs 2 GPU for one job, this machine shows 0; set `device: cpu`"),
    # clashes
    (nothing, "train_generator", {"tile": {"size": 34}}, "dataset small: tile.size: 34 is not divisible by 4, the side of a token"),
    (nothing, "caption_tiles", {"captions": {"kind": "given"}},
     "captions.kind: given, and dataset small (source embedded) has no prompts"),
    (nothing, "train_generator", {"controls.triattention.compile": True},
     "controls.triattention.compile: torch.compile needs a compiler, and there is no g++ on the PATH; install one, set CXX"),
]
# fmt: on


@pytest.mark.parametrize(("spoil", "rules", "changes", "message"), FAULTS)
def test_a_problem_is_listed_with_its_remedy_and_only_where_it_is_there(small, spoil, rules, changes, message):
    assert look(small, *rules.split()).problems == []
    spoil(small)
    of_world = {key: value for key, value in changes.items() if key in ("source", "select", "tile", "split")}
    of_run = {key: value for key, value in changes.items() if key not in of_world}
    found = look(small, *rules.split(), changes=of_run, dataset=of_world, gpu_rules=ON_GPUS)
    text = found.text()
    assert message.format(here=small) in text, text
    assert text.startswith(f"{len(found.problems)} problems; no job was" if len(found.problems) > 1 else "1 problem; no job was started:")
    # other jobs do not need it
    if not {"disk_gb", "results"} & set(changes):
        assert look(small, "mix_tiles", "gather_shards", gpu_rules=ON_GPUS).problems == []
    assert not (small / "results").exists() and not list(small.glob("models/*"))


@pytest.mark.parametrize(
    ("rules", "changes", "note"),
    [
        (
            "train_generator",
            {"controls.triattention.parallel": "fsdp"},
            "unused settings: controls.triattention.parallel: fsdp (there is one process)",
        ),
        (
            "train_segmentor",
            {"segmentors.segformer_tiny.validate_every": 3},
            "unused settings: segmentors.segformer_tiny.validate_every (no dataset names a split val)",
        ),
        (
            "synthesise_shard",
            {"samplers.crfm.compile": "reduce-overhead"},
            "unused settings: samplers.crfm.compile: reduce-overhead (CUDA graphs need a GPU)",
        ),
        (
            "measure_generation",
            {"generation": {"features": "inception", "weights": "no.pth"}},
            "generation.weights: no such file: no.pth; FID is left out",
        ),
    ],
)
def test_an_unused_setting_or_a_lack_that_stops_nothing_is_a_note(small, monkeypatch, rules, changes, note):
    monkeypatch.setenv("CXX", sys.executable)
    found = look(small, rules, changes=changes)
    assert found.problems == [] and note in "\n".join(found.notes())


def test_a_token_opens_the_way_and_is_never_shown(small, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_VerySecretToken")
    found = look(small, "fetch_model", changes={"base_model": HUB})
    assert "HF_TOKEN" not in found.text() and "Secret" not in str(found)
    assert found.downloads[0].size == pytest.approx(16.3e9, rel=0.01), "two bytes a weight"


def test_a_published_dataset_is_there_or_fetched_or_missed(small):
    fusu = {"split": {"by": "group", "shares": {"train": 2, "test": 1, "reference": 1}}}
    found = look(small, "fetch_dataset", dataset=fusu | {"source": {"kind": "fusu", "download": False}})
    assert f"source.root: {small}/data/FUSU lacks images (.png) in im1/" in found.text() and "set source.download to true" in found.text()
    found = look(small, "fetch_dataset", dataset={"source": {"kind": "fusu"}})
    assert "Fetching dataset small to data/FUSU, about 66 GB" in found.facts
    for name in ("im1", "im1_label"):
        (small / "data" / "FUSU" / name).mkdir(parents=True)
        (small / "data" / "FUSU" / name / "1.png").touch()
    found = look(small, "fetch_dataset")
    assert found.problems == found.downloads == []


# ---------------------------------------------------------------------------------------------------------------------- GPUs


CUDA = {"device": "cuda", "base_model": FOLDER}
SAID = "controls.triattention: training needs about"


def big(folder: Path) -> None:
    """A base model of SD3.5-medium's number of weights by its headers; the file holds nothing else."""
    base_model(folder / "model")
    header = json.dumps({"all": {"dtype": "F16", "shape": [2469, 1000, 1000], "data_offsets": [0, 2 * 2469 * 10**6]}}).encode()
    with (folder / "model" / "transformer" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * 2469 * 10**6)


@pytest.mark.parametrize(
    ("mib", "weights", "control", "fits"),
    [
        (81559, big, {}, True),
        (24564, big, {}, False),
        (24564, big, {"precision": "bf16", "gradient_checkpointing": True, "optimiser": "adamw_8bit", "lora": {}}, True),
        (24564, lambda folder: base_model(folder / "model"), {}, True),
    ],
)
def test_a_training_that_does_not_fit_the_gpu_is_refused_with_what_lowers_its_need(small, mib, weights, control, fits):
    weights(small)
    nvidia_smi(small, mib)
    changes = CUDA | {"controls.triattention": ROW | {"mask_init": "copy"} | control}
    found = look(small, "train_generator", changes=changes, dataset={"tile": {"size": 512}}, gpu_rules=ON_GPUS)
    said = [problem for problem in found.problems if problem.startswith(SAID)]
    assert (said == []) == fits, found.problems
    assert fits or ("has 24.0; set controls.triattention." in said[0] and "gradient_checkpointing: true (activations)" in said[0])


def test_a_control_scheme_without_rates_is_not_known_and_stops_no_run(small):
    big(small)
    nvidia_smi(small, 24564)
    rates = without_scheme("triattention")
    changes = CUDA | {"controls.triattention": ROW | {"mask_init": "copy"}}
    options = {"gpu_rules": ON_GPUS, "rates": rates}
    found = look(small, "train_generator", changes=changes, dataset={"tile": {"size": 512}}, **options)
    assert found.problems == []
    assert "GPU memory of training triattention: not known, configs/rates.yaml has no numbers of scheme triattention" in found.facts


def test_a_cluster_is_not_judged_by_the_gpus_of_its_login_node(small):
    changes = {"device": "cuda", "controls.triattention.processes": 4}
    assert any("shows 0" in one for one in look(small, "train_generator", changes=changes, gpu_rules=ON_GPUS).problems)
    found = look(small, "train_generator", gpu_rules=ON_GPUS, local=False)
    assert found.problems == [] and "GPUs: 4 for the largest job, on the cluster's nodes" in found.facts


def test_a_job_that_needs_more_gpus_than_it_may_be_given_is_refused(small):
    nvidia_smi(small, 81559, count=4)
    changes = {"device": "cuda", "controls.triattention.processes": 4}
    found = look(small, "train_generator", changes=changes, gpu_rules=ON_GPUS, gpu_limit=1)
    assert len(found.problems) == 1 and "takes 4 GPUs, and a job may have 1; run with `--resources gpu=4`" in found.problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 4, "gradient_checkpointing": True, "ema": 0.999},
        {"optimiser": "adamw_8bit", "lora": {"rank": 32}, "mask_init": "copy"},
        {"scheme": "siamese", "precision": "no"},
        {"scheme": "adapter", "trainable": ["image", "text", "mask"]},
        {"scheme": "controlnet", "batch_size": 2},
        {"parallel": "fsdp", "processes": 8, "batch_size": 2},
    ],
    ids=str,
)
def test_the_quick_size_of_a_training_is_that_of_the_slow_count(changes):
    from crfm_core.generator.memory import SD35_MEDIUM, meta_network, training_memory

    control = Control(**ROW | {"precision": "bf16"} | changes)
    slow = training_memory(meta_network(SD35_MEDIUM, control), control, (16, 64, 64))
    quick = training_size(control, 512, RATES)
    assert quick.constant == pytest.approx(slow.total - slow.activations, rel=0.02)
    assert 0.7 * slow.activations < quick.activations < 1.1 * slow.activations, "more would refuse what fits"


# ---------------------------------------------------------------------------------------------------------- disk and software


def test_what_a_stopped_job_has_made_is_not_needed_again(small):
    few = look(small, "synthesise_shard").facts[-1]
    images = small / "results" / "small" / "synthetic" / "triattention" / "crfm" / "images"
    images.mkdir(parents=True)
    changes = {"recipes.crfm.synthetic_per_real": 10**8}
    with (images / "a.tif").open("wb") as file:
        file.truncate(10**12)
    assert "an estimated 0.0 GB needed" in few
    before = [one for one in look(small, "synthesise_shard", changes=changes).problems if "an estimated" in one]
    shutil.rmtree(images)
    after = [one for one in look(small, "synthesise_shard").problems if "an estimated" in one]

    def needed(problem: str) -> int:
        return int(problem.split("an estimated ")[1].split(" GB")[0].replace(",", ""))

    assert needed(after[0]) - needed(before[0]) == pytest.approx(1000, abs=2)


def software(folder: Path, *pins: str) -> dict[str, Path]:
    file = folder / "env.yaml"
    file.write_text(yaml.safe_dump({"dependencies": ["python", {"pip": list(pins)}]}))
    return {"train_generator": file}


def test_a_missing_package_is_a_problem_another_version_a_note_and_another_build_neither(small):
    torch = version("torch").split("+")[0]
    found = look(small, "train_generator", software=software(small, "no-such-package==1.0", "numpy==0.1", f"torch=={torch}"))
    (problem,) = found.problems
    assert problem == "packages: no-such-package==1.0 not installed; run `pip install no-such-package==1.0`"
    (note,) = found.notes()
    assert f"numpy {version('numpy')} instead of 0.1" in note and "torch" not in note
    assert look(small, "mix_tiles", software=software(small, "no-such-package==1.0")).problems == [], "no job of that rule is left"


@pytest.mark.skipif(not version("torch").endswith("+cpu"), reason="torch here is built with CUDA")
def test_a_torch_without_cuda_is_noticed(small):
    nvidia_smi(small, 81559)
    found = look(small, "train_generator", changes={"device": "cuda"}, gpu_rules=ON_GPUS, software=software(small, "torch==2.13.0"))
    assert "device: cuda needs torch with CUDA" in found.text()


# -------------------------------------------------------------------------------------------------------------- in the workflow


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", *arguments]
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("HF_TOKEN", "CUDA_VISIBLE_DEVICES")}
    environment["HF_TOKEN_PATH"] = os.devnull
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )  # fmt: skip
    return done.returncode, done.stdout


SMALLEST = ("--configfile", "smallest.yaml")


def test_a_run_and_the_target_preflight_list_all_problems_at_once_and_make_nothing(small):
    changes = {
        "disk_gb": 1e9, "critic": {"path": "critic.pth"}, "judge": {"path": "judge.pth"}, "base_model": FOLDER,
        "segmentors.unet_tiny.pretrained": "backbone.pth", "controls.triattention.start_from": "released.pt", "tables": ["main"],
        "samplers.crfm.critic_decoder": "decoder", "segmentors.segformer_tiny.config": "mine.py",
        "segmentors.segformer_tiny.architecture": None,
    }  # fmt: skip
    rewrite(small / "smallest.yaml", changes)
    rewrite(small / "small_world.yaml", {"select": {"train": {"ids": "list.txt"}}})
    faults = [
        "critic.path: no such file or folder: critic.pth",
        "judge.path: no such file or folder: judge.pth",
        "base_model.path: model lacks model_index.json",
    ]
    faults += ["segformer_tiny.config: no such file: mine.py", "start_from: no such file or folder: released.pt", "GB needed"]
    faults += ["critic_decoder: decoder has no config.json", "select.train.ids: no such file: list.txt"]
    for target in ((), ("preflight",)):
        status, said = run(small, *target, *SMALLEST)
        assert status and f"{len(faults)} problems; no job was started" in said, said[-3000:]
        assert [fault for fault in faults if fault not in said] == []
        assert "pretrained: no such" not in said, "no judge is trained"
        assert not (small / "results").exists() and "Traceback" not in said
    status, said = run(small, "results/small/scenes.parquet", *SMALLEST, "--config", "disk_gb=0.1")
    assert not status, said


def test_preflight_that_passes_says_what_was_checked_and_makes_nothing(small):
    status, said = run(small, "preflight", *SMALLEST)
    assert not status and "Preflight passed:" in said and "GB free" in said and "GPUs: none needed" in said
    assert "packages" in said and not (small / "results").exists()


def test_the_papers_scale_is_checked_in_seconds(small):
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    status, said = run(small, "preflight", "--configfile", str(ROOT / "configs" / "paper.yaml"), "--config", "tables=all", "disk_gb=1e6")
    # the processor's seconds, which other work on the machine leaves as they are; some of them run side by side
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin < 8, "about 5, most of them the engine's own start, twice"
    assert status and "is gated and there is no token" in said and "1000000.0 GB needed" in said and "an estimated" in said
    assert not (small / "results").exists() and not (small / "models").exists()


@pytest.mark.skipif(find_spec("snakemake_executor_plugin_slurm") is None, reason="the engine's plugin for SLURM is not installed")
def test_jobs_of_a_cluster_are_checked_as_such(small):
    """Whether they are is known only after the rules are read."""
    rewrite(small / "smallest.yaml", {"device": "cuda", "disk_gb": 1e9})
    status, said = run(small, "--executor", "slurm", "--jobs", "1", *SMALLEST)
    assert status and "GB needed" in said and "this machine shows" not in said, said[-3000:]
    assert "this machine shows 0" in run(small, *SMALLEST)[1]


def test_a_check_that_fails_by_itself_is_a_note_and_stops_neither_the_run_nor_the_other_checks(small, monkeypatch):
    def check_nothing(run, found):
        raise KeyError("new_scheme")

    monkeypatch.setattr(preflight, "CHECKS", (check_nothing, *preflight.CHECKS))
    found = look(small, "make_table", changes={"disk_gb": 1e9})
    assert "check_nothing failed (KeyError('new_scheme'))" in "\n".join(found.notes())
    assert "1000000000.0 GB" in found.text() and len(found.problems) == 1
