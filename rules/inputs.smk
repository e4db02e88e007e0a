# Which files jobs read: functions that find a rule's inputs by its wildcards; no stage of its own.


@cache
def faulty_user_files():
    """What is wrong with the files that the configuration names; a real run has them on its list of `onstart`."""
    from crfm_core.planning.preflight.user_files import problems_of_user_files

    return problems_of_user_files(settings) if workflow.dryrun else []


def user_file(path):
    """A file or folder of the user's as a rule's input, for input functions. One that is missing is none until a real run has put it on its
    list of all that is missing; a dry run refuses it here."""
    if path and faulty_user_files():
        raise WorkflowError("\n".join(faulty_user_files()))
    unlisted = workflow.is_main_process and not workflow.dryrun
    if not path or unlisted and not Path(path).exists() and not Path(path).resolve().is_relative_to(Path(settings.results).resolve()):
        return []
    return path


def split_of(name, kind):
    """An input function: the tiles, captions, prompts or class losses (`kind`) of the dataset's split `train`, `test`, `val` or
    `held_out_split`; nothing where it has none."""
    return lambda wildcards: kind(wildcards.dataset, split) if (split := getattr(dataset_of(wildcards), name)) else []


def held_out(kind):
    """An input function: the captions or prompts (`kind`) of the split that is looked at where something is chosen."""

    def of_split(wildcards):
        if not (split := dataset_of(wildcards).held_out_split):
            raise WorkflowError(
                f"dataset {wildcards.dataset}: held_out: names no split, nor does val, and this needs one that is not the test split"
            )
        return kind(wildcards.dataset, split)

    return of_split


def tiles_to_caption(wildcards):
    """The tiles of a split, unlabelled ones with the critic's labels, or new layouts."""
    if wildcards.split == PSEUDO:
        return results.pseudo_labels(wildcards.dataset)
    return (results.layouts if wildcards.split in settings.layouts else results.tiles)(wildcards.dataset, wildcards.split)


def caption_model_of_tiles(wildcards):
    """The captioning model, where tiles are described by one."""
    return caption_model(wildcards) if captions_of(wildcards).model else []


def by_model(value, otherwise):
    """A function of wildcards: `value` where a model describes the tiles, else `otherwise`."""
    return lambda wildcards: value if captions_of(wildcards).model else otherwise


def pseudo_labels_of_layouts(wildcards):
    """The critic's labels of the unlabelled tiles, for layouts that are made of them."""
    return results.pseudo_labels(wildcards.dataset) if layouts_of(wildcards).NEEDS_UNLABELLED else []


def masks_of_sampler(kind):
    """An input function: the captions or prompts (`kind`) of the masks that a sampler draws images for."""
    return lambda wildcards: kind(wildcards.dataset, experiment.masks_of(wildcards.dataset, wildcards.sampler))


def base_model(wildcards):
    """The folder of the embedded base model, or the note of where another one lies."""
    return results.base_model(wildcards.dataset) if settings.base_model.IS_BUILT else results.model_note("base_model")


def hub_model(name, model):
    """A model that may come from the hub: the note of where it lies, or the user's folder; nothing where none is configured."""
    return lambda wildcards: [] if not model else results.model_note(name) if name in MODELS else user_file(model.folder)


caption_model, clip_model = hub_model("caption_model", settings.captions.model), hub_model("clip_model", settings.clip)


def checkpoint_of(judge):
    """An input function: the checkpoint of the configured critic or judge."""
    path = lambda wildcards: experiment.checkpoint_of(judge, wildcards.dataset)
    return (lambda wildcards: user_file(path(wildcards))) if judge.path else path


critic, judge = checkpoint_of(settings.critic), checkpoint_of(settings.judge)


def used_tiles(wildcards):
    """The tiles of all splits that are used."""
    return [results.tiles(wildcards.dataset, split) for split in experiment.used_splits(wildcards.dataset)]


def critic_of_sampler(wildcards):
    """The critic, for a sampler that corrects."""
    return critic(wildcards) if sampler_of(wildcards).preset else []


def tiles_to_filter(wildcards):
    """What a filter is applied to: what the one before it left, or all synthetic tiles."""
    return experiment.filtered(wildcards.dataset, wildcards.control, wildcards.sampler, filter_of(wildcards).after)


def filtered_tiles(wildcards):
    return experiment.filtered(wildcards.dataset, wildcards.control, wildcards.sampler, wildcards.filter)


def real_tiles(wildcards):
    """The real tiles of a recipe."""
    return results.tiles(wildcards.dataset, settings.recipes[wildcards.recipe].split or dataset_of(wildcards).train)


def synthetic_tiles(wildcards):
    """The synthetic tiles of a recipe; nothing for recipes of real tiles alone."""
    with refusals():
        return experiment.samples(wildcards.dataset, wildcards.recipe) or []


def pseudo_labelled_tiles(wildcards):
    """The unlabelled tiles of a recipe with the critic's labels; nothing for recipes without."""
    with refusals():
        return experiment.pseudo_labels(wildcards.dataset, wildcards.recipe) or []


def source_note(wildcards):
    """The note of where a published dataset lies; nothing for the others."""
    return results.source_note(wildcards.dataset, "source") if wildcards.dataset in experiment.published else []


def listed_tiles(wildcards):
    """The user's list of a split's tiles; nothing where there is none."""
    selection = dataset_of(wildcards).select.get(wildcards.split)
    return user_file(selection.ids) if selection else []


def weights_to_sample(wildcards):
    """The finished generator, or a checkpoint that its training has kept so far."""
    if wildcards.checkpoint == "final":
        return results.generator(wildcards.dataset, wildcards.control)
    return results.training_checkpoint(wildcards.dataset, wildcards.control, wildcards.checkpoint.removeprefix("step-"))


def tiles_of_set(wildcards):
    """The tiles of a split, or those with the critic's labels."""
    pseudo = wildcards.set == PSEUDO
    return results.pseudo_labels(wildcards.dataset) if pseudo else results.tiles(wildcards.dataset, wildcards.set)


def unlabelled_set(wildcards):
    """The unlabelled tiles that a generator trains on, with the critic's labels or without; None where it trains on none."""
    control = control_of(wildcards)
    return {"none": UNLABELLED, "predicted": PSEUDO}[control.unlabelled_masks] if control.unlabelled_share else None


def validation_set(wildcards):
    """The split that a generator's training looks at; None where it looks at none, or at some of the training tiles."""
    return dataset_of(wildcards).val if control_of(wildcards).validate_every else None


def mask_code_of(wildcards):
    return control_of(wildcards).mask_code


def of_set(chosen, kind, *names):
    """An input function: the files of a kind of the set that the function `chosen` names, nothing where it is None; the kind's other names
    are those of the functions `names`."""
    return lambda wildcards: kind(wildcards.dataset, name, *(one(wildcards) for one in names)) if (name := chosen(wildcards)) else []


def pretrained_weights(wildcards):
    """A segmentor's backbone weights: the user's file, or the note of where fetched ones lie; nothing where it names none."""
    weights = segmentor_of(wildcards).pretrained
    return results.weights_note(wildcards.segmentor) if isinstance(weights, Download) else user_file(weights)


def inception_weights():
    """The weights that FID needs: their file, or the note of where they lie; nothing where there is no file, and then no FID."""
    weights = settings.generation.weights if settings.generation.features == "inception" else None
    if isinstance(weights, Download):
        return results.weights_note("inception")
    return weights if weights and Path(weights).is_file() else []


def critic_of_filter(wildcards):
    """The critic, for a filter that needs it."""
    return critic(wildcards) if filter_of(wildcards).NEEDS_CRITIC else []


def losses_of_filter(wildcards):
    """The critic's mean losses on real tiles, for a filter that needs them."""
    one = filter_of(wildcards)
    split = one.split_of_losses or dataset_of(wildcards).train
    return results.class_losses(wildcards.dataset, split) if one.NEEDS_CLASS_LOSSES else []


def clip_of_filter(wildcards):
    """The CLIP-like model, for a filter that needs it."""
    return clip_model(wildcards) if filter_of(wildcards).NEEDS_CLIP else []
