"""The whole configuration of a run, and what has to fit between its sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Location, Name, Positive, Section
from crfm_core.settings.curation import Filter, Recipe, Resampling
from crfm_core.settings.generator import Control, EmbeddedBase, FolderBase, HubBase
from crfm_core.settings.report import Generation, Table
from crfm_core.settings.sampling import Comparison, Sampler
from crfm_core.settings.segmentor import Evaluation, Judge, Segmentor
from crfm_core.settings.text import Captions, Model


class Settings(Section):
    """The whole configuration of one run."""

    scale: str = Field(pattern=r"^[^=+@{}-][^{}]*$", description="what the report calls this size of experiment")
    results: Location = Field("results", min_length=1, description="folder of everything that is made")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where models run; cuda is refused on a machine without a GPU")
    seed: int = Field(0, description="global seed of the synthetic samples' noise")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds each segmentor is trained with")
    disk_gb: float = Field(1.0, gt=0, description="refuse to start with less free disk than this")
    shards: Positive = Field(description="jobs that share the synthesis of one sampler")
    datasets: list[str] = Field(min_length=1, description="names of configs/datasets/NAME.yaml, or paths of such files")
    base_model: EmbeddedBase | FolderBase | HubBase = Field(discriminator="kind")
    captions: Captions = Captions()
    controls: dict[Name, Control]
    samplers: dict[Name, Sampler]
    segmentors: dict[Name, Segmentor]
    filters: dict[Name, Filter] = {}
    resamplings: dict[Name, Resampling] = {}
    clip: Model | None = Field(
        None, description="CLIP-like model of transformers, for filters of kind clip and generation.cmmd; null: none"
    )
    recipes: dict[Name, Recipe]
    critic: Judge = Field(description="the segmentor that guides the sampling and filters pixels")
    judge: Judge = Field(description="an independent segmentor that says whether samples agree with their masks")
    comparison: Comparison | None = Field(None, description="forms of the correction to compare in the report; null: none")
    evaluation: Evaluation = Evaluation()
    generation: Generation = Generation()
    experiments: dict[Name, Table] = Field(min_length=1, description="the tables that can be built, by name")
    tables: list[Name] = Field(min_length=1, description="those that are built and reported; all: every one")

    @model_validator(mode="before")
    @classmethod
    def _all_tables(cls, data: Any) -> Any:
        """``tables`` as a list: from a name, several with commas between them, or all."""
        if isinstance(data, dict) and isinstance(data.get("tables"), str):
            known, said = data.get("experiments"), data["tables"].strip()
            names = list(known) if said == "all" and isinstance(known, dict) else [name.strip() for name in said.split(",")]
            return data | {"tables": names}
        return data

    @model_validator(mode="after")
    def _names_exist(self) -> Settings:
        problems = []

        def known(key: str, name: str | None, among: dict) -> None:
            if name is not None and name not in among:
                problems.append(f"{key}: unknown name {name!r}; allowed: {', '.join(among) or '(none defined)'}")

        for name, recipe in self.recipes.items():
            known(f"recipes.{name}.control", recipe.control, self.controls)
            known(f"recipes.{name}.sampler", recipe.sampler, self.samplers)
            known(f"recipes.{name}.filter", recipe.filter, self.filters)
            known(f"recipes.{name}.resample", recipe.resample, self.resamplings)
        for name, sampler in self.samplers.items():
            for control in {r.control for r in self.recipes.values() if r.sampler == name and r.control in self.controls}:
                if sampler.guidance_scale > 1 and not self.controls[control].caption_dropout:
                    problems.append(f"samplers.{name}.guidance_scale: needs caption_dropout in controls.{control}; set it, or 1")
        for name, filter_ in self.filters.items():
            known(f"filters.{name}.after", filter_.after, self.filters)
            if filter_.kind == "clip" and not self.clip:
                problems.append(f"filters.{name}.kind: clip needs the section clip; give path of a CLIP-like model, or repo and revision")
            seen = [name]
            while (before := self.filters[seen[-1]].after) in self.filters:
                if before in seen:
                    problems.append(f"filters.{name}.after: goes in a circle: {' after '.join([*seen, before])}")
                    break
                seen.append(before)
        for name, recipe in self.recipes.items() if not problems else ():  # filters that go in a circle have no chain
            rare = recipe.resample is not None and self.resamplings[recipe.resample].kind == "rare"
            if rare and all(self.filters[one].kind != "pixel" for one in self.filters_of(recipe.filter)):
                problems.append(f"recipes.{name}.filter: re-sampling of kind rare asks what survived a filter of kind pixel; name one")
        if (self.generation.cmmd or self.generation.features == "clip") and not self.clip:
            problems.append("generation: needs the section clip; give path of a CLIP-like model, or repo and revision")
        for name, table in self.experiments.items():
            for index, recipe in enumerate(table.recipes):
                known(f"experiments.{name}.recipes.{index}", recipe, self.recipes)
            for index, segmentor in enumerate(table.segmentors):
                known(f"experiments.{name}.segmentors.{index}", segmentor, self.segmentors)
        for index, name in enumerate(self.tables):
            known(f"tables.{index}", name, self.experiments)
        if "none" in self.filters:
            problems.append("filters.none: none stands for no filter; give it another name")
        for key in ("critic", "judge"):
            known(f"{key}.recipe", getattr(self, key).recipe, self.recipes)
            known(f"{key}.segmentor", getattr(self, key).segmentor, self.segmentors)
            recipe = self.recipes.get(getattr(self, key).recipe or "")
            if recipe and recipe.control:
                problems.append(f"{key}.recipe: must train on real tiles only; {getattr(self, key).recipe!r} has synthetic ones")
        if self.comparison:
            known("comparison.control", self.comparison.control, self.controls)
        if self.critic == self.judge:
            problems.append("judge: is the critic itself; name another recipe, segmentor or seed, or its verdict is no evidence")
        compared = [(r, s) for table in self.experiments.values() for r in table.recipes for s in table.segmentors]
        compared += [(judge.recipe, judge.segmentor) for judge in (self.critic, self.judge) if judge.recipe]
        for recipe, name in dict.fromkeys(compared) if not problems else ():
            if (warmup := self.segmentors[name].warmup) >= (iterations := self.iterations(recipe, name)):
                problems.append(f"segmentors.{name}.warmup: {warmup} leaves nothing of the {iterations} iterations on {recipe}; shorten it")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def selected(self) -> dict[str, Table]:
        """The tables that are built, by name."""
        return {name: self.experiments[name] for name in dict.fromkeys(self.tables)}

    def iterations(self, recipe: str, segmentor: str) -> int:
        """Training iterations of a segmentor on a recipe; ``longest`` follows the longest recipe of all tables, built or not."""
        schedule = self.recipes[recipe].schedule
        if schedule == "longest":
            compared = {name for table in self.experiments.values() for name in table.recipes}
            schedule = max([1.0, *(s for name in compared if (s := self.recipes[name].schedule) != "longest")])
        return round(self.segmentors[segmentor].iterations * schedule)

    def copies(self, control: str, sampler: str) -> int:
        """Synthetic tiles made per real one: as many as the most demanding recipe of the tables that are built takes; for samples that
        none of those uses, as the most demanding recipe of all does, or 1."""
        compared = {name for table in self.selected.values() for name in table.recipes}
        takes = {name: r.synthetic_per_real for name, r in self.recipes.items() if (r.control, r.sampler) == (control, sampler)}
        return max([takes[name] for name in takes if name in compared] or takes.values(), default=1)

    def filters_of(self, name: str | None) -> list[str]:
        """The filters that tiles go through when ``name`` is the last of them, in their order; none for None."""
        chain: list[str] = []
        while name is not None:
            chain.insert(0, name)
            name = self.filters[name].after
        return chain
