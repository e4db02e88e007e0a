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
        chains: dict[str | None, list[str]] = {}
        for name, filter_ in self.filters.items():
            known(f"filters.{name}.after", filter_.after, self.filters)
            if filter_.kind == "clip" and not self.clip:
                problems.append(f"filters.{name}.kind: clip needs the section clip; give path of a CLIP-like model, or repo and revision")
            chain = chains[name] = [name]
            while (before := self.filters[chain[-1]].after) in self.filters:
                if before in chain:
                    problems.append(f"filters.{name}.after: goes in a circle: {' after '.join([*chain, before])}")
                    break
                chain.append(before)
        for name, recipe in self.recipes.items() if not problems else ():
            rare = recipe.resample is not None and self.resamplings[recipe.resample].kind == "rare"
            if rare and all(self.filters[one].kind != "pixel" for one in chains.get(recipe.filter, [])):
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
            schedule = self.recipes[recipe].schedule
            iterations = round(self.segmentors[name].iterations * (self.longest_schedule if schedule == "longest" else schedule))
            if (warmup := self.segmentors[name].warmup) >= iterations:
                problems.append(f"segmentors.{name}.warmup: {warmup} leaves nothing of the {iterations} iterations on {recipe}; shorten it")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def longest_schedule(self) -> float:
        """What the schedule ``longest`` stands for: that of the longest recipe of all tables, built or not."""
        schedules = [self.recipes[name].schedule for table in self.experiments.values() for name in table.recipes]
        return max([1.0, *(schedule for schedule in schedules if schedule != "longest")])
