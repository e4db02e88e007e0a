"""What has to fit between the sections of a configuration, and between a configuration and a dataset: one function per check.

A check yields a line per fault: the key, what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from crfm_core.settings.data import PSEUDO, UNLABELLED, Dataset
from crfm_core.settings.layouts import TRAINING
from crfm_core.settings.run import Settings

#: Names in paths of captions, prompts and latents that stand for other tiles than a split's or layouts'.
RESERVED_SETS = {TRAINING, PSEUDO, UNLABELLED}


def faults_between_sections(settings: Settings) -> list[str]:
    """The faults that no section shows alone; checks that follow names run where all names exist."""
    faults = [fault for check in SECTION_CHECKS for fault in check(settings)]
    return faults or [fault for check in CHAIN_CHECKS for fault in check(settings)]


def faults_with_dataset(settings: Settings, dataset: Dataset) -> list[str]:
    """What the settings say that does not fit a dataset."""
    return [fault for check in DATASET_CHECKS for fault in check(settings, dataset)]


def faults_of_compared(settings: Settings, dataset: Dataset, recipes: Collection[str]) -> list[str]:
    """What these recipes, which are built on a dataset, need and it does not have."""
    return [
        f"recipes.{name}.pseudo: {dataset.name} has no unlabelled scenes; name some in its source.unlabelled, or leave {name} out of the "
        f"tables that are built on {dataset.name}"
        for name in recipes
        if settings.recipes[name].pseudo and not dataset.has_unlabelled
    ]


def _chain(settings: Settings, name: str | None) -> Iterator[str]:
    """A filter and those before it, the last one first; endless where they go in a circle."""
    while name in settings.filters:
        yield name
        name = settings.filters[name].after


def _references(settings: Settings) -> Iterator[tuple[str, str | None, Collection[str]]]:
    """Every key that holds the name of something defined elsewhere, with the name and those that are defined."""
    for name, recipe in settings.recipes.items():
        yield f"recipes.{name}.control", recipe.control, settings.controls
        yield f"recipes.{name}.sampler", recipe.sampler, settings.samplers
        yield f"recipes.{name}.filter", recipe.filter, settings.filters
        yield f"recipes.{name}.resample", recipe.resample, settings.resamplings
    for name, sampler in settings.samplers.items():
        yield f"samplers.{name}.layouts", None if sampler.layouts == TRAINING else sampler.layouts, [TRAINING, *settings.layouts]
    for name, filter_ in settings.filters.items():
        yield f"filters.{name}.after", filter_.after, settings.filters
    for name, table in settings.experiments.items():
        for index, recipe_name in enumerate(table.recipes):
            yield f"experiments.{name}.recipes.{index}", recipe_name, settings.recipes
        for index, segmentor in enumerate(table.segmentors):
            yield f"experiments.{name}.segmentors.{index}", segmentor, settings.segmentors
    for index, name in enumerate(settings.tables):
        yield f"tables.{index}", name, settings.experiments
    for key, judge in (("critic", settings.critic), ("judge", settings.judge)):
        yield f"{key}.recipe", judge.recipe, settings.recipes
        yield f"{key}.segmentor", judge.segmentor, settings.segmentors
    if settings.comparison:
        yield "comparison.control", settings.comparison.control, settings.controls


def unknown_names(settings: Settings) -> Iterator[str]:
    for key, name, known in _references(settings):
        if name is not None and name not in known:
            yield f"{key}: unknown name {name!r}; allowed: {', '.join(known) or '(none defined)'}"
    if "none" in settings.filters:
        yield "filters.none: none stands for no filter; give it another name"
    for name in sorted(RESERVED_SETS & set(settings.layouts)):
        yield f"layouts.{name}: {name} stands for other tiles; give the layouts another name"


def guidance_needs_caption_dropout(settings: Settings) -> Iterator[str]:
    for name, sampler in settings.samplers.items():
        used_with = {recipe.control for recipe in settings.recipes.values() if recipe.sampler == name and recipe.control}
        for control in sorted(used_with & set(settings.controls)) if sampler.guidance_scale > 1 else ():
            if not settings.controls[control].caption_dropout:
                yield f"samplers.{name}.guidance_scale: needs caption_dropout in controls.{control}; set it, or 1"


def mask_guidance_needs_missing_masks(settings: Settings) -> Iterator[str]:
    for name, sampler in settings.samplers.items():
        used_with = {recipe.control for recipe in settings.recipes.values() if recipe.sampler == name and recipe.control}
        for control in sorted(used_with & set(settings.controls)) if sampler.mask_guidance_scale > 1 else ():
            if not settings.controls[control].knows_missing_masks:
                yield (
                    f"samplers.{name}.mask_guidance_scale: controls.{control} never sees a missing mask; set its mask_dropout, or "
                    "unlabelled_share with unlabelled_masks: none, or 1 here"
                )


def filters_need_the_section_clip(settings: Settings) -> Iterator[str]:
    for name, filter_ in settings.filters.items() if not settings.clip else ():
        if filter_.NEEDS_CLIP:
            yield f"filters.{name}.kind: {filter_.kind} needs the section clip; give path of a CLIP-like model, or repo and revision"


def generation_needs_the_section_clip(settings: Settings) -> Iterator[str]:
    if (settings.generation.cmmd or settings.generation.features == "clip") and not settings.clip:
        yield "generation: needs the section clip; give path of a CLIP-like model, or repo and revision"


def filters_in_a_circle(settings: Settings) -> Iterator[str]:
    for name in settings.filters:
        passed: list[str] = []
        for one in _chain(settings, name):
            passed.append(one)
            if one in passed[:-1]:
                yield f"filters.{name}.after: goes in a circle: {' after '.join(passed)}"
                break


def judges_train_on_real_tiles(settings: Settings) -> Iterator[str]:
    for key, judge in (("critic", settings.critic), ("judge", settings.judge)):
        if judge.recipe in settings.recipes and settings.recipes[judge.recipe].control:
            yield f"{key}.recipe: must train on real tiles only; {judge.recipe!r} has synthetic ones"
        if judge.recipe in settings.recipes and settings.recipes[judge.recipe].pseudo:
            yield f"{key}.recipe: must train on real labels only; {judge.recipe!r} has labels that the critic makes; name another recipe"


def judge_is_not_the_critic(settings: Settings) -> Iterator[str]:
    if settings.critic == settings.judge:
        yield "judge: is the critic itself; name another recipe, segmentor or seed, or its verdict is no evidence"


def rare_resampling_needs_a_pixel_filter(settings: Settings) -> Iterator[str]:
    for name, recipe in settings.recipes.items():
        resampling = settings.resamplings[recipe.resample] if recipe.resample else None
        if not resampling or not resampling.NEEDS_PIXEL_FILTER:
            continue
        if all(settings.filters[one].DROPS_IMAGES for one in _chain(settings, recipe.filter)):
            yield f"recipes.{name}.filter: re-sampling of kind {resampling.kind} needs a filter of kind pixel before it; name one"


def warmup_is_shorter_than_training(settings: Settings) -> Iterator[str]:
    trained = [(recipe, name) for table in settings.experiments.values() for recipe in table.recipes for name in table.segmentors]
    trained += [(judge.recipe, judge.segmentor) for judge in (settings.critic, settings.judge) if judge.recipe and judge.segmentor]
    for recipe, name in dict.fromkeys(trained):
        iterations = settings.iterations(recipe, name)
        if (warmup := settings.segmentors[name].warmup) >= iterations:
            yield f"segmentors.{name}.warmup: {warmup} leaves nothing of the {iterations} iterations on {recipe}; shorten it"


SECTION_CHECKS = (
    unknown_names, guidance_needs_caption_dropout, mask_guidance_needs_missing_masks, filters_need_the_section_clip,
    generation_needs_the_section_clip, filters_in_a_circle, judges_train_on_real_tiles, judge_is_not_the_critic,
)  # fmt: skip
CHAIN_CHECKS = (rare_resampling_needs_a_pixel_filter, warmup_is_shorter_than_training)


def splits_that_train(settings: Settings, dataset: Dataset) -> Iterator[str]:
    named: dict[str, str | None] = {f"recipes.{name}.split": recipe.split or dataset.train for name, recipe in settings.recipes.items()}
    named |= {f"filters.{name}.statistics_split": one.split_of_losses for name, one in settings.filters.items()}
    for key, split in named.items():
        if split is None:
            continue
        if split not in dataset.splits:
            yield f"{key}: {dataset.name} has no split {split!r}; allowed: {', '.join(dataset.splits)}"
        if split == dataset.test:
            yield f"{key}: {split!r} is the test split of {dataset.name}; nothing may train on it"
        if split == dataset.held_out:
            yield f"{key}: {split!r} is the held-out split of {dataset.name}; nothing may train on it"


def split_compared_with(settings: Settings, dataset: Dataset) -> Iterator[str]:
    if (split := settings.generation.split) not in (None, *dataset.splits):
        yield f"generation.split: {dataset.name} has no split {split!r}; allowed: {', '.join(dataset.splits)}"


def windows_without_gaps(settings: Settings, dataset: Dataset) -> Iterator[str]:
    stride, window = settings.evaluation.stride, settings.evaluation.window or dataset.tile.size
    if stride and stride > window:
        yield f"evaluation.stride: {stride} with windows of {dataset.name}'s tile size, {dataset.tile.size}, leaves gaps"


def classes_of_resamplings(settings: Settings, dataset: Dataset) -> Iterator[str]:
    for name, resampling in settings.resamplings.items():
        for unknown in [one for one in resampling.named_classes if one not in dataset.classes][:1]:
            yield f"resamplings.{name}.classes: {dataset.name} has no class {unknown!r}; allowed: {', '.join(dataset.classes)}"


def splits_are_no_sets_of_unlabelled_tiles(settings: Settings, dataset: Dataset) -> Iterator[str]:
    if PSEUDO in dataset.splits:
        yield f"split: {dataset.name} has a split {PSEUDO!r}, which is the name of unlabelled tiles with the critic's labels; rename it"


def layouts_fit_the_dataset(settings: Settings, dataset: Dataset) -> Iterator[str]:
    for name, layouts in settings.layouts.items():
        if name in dataset.splits:
            yield f"layouts.{name}: is the name of a split of {dataset.name}; give the layouts another name"
        for unknown in [one for one in layouts.named_classes if one not in dataset.classes][:1]:
            yield f"layouts.{name}.shares: {dataset.name} has no class {unknown!r}; allowed: {', '.join(dataset.classes)}"


def predicted_layouts_need_unlabelled_tiles(settings: Settings, dataset: Dataset) -> Iterator[str]:
    for name in dict.fromkeys(recipe.sampler for recipe in settings.recipes.values() if recipe.sampler):
        layouts = settings.layouts.get(settings.samplers[name].layouts)
        if layouts and layouts.NEEDS_UNLABELLED and not dataset.has_unlabelled:
            yield (
                f"samplers.{name}.layouts: of kind {layouts.kind}, and {dataset.name} has no unlabelled scenes; name some in its source, "
                "or draw other layouts"
            )


def weights_per_class(settings: Settings, dataset: Dataset) -> Iterator[str]:
    for name, segmentor in settings.segmentors.items():
        if isinstance(weights := segmentor.class_weights, list) and len(weights) != len(dataset.classes):
            yield (
                f"segmentors.{name}.class_weights: {len(weights)} numbers for the {len(dataset.classes)} classes of {dataset.name}; "
                "give one per class"
            )


def unlabelled_share_needs_unlabelled_scenes(settings: Settings, dataset: Dataset) -> Iterator[str]:
    for name, control in settings.controls.items():
        if control.unlabelled_share and not dataset.has_unlabelled:
            yield (
                f"controls.{name}.unlabelled_share: {dataset.name} has no unlabelled scenes; name them in its source.unlabelled, or set 0"
            )


DATASET_CHECKS = (
    splits_that_train, splits_are_no_sets_of_unlabelled_tiles, unlabelled_share_needs_unlabelled_scenes, windows_without_gaps,
    split_compared_with, classes_of_resamplings, layouts_fit_the_dataset, predicted_layouts_need_unlabelled_tiles, weights_per_class,
)  # fmt: skip
