"""What segmentors are trained on: filters and re-samplings of synthetic tiles, and recipes that mix them with real ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Name, Positive, Section

#: FreeMask's: a pixel is dropped whose loss exceeds so many times its class's mean.
MARGIN = 1.25


class Filter(Section):
    """Which synthetic pixels or images are left out."""

    kind: Literal["pixel", "agreement", "clip"] = Field(
        "pixel", description="pixel (those the critic finds too hard are ignored, FreeMask) | agreement (images, by the critic's mIoU with "
        "their mask) | clip (images, by the score of image and caption)"
    )  # fmt: skip
    after: Name | None = Field(None, description="filter that is applied before; null: none")
    margin: float | None = Field(None, gt=0, description="pixel: dropped above margin x its class's mean loss on real tiles; null: 1.25")
    statistics_split: Name | None = Field(
        None, description="pixel: real tiles of the mean losses, e.g. held-out ones; null: those trained on"
    )
    keep: float | None = Field(None, gt=0, le=1, description="agreement, clip: share of the images that is kept, the best")

    @model_validator(mode="after")
    def _consistent(self) -> Filter:
        of_pixels = self.kind == "pixel"
        for key in ("margin", "statistics_split"):
            if getattr(self, key) is not None and not of_pixels:
                raise ValueError(f"{key}: is of kind pixel, and this filter is of kind {self.kind}")
        if (self.keep is None) != of_pixels:
            raise ValueError(
                f"keep: kind {self.kind} {'drops pixels, not images; leave it out' if of_pixels else 'needs the share to keep'}"
            )
        return self


class Resampling(Section):
    """Which of the synthetic images are used how often for lack of others like them."""

    kind: Literal["hardness", "rare"] = Field(
        description="hardness (more versions of masks whose classes the critic finds hard, FreeMask) | rare (images that show a poorly "
        "segmented class, or of which most survived the pixel filter, TISynth)"
    )
    worst: Positive = Field(2, description="rare: so many classes with the highest mean loss on real tiles count as poorly segmented")
    classes: list[str] | None = Field(None, description="rare: these instead")
    min_pixels: Positive = Field(100, description="rare: an image is kept if it shows so many pixels of such a class after filtering")
    survival: float = Field(0.8, ge=0, lt=1, description="rare: or if more than this share of its labelled pixels survived filtering")
    seed: int = Field(0, description="hardness: draws which versions are kept")


class Recipe(Section):
    """What a segmentor is trained on."""

    split: Name | None = Field(None, description="split of real tiles; null: the dataset's train split")
    schedule: Annotated[float, Field(gt=0)] | Literal["longest"] = Field(
        1.0, description="length as a multiple of the segmentor's iterations; longest: the longest of all compared recipes"
    )
    control: Name | None = Field(None, description="generator of the synthetic tiles; null: real tiles only")
    sampler: Name | None = None
    filter: Name | None = Field(None, description="the last filter the synthetic tiles go through; null: none")
    resample: Name | None = Field(None, description="re-sampling after it; null: none")
    synthetic_per_real: int = Field(
        0,
        ge=0,
        description="synthetic tiles mixed in per real one; after a filter of images or a re-sampling as many as are left, at most so many",
    )
    real_weight: float = Field(1.0, gt=0, description="how often a real tile is drawn relative to a synthetic one")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        synthetic = [self.control is not None, self.sampler is not None, self.synthetic_per_real > 0]
        if any(synthetic) and not all(synthetic):
            raise ValueError("control, sampler and synthetic_per_real go together: set all three, or none for real tiles only")
        for key in ("filter", "resample"):
            if getattr(self, key) and not any(synthetic):
                raise ValueError(f"{key}: is for synthetic tiles, and this recipe has none")
        return self
