"""Which masks images are drawn for, beside those of the training tiles: one class per kind, with what is known of it without looking."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Positive, Section

#: The name that stands for the masks of the training tiles as they are.
TRAINING = "training"


class Layouts(Section):
    """What all kinds of new layouts have in common."""

    #: Needs the critic's labels of the dataset's unlabelled tiles.
    NEEDS_UNLABELLED: ClassVar[bool] = False

    seed: int = Field(0, description="seed of the layouts; another seed gives others")

    @property
    def named_classes(self) -> list[str]:
        """Classes that the settings name, which the dataset must have."""
        return []

    def describe(self) -> str:
        """Where the masks are from: what the report says of them."""
        raise NotImplementedError


class PredictedLayouts(Layouts):
    """The critic's labels of the unlabelled tiles; what it is not sure of is left to the generator."""

    NEEDS_UNLABELLED = True

    kind: Literal["predicted"] = Field(description="kind of layouts")

    def describe(self) -> str:
        return "the critic's labels of unlabelled tiles, without the pixels that it is not sure of"


Share = Annotated[float, Field(gt=0, le=1)]


class AugmentedLayouts(Layouts):
    """Masks of the training tiles turned, zoomed, and with connected pieces of other masks pasted in."""

    kind: Literal["augmented"] = Field(description="kind of layouts")
    turn: bool = Field(True, description="turn masks and pieces by quarter turns, and mirror them")
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.7, 1.5), description="smallest and largest zoom of a mask; what a smaller one leaves empty mirrors it"
    )
    paste: int = Field(3, ge=0, description="pieces of other masks that are pasted into one, at most")
    min_piece: Positive = Field(16, description="smallest piece in pixels")
    shares: Literal["uniform"] | dict[str, Share] | None = Field(
        None,
        description="shares of the classes among the labelled pixels of all layouts that masks and pieces are chosen for: uniform, or by "
        "name (other classes share the rest as they do in the training tiles); null: masks and pieces as they come",
    )

    @model_validator(mode="after")
    def _consistent(self) -> AugmentedLayouts:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {self.scale[0]:g} must not exceed {self.scale[1]:g}; give the smaller zoom first")
        if isinstance(self.shares, dict) and not 0 < (total := sum(self.shares.values())) <= 1 + 1e-9:
            raise ValueError(f"shares: add up to {total:g}; allowed: more than 0, at most 1")
        return self

    @property
    def named_classes(self) -> list[str]:
        return list(self.shares) if isinstance(self.shares, dict) else []

    def describe(self) -> str:
        changes = [
            "turned and mirrored" * self.turn,
            f"zoomed {self.scale[0]:g} to {self.scale[1]:g} times" * (self.scale != (1, 1)),
            f"with up to {self.paste} pieces of other masks" * bool(self.paste),
        ]
        named = ", ".join(f"{name} {100 * self.shares[name]:g} %" for name in self.named_classes) if isinstance(self.shares, dict) else ""
        wanted = named or self.shares or ""
        return ", ".join(filter(None, ["masks of training tiles", *changes])) + f"; class shares wanted: {wanted}" * bool(wanted)


AnyLayouts = Annotated[PredictedLayouts | AugmentedLayouts, Field(discriminator="kind")]
