"""What the configuration names and the user gives: models, weights, datasets, lists; and what has to be fetched."""

from __future__ import annotations

from pathlib import Path

from crfm_core import CrfmError
from crfm_core.checkpoints import base_folder, check_base_model
from crfm_core.data.sources import open_source
from crfm_core.hub import is_fetched, require_token
from crfm_core.layout import Layout
from crfm_core.planning.preflight.findings import Fetch, Findings, Work
from crfm_core.settings import Download, EmbeddedBase, FolderBase, HubBase, Model, Settings

#: Rules whose jobs ask the critic, or the judge.
ASK_CRITIC = (
    "synthesise_shard", "synthesise_scene", "compare_corrections", "measure_class_losses", "filter_pixels", "measure_agreement",
    "measure_reconstruction",
)  # fmt: skip
ASK_JUDGE = ("compare_corrections", "measure_agreement", "measure_reconstruction")
#: Rules whose jobs read the base model.
READ_BASE = ("check_base_model", "encode_prompts", "encode_latents", "train_generator", "sample_validation")


def judge_fault(settings: Settings, key: str) -> str:
    """What is wrong with the given path of ``critic`` or ``judge``; "" if nothing."""
    given = getattr(settings, key).path
    if not given or Path(given).exists():
        return ""
    return f"{key}.path: there is no {given} (seen from {Path.cwd()}); give a checkpoint of mmsegmentation or a model folder"


def segmentor_faults(settings: Settings, name: str) -> list[str]:
    """What is wrong with the given files of a segmentor."""
    faults, segmentor = [], settings.segmentors[name]
    for key, what in (("config", "a configuration file of mmsegmentation"), ("pretrained", "backbone weights, or url and sha256 of them")):
        given = getattr(segmentor, key)
        if isinstance(given, str) and not Path(given).is_file():
            faults.append(f"segmentors.{name}.{key}: there is no file {given} (seen from {Path.cwd()}); give {what}")
    if segmentor.config and not faults:
        from crfm_core.segmentor.mmseg.configuration import read_config

        try:
            read_config(segmentor.config)
        except CrfmError as error:
            faults.append(f"segmentors.{name}.config: {error}")
    return faults


def model_fault(settings: Settings, key: str) -> str:
    """What is wrong with the given folder of the captioning model or of the CLIP-like one; "" if nothing."""
    try:
        if key == "captions.model":
            from crfm_core.text.model_folder import check_folder

            check_folder(settings.captions.model.folder, key)
        else:
            from crfm_core.text.clip import check_clip_model

            check_clip_model(settings.clip.folder)
    except CrfmError as error:
        return str(error)
    return ""


def faults_of_given(settings: Settings) -> list[str]:
    """What is wrong with the files that the configuration names, whether any job needs them or not."""
    faults = [judge_fault(settings, key) for key in ("critic", "judge")]
    faults += [fault for name in settings.segmentors for fault in segmentor_faults(settings, name)]
    for key, model in (("captions.model", settings.captions.model), ("clip", settings.clip)):
        faults += [model_fault(settings, key)] if model and not model.repo else []
    return [fault for fault in faults if fault]


def check_judges(work: Work, found: Findings) -> None:
    settings = work.settings
    filters = [settings.filters[name] for name in work.named("filter", "filter_images")]
    if work.of(*ASK_CRITIC) or any(one.NEEDS_CRITIC for one in filters):
        found.problems += filter(None, [judge_fault(settings, "critic")])
    if work.of(*ASK_JUDGE) or (settings.generation.features == "judge" and work.of("measure_generation")):
        found.problems += filter(None, [judge_fault(settings, "judge")])


def check_segmentors(work: Work, found: Findings) -> None:
    for name in work.named("segmentor", "train_segmentor"):
        found.problems += segmentor_faults(work.settings, name)


def check_generators(work: Work, found: Findings) -> None:
    """Weights to start from, and smaller decoders."""
    for name in work.named("control", "train_generator"):
        given = work.settings.controls[name].start_from
        if given and not Path(given).exists() and not Path(given).resolve().is_relative_to(work.results.resolve()):
            found.problems.append(
                f"controls.{name}.start_from: there is no file or folder {given} (seen from {Path.cwd()}); give a generator folder of the "
                "same scheme, or a file with the released code's names"
            )
    for name in work.named("sampler", "synthesise_shard", "synthesise_scene"):
        folder = work.settings.samplers[name].critic_decoder
        if folder and not (Path(folder) / "config.json").is_file():
            found.problems.append(
                f"samplers.{name}.critic_decoder: {folder} has no config.json (seen from {Path.cwd()}); give the folder of a diffusers "
                "AutoencoderTiny or AutoencoderKL, or leave it out"
            )


def check_base(work: Work, found: Findings) -> None:
    base, where = work.settings.base_model, Path(Layout(work.results).base_model_note())
    if isinstance(base, EmbeddedBase):
        return
    with found.listing():
        if work.of("fetch_base_model"):
            if not is_fetched(base.repo, base.revision, base.path):
                known = base.repo == HubBase(kind="hub").repo
                found.fetches.append(Fetch(base.repo, Path(base.path), "base_model.path", work.rates.base_model_bytes if known else None))
                require_token(base)
        elif work.of(*READ_BASE):
            if isinstance(base, FolderBase):
                check_base_model(base.path)
            else:
                base_folder(where)


def check_models(work: Work, found: Findings) -> None:
    """Captioning and CLIP-like models, and weights of segmentors and Inception."""
    settings, generation = work.settings, work.settings.generation
    ask_clip = any(settings.filters[name].NEEDS_CLIP for name in work.named("filter", "filter_images"))
    ask_clip |= bool(work.of("measure_generation")) and (generation.cmmd or generation.features == "clip")
    wanted: list[tuple[str, Model | None, bool, str]] = [
        ("captions.model", settings.captions.model, bool(work.of("caption_tiles")), "fetch_caption_model"),
        ("clip", settings.clip, ask_clip, "fetch_clip_model"),
    ]
    for key, model, asked, rule in wanted:
        if model and model.repo and work.of(rule):
            with found.listing():
                if not is_fetched(model.repo, model.revision, model.folder):
                    found.fetches.append(Fetch(model.repo, Path(model.folder), f"{key}.path"))
        elif model and asked and not model.repo:
            found.problems += filter(None, [model_fault(settings, key)])
    inception = work.of("measure_generation") and generation.features == "inception"
    if inception and isinstance(generation.weights, str) and not Path(generation.weights).is_file():
        found.warnings.append(f"generation.weights: there is no file {generation.weights}; FID is left out, and all else goes on")
    for name in work.named("weights", "fetch_weights"):
        download = settings.segmentors[name].pretrained if name in settings.segmentors else generation.weights
        if isinstance(download, Download) and not Path(download.file).is_file():
            key = f"segmentors.{name}.pretrained.path" if name in settings.segmentors else "generation.weights.path"
            found.fetches.append(Fetch(f"weights of {name}", Path(download.file).parent, key))


def check_datasets(work: Work, found: Findings) -> None:
    """Published datasets that are to be fetched or are there, folders of scenes, lists of tiles."""
    for job in work.of("fetch_dataset"):
        name = job.names["dataset"]
        source = open_source(work.datasets[name], Path.cwd())
        with found.listing():
            wanted = source.submission() if job.names.get("files") == "test_images" else source
            if wanted.find() is None:
                where = Path(work.datasets[name].source.root)
                found.fetches.append(Fetch(f"dataset {name}", where, f"source.root of {name}", wanted.download_bytes()))
    for name in work.named("dataset", "list_scenes"):
        if name in work.named("dataset", "fetch_dataset"):
            continue
        note = Path(Layout(work.results).source_note(name, "source"))
        with found.listing():
            source = open_source(work.datasets[name], Path.cwd(), note if note.is_file() else None)
            source.require_folder()
            found.problems += source.faults()
    for job in work.of("tile_scenes"):
        name, split = job.names["dataset"], job.names["split"]
        selection = work.datasets[name].select.get(split)
        if selection and selection.ids and not Path(selection.ids).is_file():
            found.problems.append(
                f"dataset {name}: select.{split}.ids: there is no {selection.ids} (seen from {Path.cwd()}); give a file with one tile id "
                "per line"
            )
