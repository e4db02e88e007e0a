"""One job of every rule that makes files, as the fault table needs to know it: what it makes, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crfm_core.manifest import read_manifest

#: Rules that write nothing, so that there is nothing to lose.
WITHOUT_FILES = {"all", "plan", "preflight"}

DATASET = "results/small"
CRITIC, JUDGE = (f"{DATASET}/segmentors/{name}/checkpoint.pth" for name in ("real/segformer_tiny/seed0", "reference/unet_tiny/seed1"))
SAMPLES = f"{DATASET}/synthetic/triattention/crfm"
GENERATOR = f"{DATASET}/generators/triattention"
LABELLED = f"{DATASET}/segmentors/real/segformer_tiny/seed0"

#: Ways to break a row: its path leads out of the dataset's folder or to nothing, there is no path, or the classes cannot be.
ANY = ("outside", "nothing", "no path", "classes")
#: Those of a manifest of which a rule opens no file.
COUNTED = ("no path", "classes")
#: Those of the list of scenes, which has no classes and may lead to the user's own folders.
SCENE = ("nothing", "no path")


@dataclass(frozen=True)
class Case:
    """A job of a rule.

    Attributes:
        rule: with what its benchmark has after it where one rule has several cases.
        targets: the files that are asked for, which the job makes.
        inputs: what other rules make for it; one of them is removed.
        own: a file of the user's that it reads; it is removed where there are no such inputs.
        manifest, column, ways: the manifest of which a row is broken, in which column, and in which ways.
        rows: how many of its rows the job reads, from the first; None for all.
        beside: what the job leaves beside its targets, to be removed with them.
        config: the configuration file.
        hub: which of the loopback's servers HF_ENDPOINT names.
        disk: the folder that is put on a disk of its own to fill.
    """

    rule: str
    targets: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    own: str = ""
    manifest: str = ""
    ways: tuple[str, ...] = ANY
    column: str = "image"
    rows: int | None = None
    beside: Callable[[Path], list[Path]] = lambda _: []
    config: str = "faults.yaml"
    hub: str = ""
    disk: str = "results"


def below(*paths: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [folder / path for path in paths]


def images_of(manifest: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [(folder / manifest).parent / image for image in read_manifest(folder / manifest).image]


def tiles(split: str) -> str:
    return f"{DATASET}/tiles/{split}.parquet"


def captions(split: str) -> str:
    return f"{DATASET}/captions/{split}.parquet"


CASES = [
    Case("list_scenes", (f"{DATASET}/scenes.parquet",), beside=below(f"{DATASET}/scenes")),
    Case(
        "tile_scenes",
        (tiles("train"),),
        (f"{DATASET}/scenes.parquet",),
        manifest=f"{DATASET}/scenes.parquet",
        ways=SCENE,
        beside=below(f"{DATASET}/tiles/train"),
    ),
    Case(
        "check_splits",
        (f"{DATASET}/tiles/disjoint.json",),
        (tiles("train"), tiles("test"), tiles("reference"), tiles("held_out")),
        manifest=tiles("test"),
        ways=COUNTED,
    ),
    Case("mosaic_tiles", (f"{DATASET}/mosaics/train/train-000-image.tif",), (tiles("train"),), manifest=tiles("train")),
    Case("caption_tiles", (captions("train"),), (tiles("train"),), manifest=tiles("train")),
    Case(
        "encode_prompts",
        (f"{DATASET}/prompts/train.json", f"{DATASET}/prompts/held_out.json"),
        (captions("train"), f"{DATASET}/base_model"),
        manifest=captions("train"),
        ways=COUNTED,
        beside=below(f"{DATASET}/prompts/encoded"),
    ),
    Case("build_base_model", (f"{DATASET}/base_model",), (captions("train"),), manifest=captions("train")),
    Case(
        "encode_latents",
        (f"{DATASET}/latents/grey.safetensors",),
        (tiles("train"), f"{DATASET}/base_model"),
        manifest=tiles("train"),
    ),
    Case(
        "train_generator",
        (GENERATOR,),
        (f"{DATASET}/latents/grey.safetensors", f"{DATASET}/prompts/train.json", captions("train"), f"{DATASET}/base_model"),
        manifest=captions("train"),
        ways=COUNTED,
    ),
    Case(
        "sample_validation",
        (f"{DATASET}/validation/triattention/final.png", f"{DATASET}/validation/triattention/final.json"),
        (GENERATOR, captions("held_out"), f"{DATASET}/prompts/held_out.json"),
        manifest=captions("held_out"),
    ),
    Case("export_sd3", (f"{DATASET}/exports/triattention",), (GENERATOR,)),
    Case(
        "train_segmentor",
        (f"{LABELLED}/checkpoint.pth",),
        (f"{DATASET}/mixes/real.parquet",),
        manifest=f"{DATASET}/mixes/real.parquet",
        beside=below(f"{LABELLED}/last.pth"),
    ),
    Case("evaluate_segmentor", (f"{LABELLED}/scores.json",), (CRITIC, tiles("test")), manifest=tiles("test")),
    Case(
        "predict_tiles",
        (f"{DATASET}/predictions/real/segformer_tiny/seed0/test.parquet",),
        (CRITIC, tiles("test")),
        manifest=tiles("test"),
        beside=below(f"{DATASET}/predictions/real/segformer_tiny/seed0/test"),
    ),
    Case(
        "predict_scene",
        (f"{DATASET}/predicted_scenes/real/segformer_tiny/seed0/test-000.tif",),
        (CRITIC, f"{DATASET}/scenes.parquet"),
        manifest=f"{DATASET}/scenes.parquet",
        ways=SCENE,
    ),
    Case(
        "draw_layouts",
        (f"{DATASET}/layouts/rich.parquet",),
        (tiles("train"),),
        manifest=tiles("train"),
        column="label",
        beside=below(f"{DATASET}/layouts/rich"),
    ),
    Case(
        "synthesise_shard",
        (f"{SAMPLES}/shard-1-of-2.parquet",),
        (GENERATOR, captions("train"), f"{DATASET}/prompts/train.json", CRITIC),
        manifest=captions("train"),
        column="label",
        beside=images_of(f"{SAMPLES}/shard-1-of-2.parquet"),
    ),
    Case(
        "gather_shards",
        (f"{SAMPLES}/all.parquet",),
        (f"{SAMPLES}/shard-1-of-2.parquet", f"{SAMPLES}/shard-2-of-2.parquet", captions("train")),
        manifest=f"{SAMPLES}/shard-2-of-2.parquet",
    ),
    Case(
        "measure_generation",
        (f"{DATASET}/generation/triattention/crfm.json",),
        (f"{SAMPLES}/all.parquet", tiles("train"), JUDGE),
        manifest=f"{SAMPLES}/all.parquet",
    ),
    Case(
        "synthesise_scene",
        (f"{DATASET}/synthetic_scenes/triattention/crfm/test-000.tif",),
        (GENERATOR, f"{DATASET}/scenes.parquet", CRITIC),
        manifest=f"{DATASET}/scenes.parquet",
        ways=SCENE,
    ),
    Case(
        "compare_corrections",
        (f"{DATASET}/comparison/released.json",),
        (GENERATOR, captions("held_out"), f"{DATASET}/prompts/held_out.json", CRITIC, JUDGE),
        manifest=captions("held_out"),
        column="label",
        rows=2,
    ),
    Case("measure_class_losses", (f"{DATASET}/class_losses/train.json",), (tiles("train"), CRITIC), manifest=tiles("train")),
    Case(
        "filter_tiles-triattention-crfm-pixel",
        (f"{DATASET}/filtered/triattention/crfm/pixel.parquet",),
        (f"{SAMPLES}/all.parquet", f"{DATASET}/class_losses/train.json", CRITIC),
        manifest=f"{SAMPLES}/all.parquet",
        beside=below(f"{DATASET}/filtered/triattention/crfm/pixel"),
    ),
    Case(
        "filter_tiles-triattention-crfm-best",
        (f"{DATASET}/filtered/triattention/crfm/best.parquet",),
        (f"{SAMPLES}/all.parquet", CRITIC),
        manifest=f"{SAMPLES}/all.parquet",
    ),
    Case(
        "resample_tiles",
        (f"{DATASET}/resampled/triattention/crfm/pixel/hard.parquet",),
        (f"{DATASET}/filtered/triattention/crfm/pixel.parquet", tiles("train"), f"{DATASET}/class_losses/train.json"),
        manifest=f"{DATASET}/filtered/triattention/crfm/pixel.parquet",
    ),
    Case(
        "label_tiles",
        (f"{DATASET}/pseudo_labels.parquet",),
        (tiles("unlabelled"), CRITIC),
        manifest=tiles("unlabelled"),
        beside=below(f"{DATASET}/pseudo_labels"),
    ),
    Case(
        "mix_tiles",
        (f"{DATASET}/mixes/crfm.parquet",),
        (tiles("train"), f"{DATASET}/filtered/triattention/crfm/pixel.parquet", f"{DATASET}/tiles/disjoint.json"),
        manifest=f"{DATASET}/filtered/triattention/crfm/pixel.parquet",
    ),
    Case(
        "measure_agreement",
        (f"{DATASET}/agreement/triattention/crfm.json",),
        (f"{SAMPLES}/all.parquet", CRITIC, JUDGE),
        manifest=f"{SAMPLES}/all.parquet",
    ),
    Case(
        "measure_reconstruction",
        (f"{DATASET}/agreement/reconstruction.json",),
        (tiles("train"), f"{DATASET}/base_model", CRITIC, JUDGE),
        manifest=tiles("train"),
    ),
    Case(
        "draw_data_sheet",
        (f"{DATASET}/data_sheet",),
        (f"{DATASET}/scenes.parquet", tiles("test"), f"{DATASET}/tiles/disjoint.json"),
        manifest=tiles("test"),
        ways=COUNTED,
    ),
    Case(
        "make_table",
        ("results/tables/main.csv", "results/tables/main.txt"),
        (f"{LABELLED}/scores.json", f"{DATASET}/mixes/real.parquet", f"{DATASET}/generation/triattention/crfm.json"),
        manifest=f"{DATASET}/mixes/real.parquet",
        ways=COUNTED,
    ),
    Case(
        "make_report",
        ("results/report.html", "results/figures"),
        ("results/tables/main.csv", f"{DATASET}/data_sheet", f"{DATASET}/comparison/plain.json", captions("train")),
        manifest=captions("train"),
        ways=COUNTED,
    ),
    Case("check_base_model", ("results/base_model.json",), own="given/model_index.json", config="given.yaml"),
    Case(
        "fetch_model-base_model",
        ("fetched/base_model.json",),
        config="fetched.yaml",
        disk="models",
        beside=below("models/sd3"),
        hub="base",
    ),
    Case(
        "fetch_model-caption_model",
        ("fetched/caption_model.json",),
        beside=below("models/llava"),
        config="fetched.yaml",
        disk="models",
        hub="llava",
    ),
    Case(
        "fetch_model-clip_model",
        ("fetched/clip_model.json",),
        config="fetched.yaml",
        disk="models",
        beside=below("models/clip"),
        hub="clip",
    ),
    Case(
        "fetch_weights", ("fetched/weights/segformer_tiny.json",), beside=below("models/backbone.pth"), config="fetched.yaml", disk="models"
    ),
    Case(
        "fetch_dataset",
        ("fetched/fusu/source.json",),
        config="fusu.yaml",
        disk="data",
        beside=below("data/fusu"),
        hub="fusu",
    ),
    Case(
        "zip_predictions",
        ("loveda/loveda/submissions/real/segformer_tiny/seed0.zip",),
        ("loveda/loveda/segmentors/real/segformer_tiny/seed0/checkpoint.pth",),
        config="loveda.yaml",
        disk="loveda",
    ),
]
