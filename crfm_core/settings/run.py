"""The whole configuration of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Location, Name, Positive, Section
from crfm_core.settings.curation import AnyFilter, AnyResampling, PseudoLabels, Recipe
from crfm_core.settings.generator import AnyBase, Control
from crfm_core.settings.layouts import AnyLayouts
from crfm_core.settings.report import Generation, Table
from crfm_core.settings.sampling import Comparison, Sampler
from crfm_core.settings.segmentor import Evaluation, Judge, Segmentor
from crfm_core.settings.text import Captions, Model


class Settings(Section):
    """The whole configuration of one run; :func:`crfm_core.settings.load_settings` also checks that its sections fit together."""

    scale: str = Field(pattern=r"^[^=+@{}-][^{}]*$", description="what the report calls this size of experiment")
    results: Location = Field("results", min_length=1, description="folder of everything that is made")
    device: Literal["cpu", "cuda"] = Field("cpu", description="where models run; cuda is refused on a machine without a GPU")
    seed: int = Field(0, description="global seed of the synthetic samples' noise")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds each segmentor is trained with")
    disk_gb: float = Field(1.0, gt=0, description="refuse to start with less free disk than this")
    shards: Positive = Field(description="jobs that share the synthesis of one sampler")
    datasets: list[str] = Field(min_length=1, description="names of configs/datasets/NAME.yaml, or paths of such files")
    base_model: AnyBase = Field(description="the pre-trained model that the generator starts from")
    captions: Captions = Field(Captions(), description="text that goes with a tile")
    controls: dict[Name, Control] = Field(description="generators by name: how the mask steers each, and how it is trained")
    layouts: dict[Name, AnyLayouts] = Field({}, description="new masks to draw images for, by name; samplers name them")
    samplers: dict[Name, Sampler] = Field(description="ways to draw images, by name")
    segmentors: dict[Name, Segmentor] = Field(description="segmentation models, by name")
    filters: dict[Name, AnyFilter] = Field({}, description="what is left out of the synthetic tiles, by name")
    resamplings: dict[Name, AnyResampling] = Field({}, description="which synthetic tiles are used how often, by name")
    clip: Model | None = Field(
        None, description="CLIP-like model of transformers, for filters of kind clip and generation.cmmd; null: none"
    )
    pseudo_labels: PseudoLabels = Field(PseudoLabels(), description="labels of unlabelled tiles, by the critic")
    recipes: dict[Name, Recipe] = Field(description="what segmentors are trained on, by name")
    critic: Judge = Field(description="the segmentor that guides the sampling and filters pixels")
    judge: Judge = Field(description="an independent segmentor that says whether samples agree with their masks")
    comparison: Comparison | None = Field(None, description="forms of the correction to compare in the report; null: none")
    evaluation: Evaluation = Field(Evaluation(), description="how a trained segmentor predicts tiles and scenes")
    generation: Generation = Field(Generation(), description="how samples are compared with real tiles")
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

    @property
    def longest_schedule(self) -> float:
        """What the schedule ``longest`` stands for: that of the longest recipe of all tables, built or not."""
        schedules = [self.recipes[name].schedule for table in self.experiments.values() for name in table.recipes]
        return max([1.0, *(schedule for schedule in schedules if schedule != "longest")])

    def iterations(self, recipe: str, segmentor: str) -> int:
        """Training iterations of a segmentor on a recipe."""
        schedule = self.recipes[recipe].schedule
        return round(self.segmentors[segmentor].iterations * (self.longest_schedule if schedule == "longest" else schedule))
