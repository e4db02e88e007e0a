"""What is compared and measured for the report."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Location, Name, Positive, Section
from crfm_core.settings.segmentor import Download


class Table(Section):
    """Recipes that are compared."""

    title: str = Field(description="the question that the table answers")
    recipes: list[Name] = Field(min_length=1, description="recipes that are compared")
    segmentors: list[Name] = Field(min_length=1, description="each is trained on every recipe")
    datasets: list[Name] | None = Field(
        None,
        min_length=1,
        description="names of datasets (few_shot: parts of one), also others than those of the run; null: those of the run",
    )
    baseline: Name | None = Field(None, description="recipe the differences refer to, for each dataset and segmentor")
    generation: bool = Field(False, description="also how the recipes' samples compare with real tiles: Fréchet distance, agreement")
    paper: Name | None = Field(None, description="table of configs/paper_results.yaml shown beside")

    @model_validator(mode="after")
    def _baseline_listed(self) -> Table:
        if self.baseline is not None and self.baseline not in self.recipes:
            raise ValueError(f"baseline: {self.baseline!r} is not among the recipes; allowed: {', '.join(self.recipes)}")
        return self


class Generation(Section):
    """How samples are compared with real tiles: distance of their distributions, copies of training tiles, diversity."""

    PERFORMANCE_KEYS = frozenset({"batch_size"})

    features: Literal["inception", "clip", "judge"] = Field(
        "judge", description="what distances are measured in: inception (FID, KID), clip, or the judge's deepest features (small scale)"
    )
    weights: Location | Download | None = Field(
        None, description="inception: file of its weights (pt_inception, converted from TensorFlow), or url and sha256; missing: no FID"
    )
    cmmd: bool = Field(False, description="also the maximum mean discrepancy of CLIP embeddings (CMMD); needs the section clip")
    split: Name | None = Field(None, description="real tiles that samples are compared with; null: those trained on")
    subset: Positive = Field(100, description="KID: tiles per subset")
    batch_size: Positive = Field(16, description="images whose features are computed together")
