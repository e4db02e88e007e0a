"""What segmentors are trained on: filters and re-samplings of synthetic tiles, and recipes that mix them with real ones.

Each kind of filter and re-sampling is a class of its own, with what is known of the kind without loading a model.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Name, Positive, Section

#: FreeMask's: a pixel is dropped whose loss exceeds the mean of its class times this.
MARGIN = 1.25


class Filter(Section):
    """What all kinds of filter have in common."""

    #: Whole images are left out, so that fewer are left than were drawn; otherwise pixels are ignored.
    DROPS_IMAGES: ClassVar[bool] = False
    #: Needs the predictions of the critic.
    NEEDS_CRITIC: ClassVar[bool] = False
    #: Needs the critic's mean losses per class on real tiles.
    NEEDS_CLASS_LOSSES: ClassVar[bool] = False
    #: Needs the CLIP-like model of the section ``clip``.
    NEEDS_CLIP: ClassVar[bool] = False

    after: Name | None = Field(None, description="filter that is applied before this one; null: none")

    def describe(self, train: str, clip: str) -> str:
        """What the report says of the filter: what it keeps, and by what. ``train`` is the split trained on, ``clip`` the CLIP-like
        model's name."""
        raise NotImplementedError

    @property
    def split_of_losses(self) -> str | None:
        """Split of the real tiles whose mean losses count; None: the split trained on."""
        return None


class PixelFilter(Filter):
    """Pixels that the critic finds too hard are ignored (FreeMask)."""

    NEEDS_CRITIC = NEEDS_CLASS_LOSSES = True

    kind: Literal["pixel"] = Field(description="kind of filter")
    margin: float = Field(MARGIN, gt=0, description="a pixel is dropped above margin times its class's mean loss on real tiles")
    statistics_split: Name | None = Field(
        None, description="split of the real tiles whose mean losses count, e.g. a held-out one; null: the split trained on"
    )

    @property
    def split_of_losses(self) -> str | None:
        return self.statistics_split

    def describe(self, train: str, clip: str) -> str:
        return (
            f"ignores pixels on which the critic's loss exceeds {self.margin:g} times the mean loss of their class on real tiles "
            f"(split {self.split_of_losses or train})"
        )


class ImageFilter(Filter):
    """What filters that keep the best share of the images have in common."""

    DROPS_IMAGES = True

    keep: float = Field(gt=0, le=1, description="share of the images that is kept, the best")


class AgreementFilter(ImageFilter):
    """Keeps the images on which the critic's prediction agrees best with the mask, by mIoU."""

    NEEDS_CRITIC = True

    kind: Literal["agreement"] = Field(description="kind of filter")

    def describe(self, train: str, clip: str) -> str:
        return f"keeps the {100 * self.keep:g} % of the images on which the critic's prediction agrees best with the mask (mIoU)"


class ClipFilter(ImageFilter):
    """Keeps the images that fit their captions best, by the score of a CLIP-like model."""

    NEEDS_CLIP = True

    kind: Literal["clip"] = Field(description="kind of filter")

    def describe(self, train: str, clip: str) -> str:
        return f"keeps the {100 * self.keep:g} % of the images that fit their captions best by {clip}"


AnyFilter = Annotated[PixelFilter | AgreementFilter | ClipFilter, Field(discriminator="kind")]


class Resampling(Section):
    """What all kinds of re-sampling have in common."""

    #: Looks at the share of pixels that a filter of pixels has left, so one has to go before.
    NEEDS_PIXEL_FILTER: ClassVar[bool] = False

    @property
    def named_classes(self) -> list[str]:
        """Classes that the settings name, which the dataset must have."""
        return []

    def describe(self) -> str:
        """What the re-sampling keeps, and by what: what the report says of it."""
        raise NotImplementedError


class HardnessResampling(Resampling):
    """Keeps more versions of masks whose classes the critic finds hard (FreeMask)."""

    kind: Literal["hardness"] = Field(description="kind of re-sampling")
    seed: int = Field(0, description="seed of the choice among the versions of a mask")

    def describe(self) -> str:
        return "keeps more versions of masks whose classes the critic finds hard on real tiles, fewer of easy ones"


class RareResampling(Resampling):
    """Keeps images that show a poorly segmented class, or of which most survived the pixel filter (TISynth)."""

    NEEDS_PIXEL_FILTER = True

    kind: Literal["rare"] = Field(description="kind of re-sampling")
    worst: Positive = Field(2, description="number of classes, by highest mean loss on real tiles, that count as poorly segmented")
    classes: list[str] | None = Field(None, description="names of the classes that count as poorly segmented; null: the worst ones")
    min_pixels: Positive = Field(100, description="an image is kept if it shows at least this many pixels of such a class after filtering")
    survival: float = Field(0.8, ge=0, lt=1, description="or if more than this share of its labelled pixels survived filtering")

    @property
    def named_classes(self) -> list[str]:
        return self.classes or []

    def describe(self) -> str:
        rare = " or ".join(self.named_classes) or f"one of the {self.worst} classes with the highest loss on real tiles"
        return (
            f"keeps images that show at least {self.min_pixels} pixels of {rare}, or of which more than {100 * self.survival:g} % of the "
            "labelled pixels survived the pixel filter"
        )


class PseudoLabels(Section):
    """The critic's labels of unlabelled tiles (class-balanced self-training, Zou et al., ECCV 2018)."""

    keep: float = Field(
        0.8,
        gt=0,
        le=1,
        description="share of the pixels predicted as a class that keep this label, the surest; the others are ignored",
    )


AnyResampling = Annotated[HardnessResampling | RareResampling, Field(discriminator="kind")]


class Recipe(Section):
    """What a segmentor is trained on."""

    LATER_KEYS = frozenset({"pseudo", "pseudo_weight"})

    split: Name | None = Field(None, description="split of real tiles; null: the dataset's train split")
    schedule: Annotated[float, Field(gt=0)] | Literal["longest"] = Field(
        1.0, description="length as a multiple of the segmentor's iterations; longest: the longest of all compared recipes"
    )
    control: Name | None = Field(None, description="generator of the synthetic tiles; null: real tiles only")
    sampler: Name | None = Field(None, description="sampler of the synthetic tiles; null: real tiles only")
    filter: Name | None = Field(None, description="the last filter the synthetic tiles go through; null: none")
    resample: Name | None = Field(None, description="re-sampling after the filter; null: none")
    synthetic_per_real: int = Field(
        0,
        ge=0,
        description="synthetic tiles mixed in per real one; after a filter of images or a re-sampling at most this many",
    )
    real_weight: float = Field(1.0, gt=0, description="how often a real tile is drawn relative to a synthetic one")
    pseudo: bool = Field(False, description="mixes in the dataset's unlabelled tiles with the critic's labels (pseudo_labels)")
    pseudo_weight: float = Field(1.0, gt=0, description="how often a pseudo-labelled tile is drawn relative to a synthetic one")

    @property
    def samples(self) -> tuple[str, str] | None:
        """(control, sampler) of the synthetic tiles; None for real tiles only."""
        return (self.control, self.sampler) if self.control and self.sampler else None

    @property
    def is_ceiling(self) -> bool:
        """Whether it trains on labels of another split, which a user with the labels of the train split alone does not have."""
        return self.split is not None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        synthetic = [self.control is not None, self.sampler is not None, self.synthetic_per_real > 0]
        if any(synthetic) and not all(synthetic):
            raise ValueError("control, sampler and synthetic_per_real go together: set all three, or none for real tiles only")
        for key in ("filter", "resample"):
            if getattr(self, key) and not any(synthetic):
                raise ValueError(f"{key}: is for synthetic tiles, and this recipe has none")
        if self.pseudo_weight != 1 and not self.pseudo:
            raise ValueError("pseudo_weight: is for pseudo-labelled tiles, and this recipe has none; set pseudo: true")
        return self
