# Configuration, paths and the functions that name files; no stage of its own.

import fcntl
import shutil
import socket
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from crfm_core import CrfmError
from crfm_core.checkpoints import check_base_model
from crfm_core.devices import require_gpus
from crfm_core.files import hash_of, require_disk
from crfm_core.settings import PRESETS, EmbeddedBase, FolderBase, HubBase, load_datasets, load_settings

HERE = Path(workflow.basedir)

try:
    settings = load_settings(config)
    datasets = load_datasets(settings, HERE)
except CrfmError as error:
    raise WorkflowError(str(error)) from None
validate(config, str(HERE / "configs" / "schema.json"), set_default=False)  # the models fill them

for key in ("critic", "judge"):
    given = getattr(settings, key).path
    if given and not Path(given).exists():
        raise WorkflowError(
            f"{key}.path: there is no {given} (seen from {Path.cwd()}); give a checkpoint of mmsegmentation or a model folder"
        )

if settings.captions.model and not settings.captions.model.repo:
    from crfm_core.text.vision_language import check_caption_model

    try:
        check_caption_model(settings.captions.model.folder)
    except CrfmError as error:
        raise WorkflowError(str(error)) from None

RESULTS = settings.results
GPU = int(settings.device == "cuda")
PUBLISHED = [name for name, dataset in datasets.items() if dataset.source.kind in ("loveda", "fusu")]  # where they can be fetched
CONFIGURATION = hash_of(settings.model_dump(), [dataset.model_dump() for dataset in datasets.values()])


wildcard_constraints:
    dataset="|".join(datasets),
    split="[A-Za-z0-9_-]+",
    control="|".join(settings.controls),
    sampler="|".join(settings.samplers),
    checkpoint=r"final|step-\d+",
    preset="|".join(("plain", *PRESETS)),
    filter="|".join(settings.filters) or "none",
    recipe="|".join(settings.recipes),
    segmentor="|".join(settings.segmentors),
    table="|".join(settings.tables),
    kind="image|label",
    suffix="tif|png",
    seed=r"\d+",
    shard=r"\d+",
    shards=r"\d+",


def dump(section):
    """A section of the configuration as plain values, for `params:`."""
    return section.model_dump(mode="json")


def dataset_of(wildcards):
    return datasets[wildcards.dataset]


def dataset_section(wildcards):
    """The dataset for `params:`, without the words about it: rewording them reruns nothing."""
    return dataset_of(wildcards).model_dump(mode="json", exclude={"about"})


def source_note(wildcards):
    """The note of a published dataset that says where it lies; nothing for the others."""
    return f"{RESULTS}/{wildcards.dataset}/source.json" if wildcards.dataset in PUBLISHED else []


def listed_tiles(wildcards):
    """The user's list of a split's tiles; nothing where there is none."""
    selection = dataset_of(wildcards).select.get(wildcards.split)
    return selection.ids if selection and selection.ids else []


def recipe_of(wildcards):
    return settings.recipes[wildcards.recipe]


def control_of(wildcards):
    return settings.controls[wildcards.control]


def base_model(wildcards):
    """The folder of the embedded base model, or the file that says where the given or fetched one is."""
    if isinstance(settings.base_model, EmbeddedBase):
        return f"{RESULTS}/{wildcards.dataset}/base_model"
    return f"{RESULTS}/base_model.json"


def caption_model(wildcards):
    """Where the model that captions is: its given folder, or the file that fetching it writes; nothing where no model does."""
    if not settings.captions.model:
        return []
    return f"{RESULTS}/caption_model.json" if settings.captions.model.repo else settings.captions.model.folder


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
    """The checkpoint of the configured critic or judge: the given one, or the function that names the trained one for a rule's input."""
    if judge.path:
        return judge.path
    return lambda wildcards: f"{segmentor_folder(wildcards.dataset, judge.recipe, judge.segmentor, judge.seed)}/checkpoint.pth"


def synthetic_tiles(wildcards):
    """The synthetic manifest a recipe mixes in: nothing, the gathered shards, or what the filter left of them."""
    recipe = recipe_of(wildcards)
    folder = f"{RESULTS}/{wildcards.dataset}"
    if recipe.control is None:
        return []
    if recipe.filter is None:
        return f"{folder}/synthetic/{recipe.control}/{recipe.sampler}/all.parquet"
    return f"{folder}/filtered/{recipe.control}/{recipe.sampler}/{recipe.filter}.parquet"


def generated():
    """The (control, sampler) pairs that the tables' recipes use, in their order."""
    recipes = [settings.recipes[name] for table in settings.tables.values() for name in table.recipes]
    return list(dict.fromkeys((recipe.control, recipe.sampler) for recipe in recipes if recipe.control))


def used_controls():
    """The control schemes that the tables' recipes use."""
    return list(dict.fromkeys(control for control, _ in generated()))


def filtered():
    """The (control, sampler, filter) triples that the tables' recipes use."""
    recipes = [settings.recipes[name] for table in settings.tables.values() for name in table.recipes]
    return list(dict.fromkeys((r.control, r.sampler, r.filter) for r in recipes if r.filter))


def stage_files():
    """What every stage hands over. `all` asks for them too, because an input that is gone but not asked for would not be made again."""
    shards = [f"shard-{shard}-of-{settings.shards}" for shard in range(1, settings.shards + 1)]
    files = []
    for name in datasets:
        folder = f"{RESULTS}/{name}"
        recipes = list(dict.fromkeys(recipe for table in settings.tables.values() for recipe in table.recipes))
        files += [f"{folder}/scenes.parquet", f"{folder}/captions/{datasets[name].train}.parquet"]
        files += [f"{folder}/generators/{control}" for control in used_controls()]
        files += [f"{folder}/synthetic/{c}/{s}/{part}.parquet" for c, s in generated() for part in (*shards, "all")]
        files += [f"{folder}/mixes/{recipe}.parquet" for recipe in recipes]
    scores = [path for table in settings.tables.values() for path in scores_of(table)]
    return list(dict.fromkeys(files + [path.replace("scores.json", "checkpoint.pth") for path in scores]))


def used_splits(wildcards):
    """The splits that anything trains on or is scored on."""
    dataset = dataset_of(wildcards)
    return list(dict.fromkeys([dataset.train, dataset.test, *(r.split for r in settings.recipes.values() if r.split)]))


def compared_corrections():
    """What each form of the correction does to samples, and what sampling without any does."""
    presets = ["plain", *settings.comparison.presets] if settings.comparison else []
    return [f"{RESULTS}/{name}/comparison/{preset}.json" for name in datasets for preset in presets]


def scores_of(table):
    return [
        f"{segmentor_folder(dataset, recipe, table.segmentor, seed)}/scores.json"
        for dataset in datasets
        for recipe in table.recipes
        for seed in settings.seeds
    ]


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


onstart:
    try:
        require_disk(RESULTS, settings.disk_gb * 1e9)
        if not workflow.remote_exec and workflow.local_exec:
            require_gpus(max((job.resources.get("gpu") or 0 for job in workflow.dag.needrun_jobs()), default=0))
        if isinstance(settings.base_model, FolderBase):
            check_base_model(settings.base_model.path)
    except CrfmError as error:
        raise WorkflowError(str(error)) from None


onsuccess:
    if Path(RESULTS, "report.html").is_file():
        for table in settings.tables:
            print(Path(RESULTS, "tables", f"{table}.txt").read_text())
        print(f"report: {Path(RESULTS, 'report.html').resolve()}")
