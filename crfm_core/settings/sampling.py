"""How images are drawn from the generator and corrected on the way, and the comparison of such corrections."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from crfm_core.settings.base import Location, Name, Positive, Section
from crfm_core.settings.layouts import TRAINING


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RectifySettings:
    """How the critic corrects the velocity while sampling (TODSynth, arXiv 2512.16740, control-rectify flow matching).

    The defaults are this project's: steps relative to the velocity's own length, so that they act at any resolution and
    critic. :meth:`paper` and :meth:`released` give the two published forms.
    """

    steps: Annotated[int, Field(ge=0, description="how many of the first sampling steps are corrected")] = 4
    step_size: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="largest step size alpha against the gradient of the critic's loss")
    ] = 0.3
    schedule: Annotated[
        Literal["constant", "linear_increase", "linear_decrease"],
        Field(description="step size over the sampling steps: always step_size, growing to it, or falling from it"),
    ] = "constant"
    inner_steps: Annotated[int, Field(ge=1, description="corrections per corrected step; each decodes and judges anew")] = 1
    pixels: Annotated[
        Literal["valid", "wrong"],
        Field(description="pixels in the loss: all that are not ignored, or only those of them that the critic gets wrong"),
    ] = "valid"
    reduction: Annotated[
        Literal["sum", "mean"],
        Field(description="sum: a sample's gradient is its own; mean: it is divided by the batch size (as released)"),
    ] = "sum"
    normalise: Annotated[
        Literal["none", "l2", "relative"],
        Field(description="gradient as it is, scaled to length 1, or scaled to the length of the velocity"),
    ] = "relative"
    shrink: Annotated[bool, Field(description="also shrink the velocity by the factor 1 - alpha")] = False
    clamp: Annotated[bool, Field(description="clip the corrected velocity to [-1, 1]; changes far more than the gradient does")] = False
    ascend: Annotated[
        bool, Field(description="add the gradient instead of subtracting it, as releases before 2026-02-04 did; for comparison only")
    ] = False
    search: Annotated[
        Literal["none", "backtracking"],
        Field(description="backtracking: each sample takes the first step tried that lowers its loss; step_size is the longest"),
    ] = "none"
    trials: Annotated[int, Field(ge=1, description="backtracking: steps tried at most per corrected step")] = 2
    agreement: Annotated[
        float, Field(gt=0, le=1, description="backtracking: a sample is done once the critic agrees on this share of its labelled pixels")
    ] = 0.99
    patience: Annotated[
        int, Field(ge=1, description="backtracking: a sample is also done after this many steps in a row that lowered nothing")
    ] = 3
    measure: Annotated[bool, Field(description="also measure the loss after each correction, which takes a third of its time")] = True

    def __post_init__(self) -> None:
        as_searched = ("relative", "valid", 1, False, False, False)
        if self.search == "backtracking" and as_searched != (
            self.normalise, self.pixels, self.inner_steps, self.shrink, self.clamp, self.ascend
        ):  # fmt: skip
            raise ValueError(
                "search: backtracking needs normalise: relative, pixels: valid, one inner step, and no shrink, clamp or ascend"
            )

    @classmethod
    def default(cls, **changes: Any) -> RectifySettings:
        """This project's: each sample's step is a share of its velocity's length, and nothing is clipped."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> RectifySettings:
        """The formula of the paper: the raw gradient over all valid pixels, a constant step size, nothing clipped."""
        return replace(cls(step_size=0.1, normalise="none"), **changes)

    @classmethod
    def released(cls, **changes: Any) -> RectifySettings:
        """What the authors' released code does (state of 2026-02-04)."""
        released = cls(step_size=0.1, schedule="linear_decrease", pixels="wrong", reduction="mean", normalise="none", clamp=True)
        return replace(released, **changes)

    @classmethod
    def adaptive(cls, **changes: Any) -> RectifySettings:
        """Each sample is corrected while it helps, by the step that a search finds; the step size bounds the change of the velocity."""
        return replace(cls(search="backtracking"), **changes)

    def step_sizes(self, num_steps: int) -> list[float]:
        """Step sizes of the corrected steps 0 ... ``steps`` - 1 of a sampling run of ``num_steps`` steps.

        The linear schedules count all sampling steps. Raises ValueError when ``steps`` exceeds ``num_steps``.
        """
        if self.steps > num_steps:
            raise ValueError(f"rectify.steps={self.steps} exceeds the number of sampling steps {num_steps}")
        progress = [(step + 1) / num_steps for step in range(self.steps)]
        if self.schedule == "constant":
            return [self.step_size for _ in progress]
        if self.schedule == "linear_increase":
            return [self.step_size * done for done in progress]
        return [self.step_size * (1 - done) for done in progress]

    def describe(self) -> str:
        """The settings in a line, without the number of steps."""
        schedule = self.schedule.replace("_", " ")
        if self.search == "backtracking":
            return (
                f"step size searched for, at most {self.step_size:g} ({schedule}), {self.trials} trials per step; a sample is done at "
                f"{100 * self.agreement:g} % agreement or after {self.patience} steps without gain"
            )
        shrink, clamp = "shrink" if self.shrink else "no shrink", "clamp" if self.clamp else "no clamp"
        return (
            f"step size {self.step_size:g} ({schedule}), {self.inner_steps} per step, {self.pixels} pixels, {self.reduction}, "
            f"normalise {self.normalise}, {shrink}, {clamp}" + ", the gradient is added, not subtracted" * self.ascend
        )


#: The name of sampling without correction, where presets are compared with it.
PLAIN = "plain"

Preset = Literal["paper", "released", "default", "adaptive"]

#: Functions that give the settings of a preset, changed by keyword; the docstring is what a preset says of itself.
PRESETS: dict[str, Callable[..., RectifySettings]] = {name: getattr(RectifySettings, name) for name in get_args(Preset)}


def describe_preset(name: str) -> str:
    """What a preset says of itself, in a sentence."""
    return str(inspect.getdoc(PRESETS[name])).partition("\n")[0]


class Sampler(Section):
    """A named way to draw images from the generator."""

    PERFORMANCE_KEYS = frozenset({"batch_size", "compile", "pad"})
    LATER_KEYS = frozenset({"mask_guidance_scale", "layouts"})

    layouts: Name = Field(TRAINING, description="masks to draw images for: training (those of the training tiles), or a name of layouts")
    num_steps: Positive = Field(23, description="Euler steps")
    preset: Preset | None = Field(
        None,
        description="correction to start from; null: none. " + " ".join(f"`{name}`: {describe_preset(name)}" for name in PRESETS),
    )
    rectify: RectifySettings | None = Field(None, description="settings of the correction that differ from the preset")
    batch_size: Positive = Field(8, description="images sampled together")
    guidance_scale: float = Field(1.0, ge=1, description="classifier-free guidance; above 1 the generator needs caption_dropout")
    mask_guidance_scale: float = Field(
        1.0,
        ge=1,
        description="guidance by the mask; above 1 the generator needs mask_dropout, unlabelled tiles without masks, or a frozen base",
    )
    pad: bool = Field(False, description="pad masks that the latent grid does not divide, and crop their images; false: refuse them")
    compile: Literal["default", "reduce-overhead"] | None = Field(
        None, description="torch.compile of the transformer's blocks; reduce-overhead: with CUDA graphs; null: not compiled"
    )
    critic_decoder: Location | None = Field(
        None, description="folder of a smaller diffusers decoder for the same latents, which the critic looks through; null: the VAE"
    )

    def _performance_key_names(self) -> frozenset[str]:
        """All of :attr:`PERFORMANCE_KEYS`; without the batch size where the correction divides by it."""
        return self.PERFORMANCE_KEYS - ({"batch_size"} if self.rectify and self.rectify.reduction == "mean" else set())

    def result_keys(self) -> dict[str, Any]:
        """The keys that an image depends on; ``layouts`` says for which masks there are images, and stages read those from files."""
        return {key: value for key, value in super().result_keys().items() if key != "layouts"}

    @property
    def changed(self) -> list[str]:
        """The settings of the correction that differ from the preset."""
        if self.preset is None or self.rectify is None:
            return []
        preset, own = asdict(PRESETS[self.preset]()), asdict(self.rectify)
        return [key for key, value in own.items() if value != preset[key]]

    @model_validator(mode="before")
    @classmethod
    def _complete_preset(cls, data: Any) -> Any:
        """``rectify`` as the whole settings of the correction: those of the preset with the changes over them; None without a preset."""
        if not isinstance(data, dict) or not isinstance(changes := data.get("rectify") or {}, dict):
            return data
        preset = data.get("preset")
        if preset is None and changes:
            raise ValueError(f"rectify: needs a preset to start from; allowed: {', '.join(PRESETS)}")
        if preset not in [*PRESETS]:  # a list, so that it may be of any type
            return data | {"rectify": None}
        return data | {"rectify": asdict(PRESETS[preset]()) | changes}

    @model_validator(mode="after")
    def _consistent(self) -> Sampler:
        if self.preset is None and self.critic_decoder:
            raise ValueError("critic_decoder: nothing is corrected without a preset; leave it out")
        if self.rectify and self.rectify.steps > self.num_steps:
            raise ValueError(f"rectify.steps: {self.rectify.steps} corrected steps of {self.num_steps}; allowed: at most num_steps")
        return self


class Comparison(Section):
    """Forms of the correction that the report compares by what they do to the samples, without training segmentors on them."""

    control: Name = Field(description="generator that draws the samples")
    presets: list[Preset] = Field(["released", "paper", "default", "adaptive"], min_length=1, description="corrections that are compared")
    steps: list[Positive] = Field([2, 4, 6, 23], min_length=1, description="numbers of corrected steps; none is always compared")
    num_steps: Positive = Field(23, description="Euler steps")
    masks: Positive = Field(32, description="number of held-out masks, the first ones")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the noise; all forms start from the same")
    batch_size: Positive = Field(8, description="images sampled together")

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if max(self.steps) > self.num_steps:
            raise ValueError(f"steps: {max(self.steps)} corrected steps of {self.num_steps}; allowed: at most num_steps")
        return self
