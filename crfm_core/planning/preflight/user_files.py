"""Files of the user's that the configuration names: models, weights, datasets, lists; and what has to be downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crfm_core import CrfmError
from crfm_core.checkpoints import base_folder, check_base_model
from crfm_core.data.sources import open_source
from crfm_core.hub import is_fetched, require_token
from crfm_core.planning.preflight.checks import CheckResults, PendingDownload, PendingRun, path_problems
from crfm_core.settings import Download, EmbeddedBase, FolderBase, HubBase, Model, Settings

#: Rules whose jobs read the critic, the judge, the base model.
READ_CRITIC = (
    "synthesise_shard", "synthesise_scene", "compare_corrections", "measure_class_losses", "measure_agreement",
    "measure_reconstruction", "label_tiles",
)  # fmt: skip
READ_JUDGE = ("compare_corrections", "measure_agreement", "measure_reconstruction")
READ_BASE_MODEL = ("check_base_model", "encode_prompts", "encode_latents", "encode_set_latents", "train_generator", "sample_validation")


def judge_problems(settings: Settings, key: str) -> list[str]:
    """What is wrong with the path of ``critic`` or ``judge``."""
    return path_problems(f"{key}.path", getattr(settings, key).path, "a checkpoint of mmsegmentation or a model folder")


def segmentor_problems(settings: Settings, name: str) -> list[str]:
    """What is wrong with the files of a segmentor."""
    segmentor, key = settings.segmentors[name], f"segmentors.{name}"
    problems = path_problems(f"{key}.config", segmentor.config, "a configuration file of mmsegmentation", file=True)
    if isinstance(segmentor.pretrained, str):
        problems += path_problems(f"{key}.pretrained", segmentor.pretrained, "backbone weights, or url and sha256 of them", file=True)
    if segmentor.config and not problems:
        from crfm_core.segmentor.mmseg.configuration import read_config

        problems += [f"{key}.config: {problem}" for problem in _errors_of(read_config, segmentor.config)]
    return problems


def model_problems(key: str, model: Model) -> list[str]:
    """What is wrong with the folder of the captioning model or of the CLIP-like one."""
    if key == "captions.model":
        from crfm_core.text.model_folder import check_folder

        return _errors_of(check_folder, model.folder, key)
    from crfm_core.text.clip import check_clip_model

    return _errors_of(check_clip_model, model.folder)


def _errors_of(check: Callable[..., object], *arguments: str) -> list[str]:
    try:
        check(*arguments)
    except CrfmError as error:
        return [str(error)]
    return []


def problems_of_user_files(settings: Settings) -> list[str]:
    """What is wrong with the files that the configuration names, whether any job needs them or not."""
    problems = [*judge_problems(settings, "critic"), *judge_problems(settings, "judge")]
    problems += [problem for name in settings.segmentors for problem in segmentor_problems(settings, name)]
    for key, model in (("captions.model", settings.captions.model), ("clip", settings.clip)):
        problems += model_problems(key, model) if model and not model.repo else []
    return problems


def check_judges(run: PendingRun, found: CheckResults) -> None:
    settings = run.settings
    if run.of(*READ_CRITIC) or any(settings.filters[name].NEEDS_CRITIC for name in run.named("filter", "filter_tiles")):
        found.problems += judge_problems(settings, "critic")
    if run.of(*READ_JUDGE) or (settings.generation.features == "judge" and run.of("measure_generation")):
        found.problems += judge_problems(settings, "judge")


def check_segmentors(run: PendingRun, found: CheckResults) -> None:
    for name in run.named("segmentor", "train_segmentor"):
        found.problems += segmentor_problems(run.settings, name)


def check_generators(run: PendingRun, found: CheckResults) -> None:
    """Weights to start from, and smaller decoders."""
    for name in run.named("control", "train_generator"):
        start = run.settings.controls[name].start_from
        if start and not Path(start).resolve().is_relative_to(run.results.resolve()):
            remedy = "a generator folder of the same scheme, or a file with the released code's names"
            found.problems += path_problems(f"controls.{name}.start_from", start, remedy)
    for name in run.named("sampler", "synthesise_shard", "synthesise_scene"):
        folder = run.settings.samplers[name].critic_decoder
        if folder and not (Path(folder) / "config.json").is_file():
            found.problems.append(
                f"samplers.{name}.critic_decoder: {folder} has no config.json (from {Path.cwd()}); give the folder of a diffusers "
                "AutoencoderTiny or AutoencoderKL, or leave it out"
            )


def check_base(run: PendingRun, found: CheckResults) -> None:
    base = run.settings.base_model
    if isinstance(base, EmbeddedBase):
        return
    with found.collect():
        if isinstance(base, HubBase) and "base_model" in run.named("model", "fetch_model"):
            if not is_fetched(base.repo, base.revision, base.path):
                known = base.repo == HubBase(kind="hub").repo
                size = run.rates.base_model_bytes if known else None
                found.downloads.append(PendingDownload(base.repo, Path(base.path), "base_model.path", size))
                require_token(base)
        elif run.of(*READ_BASE_MODEL):
            if isinstance(base, FolderBase):
                check_base_model(base.path)
            else:
                base_folder(Path(run.layout.model_note("base_model")))


def check_models(run: PendingRun, found: CheckResults) -> None:
    """Captioning and CLIP-like models, and weights of segmentors and Inception."""
    settings, generation = run.settings, run.settings.generation
    needs_clip = any(settings.filters[name].NEEDS_CLIP for name in run.named("filter", "filter_tiles"))
    needs_clip |= bool(run.of("measure_generation")) and (generation.cmmd or generation.features == "clip")
    models: list[tuple[str, Model | None, bool, str]] = [
        ("captions.model", settings.captions.model, bool(run.of("caption_tiles")), "caption_model"),
        ("clip", settings.clip, needs_clip, "clip_model"),
    ]
    for key, model, needed, name in models:
        if model and model.repo and name in run.named("model", "fetch_model"):
            with found.collect():
                if not is_fetched(model.repo, model.revision or "", model.folder):
                    found.downloads.append(PendingDownload(model.repo, Path(model.folder), f"{key}.path"))
        elif model and needed and not model.repo:
            found.problems += model_problems(key, model)
    inception = run.of("measure_generation") and generation.features == "inception"
    if inception and isinstance(generation.weights, str) and not Path(generation.weights).is_file():
        found.warnings.append(f"generation.weights: no such file: {generation.weights}; FID is left out")
    for name in run.named("weights", "fetch_weights"):
        download = settings.segmentors[name].pretrained if name in settings.segmentors else generation.weights
        if isinstance(download, Download) and not Path(download.file).is_file():
            key = f"segmentors.{name}.pretrained.path" if name in settings.segmentors else "generation.weights.path"
            found.downloads.append(PendingDownload(f"weights of {name}", Path(download.file).parent, key))


def check_datasets(run: PendingRun, found: CheckResults) -> None:
    """Published datasets that are downloaded or lie there, folders of scenes, lists of tiles."""
    for job in run.of("fetch_dataset"):
        name = job.names["dataset"]
        source = open_source(run.datasets[name], Path.cwd())
        with found.collect():
            wanted = source.submission() if job.names.get("files") == "test_images" else source
            if wanted.find() is None:
                folder = Path(getattr(source.settings, "root", ""))
                found.downloads.append(PendingDownload(f"dataset {name}", folder, f"source.root of {name}", wanted.download_bytes()))
    for name in run.named("dataset", "list_scenes"):
        if name in run.named("dataset", "fetch_dataset"):
            continue
        note = Path(run.layout.source_note(name, "source"))
        with found.collect():
            source = open_source(run.datasets[name], Path.cwd(), note if note.is_file() else None)
            source.require_folder()
            found.problems += source.faults() + source.faults_of_unlabelled()
    for job in run.of("tile_scenes"):
        name, split = job.names["dataset"], job.names["split"]
        if selection := run.datasets[name].select.get(split):
            key = f"dataset {name}: select.{split}.ids"
            found.problems += path_problems(key, selection.ids, "a file with one tile id per line", file=True)
