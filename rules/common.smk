# Configuration, and what rules share: the paths and parameters that follow from wildcards; no stage of its own.

import contextlib
import sys
from functools import cache
from pathlib import Path

from snakemake.common.configfile import load_configfile
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from crfm_core import CrfmError
from crfm_core.experiment import Experiment, copies, downloads, hub_models, keeps_every_image, layout_copies
from crfm_core.files import hash_of
from crfm_core.layout import Layout
from crfm_core.settings import PLAIN, PRESETS, PSEUDO, UNLABELLED, Download, load_datasets, load_settings, merge_layers

HERE = Path(workflow.basedir)

# What each file says: where a later one chooses another kind of a section, keys of earlier ones that only the old kind has are dropped.
merged, unused = merge_layers([*map(load_configfile, workflow.configfiles), workflow.config_settings.config])
config.clear()
config.update(merged)
if unused and workflow.is_main_process:
    print(f"unused settings: {', '.join(unused)}", file=sys.stderr)


@contextlib.contextmanager
def refusals():
    """Faults of the configuration as the engine shows them: the message alone."""
    try:
        yield
    except CrfmError as error:
        raise WorkflowError(str(error)) from None


with refusals():
    settings = load_settings(config)
    datasets = load_datasets(settings, HERE)
    experiment = Experiment(settings, datasets)
    MODELS, WEIGHTS = hub_models(settings), downloads(settings)
config["tables"] = settings.tables  # a list, in whichever way they were named
validate(config, str(HERE / "configs" / "schema.json"), set_default=False)  # the models fill them

results = Layout(settings.results)
CONFIGURATION = hash_of(settings.model_dump(), [dataset.model_dump() for dataset in datasets.values()])
CAPTIONS = settings.captions.model_dump(mode="json", exclude={"unlabelled"})  # of everything that shows known classes
GPU = int(settings.device == "cuda")

# Which is which of two checkpoints: the engine compares the names of inputs as a set, in which it makes no difference.
JUDGED_BY = {"critic": settings.critic.model_dump(), "judge": settings.judge.model_dump()}


def one_of(names):
    """The pattern of a wildcard that stands for these names; for none of them it matches nothing."""
    return "|".join(names) or "(?!)"


wildcard_constraints:
    dataset=one_of(datasets),
    split="[A-Za-z0-9_-]+",
    control=one_of(settings.controls),
    sampler=one_of(settings.samplers),
    mask_code="[a-z_]+",
    set="[A-Za-z0-9_-]+",
    layouts=one_of(settings.layouts),
    checkpoint=r"final|step-\d+",
    preset=one_of([PLAIN, *PRESETS]),
    filter=one_of([*settings.filters, "none"]),
    resampling=one_of(settings.resamplings),
    recipe=one_of(settings.recipes),
    segmentor=one_of(settings.segmentors),
    table=one_of(settings.experiments),
    kind="image|label",
    suffix="tif|png",
    seed=r"\d+",
    shard=r"\d+",
    shards=r"\d+",


# ------------------------------------------------------------------------------------------------------------ parameters


def untracked(value):
    """A parameter that changes no result, such as `performance_keys()` of a section: another value of it reruns nothing.

    The engine does not compare parameters that are functions of `threads`.
    """
    return lambda wildcards, threads: value(wildcards) if callable(value) else value


def section(**named):
    """A section of the configuration, or a function that gives it, as parameters: its result keys under its name, and `performance`."""
    ((name, one),) = named.items()
    find = one if callable(one) else lambda wildcards: one
    performance = untracked(lambda wildcards: find(wildcards).performance_keys())
    return {name: lambda wildcards: find(wildcards).result_keys(), "performance": performance}


def dataset_without(*keys):
    """The dataset as parameters: `dataset`, and untracked in `others` the keys that do not change what the rule makes, such as `about`."""
    others = {"about", "held_out", *keys}
    return {
        "dataset": lambda wildcards: dataset_of(wildcards).model_dump(mode="json", exclude=others),
        "others": untracked(lambda wildcards: dataset_of(wildcards).model_dump(mode="json", include=others)),
    }


def named(among, wildcard):
    """The function that finds a section by the name that a wildcard stands for."""
    return lambda wildcards: among[getattr(wildcards, wildcard)]


dataset_of, table_of = named(datasets, "dataset"), named(settings.experiments, "table")
control_of, sampler_of = named(settings.controls, "control"), named(settings.samplers, "sampler")
layouts_of = named(settings.layouts, "layouts")
segmentor_of, filter_of = named(settings.segmentors, "segmentor"), named(settings.filters, "filter")


def classes_of(wildcards):
    return dataset_of(wildcards).classes


def palette_of(wildcards):
    """Colours of pictures; they change no other result."""
    return dataset_of(wildcards).model_dump(mode="json", include={"palette"})["palette"]


def captions_of(wildcards):
    """How the tiles of a split are captioned; by the template new layouts, which have no image of their own, and the critic's labels."""
    template = {"kind": "template", "model": None}
    return settings.captions.model_copy(update=template if getattr(wildcards, "split", None) in (PSEUDO, *settings.layouts) else {})


def caption_keys(wildcards):
    """The same as parameters; the caption of unlabelled tiles matters to a dataset that has them, and to no labelled split's tiles."""
    takes = getattr(wildcards, "split", UNLABELLED) == UNLABELLED and dataset_of(wildcards).has_unlabelled
    return {key: value for key, value in captions_of(wildcards).result_keys().items() if takes or key != "unlabelled"}


def copies_of(wildcards):
    return copies(settings, wildcards.control, wildcards.sampler)


@cache
def network_of(segmentor):
    """The network that a segmentor's configuration file describes, with all that the file inherits, as a hash; read as data."""
    from crfm_core.segmentor.mmseg.configuration import read_config

    config = settings.segmentors[segmentor].config
    try:
        return hash_of(read_config(config).get("model")) if config else ""
    except CrfmError:
        return ""  # the list of faults that a run begins with has it
