# Configuration, paths and the functions that name files; no stage of its own.

import fcntl
import shutil
import socket
import sys
from functools import cache
from pathlib import Path

from snakemake.common.configfile import load_configfile
from snakemake.exceptions import WorkflowError
from snakemake.io import regex_from_filepattern, strip_wildcard_constraints
from snakemake.utils import validate

from crfm_core import CrfmError
from crfm_core.experiment import Experiment, copies, downloads, iterations, keeps_every_image
from crfm_core.files import hash_of
from crfm_core.settings import PLAIN, PRESETS, Download, load_datasets, load_settings, merge_layers

HERE = Path(workflow.basedir)

# What each file says: where a later one chooses another kind of a section, keys of earlier ones that only the old kind has are dropped.
merged, unused = merge_layers([*map(load_configfile, workflow.configfiles), workflow.config_settings.config])
config.clear()
config.update(merged)
if unused and workflow.is_main_process:
    print(f"unused settings: {', '.join(unused)}", file=sys.stderr)

try:
    settings = load_settings(config)
    datasets = load_datasets(settings, HERE)
    experiment = Experiment(settings, datasets)
    DOWNLOADS = downloads(settings)
except CrfmError as error:
    raise WorkflowError(str(error)) from None
config["tables"] = settings.tables  # a list, in whichever way they were named
validate(config, str(HERE / "configs" / "schema.json"), set_default=False)  # the models fill them

NETWORKS = {}  # of segmentors that configuration files describe, with all that the files inherit, as hashes: read as data
for name, segmentor in settings.segmentors.items():
    if segmentor.config:
        from crfm_core.segmentor.mmseg.configuration import read_config

        try:
            NETWORKS[name] = hash_of(read_config(segmentor.config).get("model"))
        except CrfmError:
            pass  # it stands in the list of faults that a run begins with

RESULTS = settings.results
GPU = int(settings.device == "cuda")
PUBLISHED = [name for name, dataset in datasets.items() if dataset.source.CAN_DOWNLOAD]
SCORED_BY_A_SERVER = [name for name, dataset in datasets.items() if dataset.source.HAS_SERVER]
# Heavy jobs are repeated once. On a cluster (which counts jobs) its profile says how often, by new submissions with more memory and time.
RETRIES = None if workflow.remote_exec or workflow.resource_settings.nodes else 1

# Which is which of two checkpoints: the engine compares the names of inputs as a set, in which it makes no difference.
JUDGED_BY = {"critic": settings.critic.model_dump(), "judge": settings.judge.model_dump()}

CONFIGURATION = hash_of(settings.model_dump(), [dataset.model_dump() for dataset in datasets.values()])


wildcard_constraints:
    dataset="|".join(datasets),
    split="[A-Za-z0-9_-]+",
    control="|".join(settings.controls),
    sampler="|".join(settings.samplers),
    checkpoint=r"final|step-\d+",
    preset="|".join((PLAIN, *PRESETS)),
    filter="|".join([*settings.filters, "none"]),
    resampling="|".join(settings.resamplings) or "none",
    recipe="|".join(settings.recipes),
    segmentor="|".join(settings.segmentors),
    table="|".join(settings.experiments),
    kind="image|label",
    suffix="tif|png",
    seed=r"\d+",
    shard=r"\d+",
    shards=r"\d+",


def more(amount):
    """A resource of which every retry gets as much again; `amount` is a number or a function of the job's wildcards."""
    return lambda wildcards, attempt: attempt * (amount(wildcards) if callable(amount) else amount)


def of_site(name):
    """What a profile says of its site under default-resources; None where it says nothing."""
    found = (workflow.resource_settings.default_resources or {}).get(name)
    return getattr(found, "raw", found)


def gpus(count):
    """A job's GPUs as resources. A cluster is asked for `gpu`; or for `gres`, where its profile names one in gpu_gres."""
    number = count if callable(count) else lambda wildcards: count
    gres, partition = of_site("gpu_gres"), of_site("gpu_partition")
    asked = {"gres": lambda wildcards: f"{gres}:{number(wildcards)}" if number(wildcards) else ""} if gres else {"gpu": count}
    if partition:
        asked["slurm_partition"] = lambda wildcards: partition if number(wildcards) else of_site("slurm_partition") or ""
    return asked


def gpu_rules():
    """Names of the rules whose jobs use GPUs."""
    return [one.name for one in workflow.rules if GPU and any(one.resources.get(name) not in (None, 0) for name in ("gpu", "gres"))]


@cache
def faults_for_a_dry_run():
    """What is wrong with the files that the configuration names; a real run has them on its list of `onstart`."""
    from crfm_core.planning.preflight.user_files import problems_of_user_files

    return problems_of_user_files(settings) if workflow.dryrun else []


def given(path):
    """A file or folder of the user's as a rule's input, for input functions. One that is missing is none until a real run has put it on its
    list of all that is missing; a dry run refuses it here."""
    if path and faults_for_a_dry_run():
        raise WorkflowError("\n".join(faults_for_a_dry_run()))
    unlisted = workflow.is_main_process and not workflow.dryrun
    if not path or unlisted and not Path(path).exists() and not Path(path).resolve().is_relative_to(Path(RESULTS).resolve()):
        return []
    return path


def dump(section):
    """What of a section of the configuration results depend on, as plain values for `params:`."""
    return section.result_keys()


def aside(value):
    """A parameter that changes nothing about a result, as `performance_keys()` of a section: another value of it reruns nothing.

    The engine does not compare parameters that are functions of `threads`.
    """
    return lambda wildcards, threads: value(wildcards) if callable(value) else value


def dataset_of(wildcards):
    return datasets[wildcards.dataset]


def dataset_but(*keys):
    """The dataset as parameters: `dataset`, and `others`, the keys that change nothing about what the rule makes; `about` is one of them."""
    others = {"about", *keys}
    return {
        "dataset": lambda wildcards: dataset_of(wildcards).model_dump(mode="json", exclude=others),
        "others": aside(lambda wildcards: dataset_of(wildcards).model_dump(mode="json", include=others)),
    }


def classes_of(wildcards):
    return dataset_of(wildcards).classes


def palette_of(wildcards):
    """Colours of pictures; in what is no picture they have no say."""
    return dataset_of(wildcards).model_dump(mode="json", include={"palette"})["palette"]


def source_note(wildcards):
    """The note that says where a published dataset lies; nothing for the others."""
    return f"{RESULTS}/{wildcards.dataset}/source.json" if wildcards.dataset in PUBLISHED else []


def listed_tiles(wildcards):
    """The user's list of a split's tiles; nothing where there is none."""
    selection = dataset_of(wildcards).select.get(wildcards.split)
    return given(selection.ids) if selection else []


def recipe_of(wildcards):
    return settings.recipes[wildcards.recipe]


def control_of(wildcards):
    return settings.controls[wildcards.control]


def base_model(wildcards):
    """The folder of the embedded base model, or the file that says where the given or fetched one is."""
    if settings.base_model.IS_BUILT:
        return f"{RESULTS}/{wildcards.dataset}/base_model"
    return f"{RESULTS}/base_model.json"


def caption_model(wildcards):
    """Where the model that captions is: its given folder, or the file that fetching it writes; nothing where no model does."""
    if not settings.captions.model:
        return []
    return f"{RESULTS}/caption_model.json" if settings.captions.model.repo else given(settings.captions.model.folder)


def training_tiles(wildcards):
    return f"{RESULTS}/{wildcards.dataset}/tiles/{dataset_of(wildcards).train}.parquet"


def training_captions(wildcards):
    return f"{RESULTS}/{wildcards.dataset}/captions/{dataset_of(wildcards).train}.parquet"


def training_prompts(wildcards):
    return f"{RESULTS}/{wildcards.dataset}/prompts/{dataset_of(wildcards).train}.json"


def weights_to_sample(wildcards):
    """The finished generator, or a checkpoint that its training has kept so far."""
    generator = f"{RESULTS}/{wildcards.dataset}/generators/{wildcards.control}"
    if wildcards.checkpoint == "final":
        return generator
    return f"{generator}.unfinished/checkpoint-{wildcards.checkpoint.removeprefix('step-')}.pt"


def test_tiles(wildcards):
    return f"{RESULTS}/{wildcards.dataset}/tiles/{dataset_of(wildcards).test}.parquet"


def segmentor_folder(dataset, recipe, segmentor, seed):
    return f"{RESULTS}/{dataset}/segmentors/{recipe}/{segmentor}/seed{seed}"


def checkpoint_of(judge):
    """The function that names the checkpoint of the configured critic or judge for a rule's input: the given one, or the trained one."""
    if judge.path:
        return lambda wildcards: given(judge.path)
    return lambda wildcards: f"{segmentor_folder(wildcards.dataset, judge.recipe, judge.segmentor, judge.seed)}/checkpoint.pth"


def synthetic_folder(wildcards):
    return f"{RESULTS}/{wildcards.dataset}/synthetic/{wildcards.control}/{wildcards.sampler}"


def tiles_to_filter(wildcards):
    """What a filter is applied to: what the one before it left, or all synthetic tiles."""
    return experiment.filtered(wildcards.dataset, wildcards.control, wildcards.sampler, settings.filters[wildcards.filter].after)


def tiles_to_resample(wildcards):
    return experiment.filtered(wildcards.dataset, wildcards.control, wildcards.sampler, wildcards.filter)


def synthetic_tiles(wildcards):
    """The synthetic manifest a recipe mixes in: nothing, or what filter and re-sampling leave of the gathered shards."""
    try:
        return experiment.samples(wildcards.dataset, wildcards.recipe) or []
    except CrfmError as error:
        raise WorkflowError(str(error)) from None


def filters_that(drop_images):
    """A pattern of the filters that drop whole images, or of those that do not, for a rule's wildcard constraint."""
    return "|".join(name for name, one in settings.filters.items() if one.DROPS_IMAGES == drop_images) or "none-of-these"


def class_losses(wildcards):
    """The critic's mean losses on real tiles that a filter, or a re-sampling, compares with."""
    one = settings.filters.get(getattr(wildcards, "filter", ""))
    split = (one and one.split_of_losses) or dataset_of(wildcards).train
    return f"{RESULTS}/{wildcards.dataset}/class_losses/{split}.json"


def clip_model(wildcards):
    """Where the CLIP-like model is: its given folder, or the file that fetching it writes; nothing where none is configured."""
    if not settings.clip:
        return []
    return f"{RESULTS}/clip_model.json" if settings.clip.repo else given(settings.clip.folder)


def critic_of_sampler(wildcards):
    """The critic, for a sampler that corrects."""
    return checkpoint_of(settings.critic)(wildcards) if settings.samplers[wildcards.sampler].preset else []


def critic_of_filter(wildcards):
    """The critic, for a filter that asks it."""
    if not settings.filters[wildcards.filter].NEEDS_CRITIC:
        return []
    return checkpoint_of(settings.critic)(wildcards)


def clip_of_filter(wildcards):
    """Where the CLIP-like model is, for a filter that asks it."""
    return clip_model(wildcards) if settings.filters[wildcards.filter].NEEDS_CLIP else []


def losses_of_training_tiles(wildcards):
    return f"{RESULTS}/{wildcards.dataset}/class_losses/{dataset_of(wildcards).train}.json"


def segmentor_of(wildcards):
    return settings.segmentors[wildcards.segmentor]


def val_tiles(wildcards):
    """The tiles that choose the best weights; nothing where the dataset names no split for it."""
    dataset = dataset_of(wildcards)
    return f"{RESULTS}/{wildcards.dataset}/tiles/{dataset.val}.parquet" if dataset.val else []


def inception_weights():
    """What holds the weights that FID needs: their file, the note that fetching writes, or nothing where the file is missing."""
    weights = settings.generation.weights
    if settings.generation.features != "inception" or weights is None:
        return []
    if isinstance(weights, Download):
        return f"{RESULTS}/weights/inception.json"
    return weights if Path(weights).is_file() else []


def weights_of_segmentor(wildcards):
    """Given backbone weights, the note that fetching them writes, or nothing."""
    weights = segmentor_of(wildcards).pretrained
    return f"{RESULTS}/weights/{wildcards.segmentor}.json" if isinstance(weights, Download) else given(weights)


def files_of_rules(wildcards):
    """By rule, what its files and its times are called."""
    return {
        one.name: {
            "outputs": [regex_from_filepattern(str(file)) for file in one.output],
            "benchmark": strip_wildcard_constraints(str(one.benchmark or "")),
        }
        for one in workflow.rules
    }


def recover_from_a_killed_run():
    """Let a run start after one that was killed (-9) together with its clean-up.

    A run holds .snakemake/alive for as long as it lives; the kernel lets go of it however the run ends. Who gets hold of it
    and finds Snakemake's own locks, left by this same machine, knows that nobody needs them any more.
    """
    folder = Path(".snakemake")
    folder.mkdir(exist_ok=True)
    handle = (folder / "alive").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    handle.seek(0)
    if handle.read() == socket.gethostname():
        shutil.rmtree(folder / "locks", ignore_errors=True)
    handle.truncate(0)
    handle.write(socket.gethostname())
    handle.flush()
    return handle


if workflow.is_main_process and not workflow.dryrun:
    alive = recover_from_a_killed_run()


SPEAK_ALONE = ("plan", "preflight")  # rules that only say something, and need nothing of what a run does


def gpu_limit():
    """The GPUs that a job may be given at most by --resources; None where that is not said."""
    return workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else None


def software():
    """By rule the file that names its packages; nothing where jobs do not run in this environment."""
    own = {str(method) for method in workflow.deployment_settings.deployment_method}
    return {} if own else {one.name: str(HERE / "envs" / Path(one.conda_env).name) for one in workflow.rules if one.conda_env}


onstart:
    from crfm_core.planning.jobs import Job

    jobs = [Job(job.rule.name, dict(job.wildcards.items())) for job in workflow.dag.needrun_jobs() if job.rule.name not in SPEAK_ALONE]
    if jobs:
        from crfm_core.planning.preflight import PendingRun, check_run
        from crfm_core.planning.rates import read_rates

        found = check_run(
            PendingRun(
                settings,
                datasets,
                jobs,
                read_rates(HERE / "configs" / "rates.yaml"),
                frozenset(gpu_rules()),
                gpu_limit(),
                local=workflow.local_exec,
                software={name: Path(file) for name, file in software().items()},
            )
        )
        if found.problems:
            raise WorkflowError(found.text())
        for note in found.notes():
            print(note, file=sys.stderr)


onsuccess:
    only_spoken = all(job.rule.name in SPEAK_ALONE for job in workflow.dag.jobs)
    if not only_spoken and Path(RESULTS, "report.html").is_file():
        for table in experiment.tables:
            print(Path(RESULTS, "tables", f"{table}.txt").read_text())
        print(f"report: {Path(RESULTS, 'report.html').resolve()}")
