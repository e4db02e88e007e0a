"""What follows from a configuration: the tables, runs and recipes that are built, and the results that each is made from."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from crfm_core import ConfigError
from crfm_core.layout import Layout
from crfm_core.settings import PLAIN, TRAINING, UNLABELLED, Dataset, Download, HubBase, Judge, Model, Settings, Table
from crfm_core.settings.checks import faults_of_compared

#: Stands in paths for tiles that pass no filter.
NO_FILTER = "none"


def selected_tables(settings: Settings) -> dict[str, Table]:
    """The tables that are built, by name."""
    return {name: settings.experiments[name] for name in dict.fromkeys(settings.tables)}


def copies(settings: Settings, control: str, sampler: str) -> int:
    """Synthetic tiles per real one: as many as the most demanding recipe of the selected tables takes; for samples that none of those
    uses as the most demanding recipe of all does, or 1."""
    compared = {name for table in selected_tables(settings).values() for name in table.recipes}
    takes = {name: r.synthetic_per_real for name, r in settings.recipes.items() if (r.control, r.sampler) == (control, sampler)}
    return max([takes[name] for name in takes if name in compared] or takes.values(), default=1)


def layout_copies(settings: Settings, layouts: str) -> int:
    """How many times as many new layouts as training tiles there are: enough for every sampler that draws images for them."""
    pairs = {one.samples for one in settings.recipes.values() if one.samples}
    return max([1, *(copies(settings, *pair) for pair in pairs if settings.samplers[pair[1]].layouts == layouts)])


def filter_chain(settings: Settings, name: str | None) -> list[str]:
    """The filters that tiles pass when ``name`` is the last of them, in their order; none for None."""
    return [] if name is None else [*filter_chain(settings, settings.filters[name].after), name]


def keeps_every_image(settings: Settings, recipe: str) -> bool:
    """Whether nothing before the mix leaves out whole images, so that the recipe gets as many as it names."""
    one = settings.recipes[recipe]
    return not one.resample and not any(settings.filters[name].DROPS_IMAGES for name in filter_chain(settings, one.filter))


def hub_models(settings: Settings) -> dict[str, HubBase | Model]:
    """Models to fetch from the hub, by the name of their note."""
    models = {"base_model": settings.base_model, "caption_model": settings.captions.model, "clip_model": settings.clip}
    return {name: one for name, one in models.items() if isinstance(one, HubBase | Model) and one.repo}


def downloads(settings: Settings) -> dict[str, Download]:
    """Files of weights to download, by the name of their note: a segmentor's, or ``inception``."""
    found = {name: one.pretrained for name, one in settings.segmentors.items() if isinstance(one.pretrained, Download)}
    if isinstance(settings.generation.weights, Download):
        if "inception" in found:
            raise ConfigError("segmentors.inception: its weights and generation.weights would share one note; give it another name")
        found["inception"] = settings.generation.weights
    return found


class Experiment:
    """A configuration and its datasets by name: first those of the run, then those that only tables name."""

    def __init__(self, settings: Settings, datasets: dict[str, Dataset]) -> None:
        self.settings, self.datasets, self.results = settings, datasets, Layout(settings.results)
        self.own = list(datasets)[: len(settings.datasets)]
        self.tables = selected_tables(settings)
        self.published = [name for name, dataset in datasets.items() if dataset.source.CAN_DOWNLOAD]
        self.with_server = [name for name, dataset in datasets.items() if dataset.source.HAS_SERVER]

    def datasets_of(self, table: Table) -> list[str]:
        """The datasets a table compares on."""
        return table.datasets or self.own

    def runs(self, tables: Collection[Table] | None = None) -> list[tuple[str, str, str]]:
        """(dataset, recipe, segmentor) that the tables compare, each once; None: the selected tables."""
        tables = self.tables.values() if tables is None else tables
        return _once((d, r, s) for table in tables for d in self.datasets_of(table) for r in table.recipes for s in table.segmentors)

    @property
    def used_datasets(self) -> list[str]:
        """The datasets of the selected tables."""
        return _once(dataset for dataset, _, _ in self.runs())

    def used_recipes(self, dataset: str) -> list[str]:
        """Names of the recipes that the selected tables compare on a dataset."""
        return _once(recipe for name, recipe, _ in self.runs() if name == dataset)

    def pairs(self, recipes: Iterable[str]) -> list[tuple[str, str]]:
        """(control, sampler) of recipes with synthetic tiles."""
        used = [self.settings.recipes[name] for name in recipes]
        return _once((recipe.control, recipe.sampler) for recipe in used if recipe.control)

    def used_pairs(self, dataset: str) -> list[tuple[str, str]]:
        """(control, sampler) of the recipes that the selected tables compare on a dataset."""
        return self.pairs(self.used_recipes(dataset))

    def draws_new_layouts(self, sampler: str) -> bool:
        """Whether a sampler draws images for other masks than the training tiles'."""
        return self.settings.samplers[sampler].layouts != TRAINING

    def masks_of(self, dataset: str, sampler: str) -> str:
        """The set of captions and prompts that a sampler draws images for: the train split, or the name of new layouts."""
        return self.settings.samplers[sampler].layouts if self.draws_new_layouts(sampler) else self.datasets[dataset].train

    def manifest_of_masks(self, dataset: str, sampler: str) -> str:
        """The manifest of the masks that a sampler draws images for, with their pixels before any filter."""
        kind = self.results.layouts if self.draws_new_layouts(sampler) else self.results.tiles
        return kind(dataset, self.masks_of(dataset, sampler))

    def used_controls(self, dataset: str) -> list[str]:
        """The control schemes of those recipes."""
        return _once(control for control, _ in self.used_pairs(dataset))

    def used_filters(self, dataset: str) -> list[tuple[str, str, str]]:
        """(control, sampler, filter) of those recipes, with the filters that go before."""
        used = [self.settings.recipes[name] for name in self.used_recipes(dataset)]
        return _once((r.control, r.sampler, name) for r in used for name in filter_chain(self.settings, r.filter))

    def used_resamplings(self, dataset: str) -> list[tuple[str, str, str, str]]:
        """(control, sampler, filter, re-sampling) of those recipes."""
        used = [self.settings.recipes[name] for name in self.used_recipes(dataset)]
        return _once((r.control, r.sampler, r.filter or NO_FILTER, r.resample) for r in used if r.resample)

    def used_splits(self, dataset: str) -> list[str]:
        """The splits that anything trains on, is chosen by, is compared with or is scored on, the unlabelled one last."""
        one, settings = self.datasets[dataset], self.settings
        named = [recipe.split for recipe in settings.recipes.values()] + [one.split_of_losses for one in settings.filters.values()]
        unlabelled = UNLABELLED if self.uses_unlabelled(dataset) else None
        return _once(filter(None, [one.train, one.test, one.val, one.held_out, *named, settings.generation.split, unlabelled]))

    def uses_unlabelled(self, dataset: str) -> bool:
        """Whether the configuration has something that reads unlabelled tiles: recipes with pseudo-labels, generators that train on them,
        layouts that are predicted for them."""
        settings = self.settings
        return self.datasets[dataset].has_unlabelled and (
            any(recipe.pseudo for recipe in settings.recipes.values())
            or any(control.unlabelled_share > 0 for control in settings.controls.values())
            or any(layouts.NEEDS_UNLABELLED for layouts in settings.layouts.values())
        )

    def checkpoint_of(self, judge: Judge, dataset: str) -> str:
        """The configured critic or judge: the user's checkpoint or folder, or the checkpoint of the one that is trained."""
        return judge.path or self.results.checkpoint(dataset, judge.recipe, judge.segmentor, judge.seed)

    def filtered(self, dataset: str, control: str, sampler: str, name: str | None) -> str:
        """The manifest that a filter leaves; without one that of all synthetic tiles."""
        if name is None or name == NO_FILTER:
            return self.results.synthetic(dataset, control, sampler)
        return self.results.filtered(dataset, control, sampler, name)

    def samples(self, dataset: str, name: str) -> str | None:
        """The synthetic manifest that a recipe mixes in: what filter and re-sampling leave; None for recipes of real tiles alone.

        Raises ConfigError when the recipe takes more copies than the selected tables need.
        """
        recipe = self.settings.recipes[name]
        if recipe.control is None or recipe.sampler is None:
            return None
        if recipe.synthetic_per_real > (made := copies(self.settings, recipe.control, recipe.sampler)):
            raise ConfigError(
                f"recipes.{name}.synthetic_per_real: {recipe.synthetic_per_real}, and the tables that are built need only {made} per real "
                f"tile of {recipe.control}, {recipe.sampler}; name a table with this recipe in `tables` (or --config tables=all)"
            )
        if recipe.resample:
            return self.results.resampled(dataset, recipe.control, recipe.sampler, recipe.filter or NO_FILTER, recipe.resample)
        return self.filtered(dataset, recipe.control, recipe.sampler, recipe.filter)

    def pseudo_labels(self, dataset: str, name: str) -> str | None:
        """The critic's labels of unlabelled tiles that a recipe mixes in; None for recipes without.

        Raises ConfigError when the dataset has no unlabelled scenes.
        """
        if not self.settings.recipes[name].pseudo:
            return None
        if faults := faults_of_compared(self.settings, self.datasets[dataset], [name]):
            raise ConfigError(faults[0])
        return self.results.pseudo_labels(dataset)

    def uses_pseudo_labels(self, dataset: str) -> bool:
        """Whether what the selected tables compare on a dataset needs the critic's labels of unlabelled tiles."""
        settings = self.settings
        controls = [settings.controls[name] for name in self.used_controls(dataset)]
        layouts = [settings.layouts.get(settings.samplers[sampler].layouts) for _, sampler in self.used_pairs(dataset)]
        return (
            any(settings.recipes[name].pseudo for name in self.used_recipes(dataset))
            or any(one.unlabelled_share and one.unlabelled_masks == "predicted" for one in controls)
            or any(one.NEEDS_UNLABELLED for one in layouts if one)
        )

    def needs_critic(self, name: str) -> bool:
        """Whether a recipe's tiles rest on the critic: it labels them, steers their sampling or filters them, or labels what their
        generator or their layouts are made from."""
        settings, recipe = self.settings, self.settings.recipes[name]
        if recipe.pseudo or recipe.control is None or recipe.sampler is None:
            return recipe.pseudo
        control, sampler = settings.controls[recipe.control], settings.samplers[recipe.sampler]
        layouts = settings.layouts.get(sampler.layouts)
        filters = [settings.filters[one] for one in filter_chain(settings, recipe.filter)]
        labels = control.unlabelled_masks == "predicted" or (layouts is not None and layouts.NEEDS_UNLABELLED)
        return labels or sampler.rectify is not None or any(one.NEEDS_CRITIC for one in filters)

    def scores(self, table: Table) -> list[str]:
        """The scores that a table is made from."""
        return [self.results.scores(*run, seed) for run in self.runs([table]) for seed in self.settings.seeds]

    def mixes(self, table: Table) -> list[str]:
        """What the recipes of a table train on."""
        return _once(self.results.mix(dataset, recipe) for dataset, recipe, _ in self.runs([table]))

    def generation(self, table: Table) -> list[str]:
        """How the samples of a table's recipes compare with real tiles and agree with their masks, for tables that show it."""
        if not table.generation:
            return []
        pairs, kinds = self.pairs(table.recipes), (self.results.generation, self.results.agreement)
        return [kind(dataset, *pair) for kind in kinds for dataset in self.datasets_of(table) for pair in pairs]

    def stage_files(self) -> list[str]:
        """What every stage hands over. A run asks for all of it, because an input that is gone but not asked for is not made again."""
        results, files, count = self.results, [], self.settings.shards
        for name in self.used_datasets:
            files += [results.scenes(name), results.captions(name, self.datasets[name].train)]
            files += [results.pseudo_labels(name)] if self.uses_pseudo_labels(name) else []
            files += [results.generator(name, control) for control in self.used_controls(name)]
            for pair in self.used_pairs(name):
                files += [self.manifest_of_masks(name, pair[1])] if self.draws_new_layouts(pair[1]) else []
                files += [results.shard(name, *pair, shard, count) for shard in range(1, count + 1)] + [results.synthetic(name, *pair)]
            files += [results.mix(name, recipe) for recipe in self.used_recipes(name)]
        return files + [results.checkpoint(*run, seed) for run in self.runs() for seed in self.settings.seeds]

    def report_files(self, name: str) -> dict[str, dict]:
        """The results of a dataset that the report shows, by kind, and within a kind by recipe, control, (control, sampler) and so on."""
        results, train, pairs = self.results, self.datasets[name].train, self.used_pairs(name)
        held_out, comparison = self.datasets[name].held_out_split, self.settings.comparison
        presets = [PLAIN, *comparison.presets] if comparison and held_out and name in self.own else []
        controls = self.used_controls(name) if held_out else []
        return {
            "tiles": {train: results.captions(name, train)},
            "data_sheet": {name: results.data_sheet(name)},
            "synthetic": {pair: results.synthetic(name, *pair) for pair in pairs},
            "filtered": {one: results.filtered(name, *one) for one in self.used_filters(name)},
            "resampled": {one: results.resampled(name, *one) for one in self.used_resamplings(name)},
            "pseudo_labels": {name: results.pseudo_labels(name)} if self.uses_pseudo_labels(name) else {},
            "mixes": {recipe: results.mix(name, recipe) for recipe in self.used_recipes(name)},
            "agreement": {pair: results.agreement(name, *pair) for pair in pairs},
            "generation": {pair: results.generation(name, *pair) for pair in pairs},
            "reconstruction": {name: results.reconstruction(name)},
            "validation": {control: results.validation(name, control, "final") for control in controls},
            "comparison": {preset: results.comparison(name, preset) for preset in presets},
        }


def _once(values: Iterable) -> list:
    """Each value once, in the order of its first occurrence."""
    return list(dict.fromkeys(values))
