"""The typed configuration: every key, its meaning, its default and its bounds; and the presets of the samplers.

``config.yaml`` and ``configs/*.yaml`` are read into :class:`Settings`; the JSON schema in ``configs/schema.json`` is written from it
(``python -m crfm_core.settings``), so what the documentation, the validator and the code say is one thing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from crfm_core import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="a name used in file paths")]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------------------------------- data


class EmbeddedSource(Section):
    """Scenes drawn by the package itself."""

    kind: Literal["embedded"]
    scenes: dict[Name, Positive] = Field(description="how many scenes to draw per split")
    size: Positive = Field(256, description="side of a scene in pixels of 0.3 m")
    seed: int = Field(0, description="another seed is another world")


class FolderSplit(Section):
    """Where the scenes of one split lie."""

    images: str = Field(description="glob of image files below the root, e.g. Train/*/images_png/*.png")
    labels: str = Field(description="glob of label rasters below the root; paired with the images by file stem and parent order")


class FolderSource(Section):
    """Images and label rasters (ids) in a folder; any format that rasterio reads."""

    kind: Literal["folder"]
    root: str = Field(description="the folder; relative to where the workflow runs")
    splits: dict[Name, FolderSplit] = Field(description="split name to its files")
    label_suffix: str = Field("", description="what the label's stem has after the image's stem, e.g. _label")


class Tiling(Section):
    """How scenes are cut."""

    size: Positive = Field(description="side of a tile in pixels")
    stride: Positive | None = Field(None, description="distance between tiles; null: the tile size (no overlap)")


class Dataset(Section):
    """One dataset: where its scenes are, its classes and its splits (a file of configs/datasets/)."""

    name: Name
    about: str = Field("", description="source, licence and layout in a sentence or two")
    classes: list[str] = Field(min_length=2, max_length=254, description="class names in order of id 0...K-1")
    palette: list[tuple[int, int, int]] = Field(description="one RGB colour per class, for pictures")
    label_map: dict[int, int] | None = Field(None, description="raw label id to training id; 255 = ignored. null: ids are training ids")
    source: EmbeddedSource | FolderSource = Field(discriminator="kind")
    tile: Tiling
    train: Name = Field("train", description="split the generator, the critic and the recipes train on")
    test: Name = Field("test", description="split that is scored; nothing trains on it")

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of the file."""
        return list(self.source.scenes if isinstance(self.source, EmbeddedSource) else self.source.splits)

    @model_validator(mode="after")
    def _consistent(self) -> Dataset:
        if len(self.palette) != len(self.classes):
            raise ValueError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")
        for key in ("train", "test"):
            if getattr(self, key) not in self.splits:
                raise ValueError(f"{key}: {getattr(self, key)!r} is no split of the source; it has: {', '.join(self.splits)}")
        for raw, new in (self.label_map or {}).items():
            if new != 255 and not 0 <= new < len(self.classes):
                raise ValueError(f"label_map: {raw} -> {new} is no class id; allowed: 0...{len(self.classes) - 1} and 255")
        return self


# ----------------------------------------------------------------------------------------------------------- generator


class EmbeddedVAE(Section):
    """The small autoencoder trained on the tiles."""

    channels: list[Positive] = Field([24, 48], description="channels per level; n levels shrink the image by 2^(n-1)")
    latent_channels: Positive = 4
    steps: Positive = Field(800, description="training steps")
    batch_size: Positive = 8
    learning_rate: float = Field(6e-3, gt=0)


class EmbeddedTransformer(Section):
    """The small SD3 transformer (dual attention, qk-norm)."""

    layers: Positive = 3
    heads: Positive = 3
    head_dim: Positive = 32
    patch_size: Positive = Field(4, description="side of a token in latents")
    text_dim: Positive = Field(32, description="width of the tiny text encoders")


class EmbeddedBase(Section):
    """A tiny base model of the same classes as SD3.5, built on the dataset's own tiles."""

    kind: Literal["embedded"]
    seed: int = 0
    vae: EmbeddedVAE = EmbeddedVAE()
    transformer: EmbeddedTransformer = EmbeddedTransformer()


class FolderBase(Section):
    """SD3.5 as a diffusers pipeline folder."""

    kind: Literal["folder"]
    path: str = Field(description="the folder that holds model_index.json")


class HubBase(Section):
    """SD3.5 from the model hub, downloaded once into a diffusers pipeline folder; HF_TOKEN gives access to gated models."""

    kind: Literal["hub"]
    repo: str = Field("stabilityai/stable-diffusion-3.5-medium", pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME on the hub")
    revision: str = Field(
        "b940f670f0eda2d07fbb75229e779da1ad11eb80", pattern=r"^[0-9a-f]{40}$", description="commit, so that every run gets the same files"
    )
    path: str = Field("models/stable-diffusion-3.5-medium", description="folder to download to")


class Captions(Section):
    """Text that goes with a tile."""

    template: str = Field("a satellite image of {classes}", description="{classes} becomes the class names present, in order of id")

    @model_validator(mode="after")
    def _has_place(self) -> Captions:
        if self.template.count("{classes}") != 1 or "{" in self.template.replace("{classes}", ""):
            raise ValueError("template: must hold {classes} exactly once and no other braces")
        return self


class LoRA(Section):
    """Low-rank updates of linear layers instead of training them whole; the saved generator has them added in."""

    rank: Positive = 64
    alpha: float = Field(64, gt=0, description="the update is scaled by alpha / rank")
    branches: list[Literal["image", "mask"]] = Field(["image"], min_length=1, description="trained branches that get low-rank updates")


class Control(Section):
    """How the mask steers the generator, and how that is trained."""

    scheme: Literal["triattention", "siamese", "adapter", "controlnet"] = "triattention"
    mask_init: Literal["random", "copy"] | None = Field(
        None, description="mask weights at the start: random, or those of the image branch; null: copy for controlnet, else random"
    )
    mask_mlp_modulation: Literal["own", "image"] = Field(
        "own", description="own (paper) or the image branch's vectors (released code); triattention and siamese"
    )
    controlnet_layers: Positive | None = Field(
        None, description="blocks of the control network; null, and at most: half of the base model's"
    )
    mask_code: Literal["grey", "grey_compat"] = Field("grey", description="grey_compat: as the released code, ignored pixels wrap around")
    trainable: list[Literal["image", "mask", "text"]] | None = Field(
        None, min_length=1, description="branches that train; null: image and mask, for adapter and controlnet the mask alone"
    )
    lora: LoRA | None = None
    start_from: str | None = Field(
        None, description="weights to start from: a generator folder of the same scheme, or a file with the released code's names"
    )
    steps: int = Field(ge=0, description="optimiser updates; 0: the weights of start_from as they are")
    batch_size: Positive = Field(description="samples per process and micro-step")
    accumulate: Positive = Field(1, description="micro-steps per update")
    processes: Positive = Field(1, description="training processes, each with a GPU of its own (with device: cpu, over gloo)")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: ddp (weights in each) | fsdp (weights and state shared out)"
    )
    optimiser: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: state in 8 bits (needs bitsandbytes)")
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are saved; null: none")
    density: Literal["uniform", "logit_normal"] = Field("uniform", description="density of training noise levels before the shift")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a joint horizontal flip")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of samples trained with an empty prompt; guidance_scale needs it")
    precision: Literal["no", "bf16"] = Field("no", description="autocast of the forward pass; the weights that train stay float32")
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile of the transformer's blocks")
    checkpoint_every: Positive = Field(500, description="updates between checkpoints to resume from")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept while training")
    seed: int = 0

    @property
    def initialisation(self) -> str:
        """How the mask weights start, "random" or "copy"."""
        return self.mask_init or ("copy" if self.scheme == "controlnet" else "random")

    @property
    def trained(self) -> list[str]:
        """The branches that train."""
        return list(self.trainable or (["mask"] if self.scheme in ("adapter", "controlnet") else ["image", "mask"]))

    @model_validator(mode="after")
    def _consistent(self) -> Control:
        idle = [branch for branch in (self.lora.branches if self.lora else []) if branch not in self.trained]
        if idle:
            raise ValueError(f"lora.branches: {idle[0]!r} is not trained at all; allowed: {', '.join(self.trained)}")
        if self.lora and "mask" in self.lora.branches and self.initialisation == "random":
            raise ValueError("lora.branches: a random mask branch cannot be learned by low-rank updates; set mask_init: copy")
        if self.parallel == "fsdp" and self.optimiser == "adamw_8bit":
            raise ValueError("optimiser: adamw_8bit does not work with parallel: fsdp; set one of them back")
        if not self.steps and not self.start_from:
            raise ValueError("steps: 0 trains nothing; set start_from to weights that are trained already, or more steps")
        if self.controlnet_layers and self.scheme != "controlnet":
            raise ValueError(f"controlnet_layers: the scheme {self.scheme} has no control network; leave it out")
        return self


# ------------------------------------------------------------------------------------------------------------ sampling


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RectifySettings:
    """How the critic corrects the velocity while sampling (TODSynth, arXiv 2512.16740, control-rectify flow matching).

    The defaults are this project's: steps relative to the velocity's own length, so that they act at any resolution and
    critic. :meth:`paper` and :meth:`released` give the two published forms.
    """

    steps: Annotated[int, Field(ge=0, description="How many of the first sampling steps are corrected.")] = 4
    step_size: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Largest step size alpha against the gradient of the critic's loss.")
    ] = 0.3
    schedule: Annotated[
        Literal["constant", "linear_increase", "linear_decrease"],
        Field(description="Step size over the sampling steps: always step_size, growing to it, or falling from it."),
    ] = "constant"
    inner_steps: Annotated[int, Field(ge=1, description="Corrections per corrected step; each decodes and judges anew.")] = 1
    pixels: Annotated[
        Literal["valid", "wrong"],
        Field(description="Pixels in the loss: all that are not ignored, or only those of them the critic gets wrong."),
    ] = "valid"
    reduction: Annotated[
        Literal["sum", "mean"],
        Field(description="sum: a sample's gradient is its own; mean: it is divided by the batch size (as released)."),
    ] = "sum"
    normalise: Annotated[
        Literal["none", "l2", "relative"],
        Field(description="Gradient as it is, scaled to length 1, or scaled to the length of the velocity."),
    ] = "relative"
    shrink: Annotated[bool, Field(description="Also shrink the velocity by the factor 1 - alpha.")] = False
    clamp: Annotated[bool, Field(description="Clip the corrected velocity to [-1, 1]; it changes far more than the gradient does.")] = False
    search: Annotated[
        Literal["none", "backtracking"],
        Field(description="backtracking: each sample's step is the first one tried that lowers its loss; the step size is the longest."),
    ] = "none"
    trials: Annotated[int, Field(ge=1, description="Backtracking: steps tried at most per corrected step.")] = 2
    agreement: Annotated[
        float, Field(gt=0, le=1, description="Backtracking: a sample is done once the critic agrees on this share of its labelled pixels.")
    ] = 0.99
    patience: Annotated[int, Field(ge=1, description="Backtracking: it is also done after so many steps running that lowered nothing.")] = 3
    measure: Annotated[bool, Field(description="Also measure the loss after each correction, which takes a third of its time.")] = True

    def __post_init__(self) -> None:
        alone = (self.normalise, self.pixels, self.inner_steps, self.shrink, self.clamp) == ("relative", "valid", 1, False, False)
        if self.search == "backtracking" and not alone:
            raise ValueError("search: backtracking needs normalise: relative, pixels: valid, one inner step, and neither shrink nor clamp")

    @classmethod
    def paper(cls, **changes: Any) -> RectifySettings:
        """The formula of the paper: the raw gradient over all valid pixels, a constant step size, nothing clipped."""
        return cls(**{"step_size": 0.1, "normalise": "none"} | changes)

    @classmethod
    def released(cls, **changes: Any) -> RectifySettings:
        """What the authors' released code does (state of 2026-02-04)."""
        own = {"step_size": 0.1, "schedule": "linear_decrease", "pixels": "wrong", "reduction": "mean", "normalise": "none", "clamp": True}
        return cls(**own | changes)

    @classmethod
    def adaptive(cls, **changes: Any) -> RectifySettings:
        """Each sample is corrected while it helps, by the step that a search finds; the step size bounds the change of the velocity."""
        return cls(**{"search": "backtracking"} | changes)

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


Preset = Literal["paper", "released", "default", "adaptive"]

#: The settings that a preset's name stands for.
PRESETS = {
    "paper": RectifySettings.paper,
    "released": RectifySettings.released,
    "default": RectifySettings,
    "adaptive": RectifySettings.adaptive,
}


class Sampler(Section):
    """A named way to draw images from the generator."""

    num_steps: Positive = Field(23, description="Euler steps")
    preset: Preset | None = Field(None, description="settings of the correction to start from; null: none")
    rectify: dict[str, Any] = Field({}, description="fields of RectifySettings that differ from the preset")
    batch_size: Positive = Field(8, description="images sampled together")
    guidance_scale: float = Field(1.0, ge=1, description="classifier-free guidance; above 1 the generator needs caption_dropout")
    pad: bool = Field(False, description="pad masks that the latent grid does not divide, and crop their images; false: refuse them")
    compile: Literal["default", "reduce-overhead"] | None = Field(
        None, description="torch.compile of the transformer's blocks; reduce-overhead: with CUDA graphs"
    )
    critic_decoder: str | None = Field(
        None, description="folder of a smaller diffusers decoder for the same latents, which the critic looks through; null: the VAE"
    )

    @property
    def rectification(self) -> RectifySettings | None:
        """The correction's settings, None when there is none."""
        if self.preset is None:
            return None
        return PRESETS[self.preset](**self.rectify)

    @model_validator(mode="after")
    def _consistent(self) -> Sampler:
        if self.preset is None and self.rectify:
            raise ValueError(f"rectify: needs a preset to start from; allowed: {', '.join(PRESETS)}")
        if self.preset is None and self.critic_decoder:
            raise ValueError("critic_decoder: nothing is corrected without a preset; leave it out")
        known = [field.name for field in fields(RectifySettings)]
        if unknown := [key for key in self.rectify if key not in known]:
            raise ValueError(f"rectify.{unknown[0]}: unknown key; allowed: {', '.join(known)}")
        try:
            settings = self.rectification
        except ValidationError as error:
            fault = error.errors()[0]
            if not fault["loc"]:
                raise ValueError(f"rectify.{fault['msg'].removeprefix('Value error, ')}") from None
            raise ValueError(f"rectify.{fault['loc'][0]}: {fault['msg']} (found {fault['input']!r})") from None
        if settings and settings.steps > self.num_steps:
            raise ValueError(f"rectify.steps: {settings.steps} corrected steps of {self.num_steps}; allowed: at most num_steps")
        return self


# ---------------------------------------------------------------------------------------------- segmentors and recipes


class Segmentor(Section):
    """A segmentation model and how it is trained."""

    architecture: Literal["segformer_tiny", "unet_tiny", "pspnet_r50", "segformer_b2"]
    iterations: Positive = Field(description="length of the 1x schedule")
    batch_size: Positive
    learning_rate: float = Field(gt=0)
    optimiser: Literal["AdamW", "SGD"] = "AdamW"
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0, description="iterations of linear warm-up; after it the rate falls as poly")
    poly_power: float = Field(0.9, gt=0)
    pretrained: str | None = Field(None, description="file of backbone weights; null: none")
    checkpoint_every: Positive = Field(500, description="iterations between checkpoints to resume from")


class Judge(Section):
    """Which trained segmentor judges or guides: one that the workflow trains, or one from elsewhere."""

    recipe: Name | None = Field(None, description="recipe it is trained on")
    segmentor: Name | None = None
    seed: int = 0
    path: str | None = Field(
        None, description="instead: a checkpoint of mmsegmentation, or a folder of a transformers model for semantic segmentation"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Judge:
        trained = [name for name in ("recipe", "segmentor") if getattr(self, name) is not None]
        if len(trained) != (0 if self.path else 2):
            raise ValueError("recipe: give recipe and segmentor of one to train, or the path of one from elsewhere")
        return self


class Filter(Section):
    """Synthetic pixels that the critic finds too hard are ignored (FreeMask)."""

    margin: float = Field(1.25, gt=0, description="a pixel is dropped above margin x its class's mean loss on real tiles")


class Recipe(Section):
    """What a segmentor is trained on."""

    split: Name | None = Field(None, description="split of real tiles; null: the dataset's train split")
    schedule: Annotated[float, Field(gt=0)] | Literal["longest"] = Field(
        1.0, description="length as a multiple of the segmentor's iterations; longest: the longest of all recipes"
    )
    control: Name | None = Field(None, description="generator of the synthetic tiles; null: real tiles only")
    sampler: Name | None = None
    filter: Name | None = None
    synthetic_per_real: int = Field(0, ge=0, description="synthetic tiles per real one")
    real_weight: float = Field(1.0, gt=0, description="how often a real tile is drawn relative to a synthetic one")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        synthetic = [self.control is not None, self.sampler is not None, self.synthetic_per_real > 0]
        if any(synthetic) and not all(synthetic):
            raise ValueError("control, sampler and synthetic_per_real go together: set all three, or none for real tiles only")
        if self.filter and not any(synthetic):
            raise ValueError("filter: filters synthetic tiles, and this recipe has none")
        return self


class Table(Section):
    """Recipes that are compared."""

    title: str
    recipes: list[Name] = Field(min_length=1)
    segmentor: Name
    baseline: Name | None = Field(None, description="recipe the differences refer to")
    paper: Name | None = Field(None, description="table of configs/paper_results.yaml shown beside")

    @model_validator(mode="after")
    def _baseline_listed(self) -> Table:
        if self.baseline is not None and self.baseline not in self.recipes:
            raise ValueError(f"baseline: {self.baseline!r} is not among the recipes; allowed: {', '.join(self.recipes)}")
        return self


class Comparison(Section):
    """Forms of the correction that the report compares by what they do to the samples, without training segmentors on them."""

    control: Name = Field(description="generator that draws the samples")
    presets: list[Preset] = Field(["released", "paper", "default", "adaptive"], min_length=1)
    steps: list[Positive] = Field([2, 4, 6, 23], min_length=1, description="numbers of corrected steps; none is always compared")
    num_steps: Positive = 23
    masks: Positive = Field(32, description="masks of the test split, the first ones")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the noise; all forms start from the same")
    batch_size: Positive = 8

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if max(self.steps) > self.num_steps:
            raise ValueError(f"steps: {max(self.steps)} corrected steps of {self.num_steps}; allowed: at most num_steps")
        return self


class Settings(Section):
    """The whole configuration of one run."""

    scale: str = Field(description="what the report calls this size of experiment")
    results: str = Field("results", description="folder of everything that is made")
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
    recipes: dict[Name, Recipe]
    critic: Judge = Field(description="the segmentor that guides the sampling and filters pixels")
    judge: Judge = Field(description="an independent segmentor that says whether samples agree with their masks")
    comparison: Comparison | None = Field(None, description="forms of the correction to compare in the report; null: none")
    tables: dict[Name, Table]

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
        for name, sampler in self.samplers.items():
            for control in {r.control for r in self.recipes.values() if r.sampler == name and r.control in self.controls}:
                if sampler.guidance_scale > 1 and not self.controls[control].caption_dropout:
                    problems.append(f"samplers.{name}.guidance_scale: needs caption_dropout in controls.{control}; set it, or 1")
        for name, table in self.tables.items():
            for index, recipe in enumerate(table.recipes):
                known(f"tables.{name}.recipes.{index}", recipe, self.recipes)
            known(f"tables.{name}.segmentor", table.segmentor, self.segmentors)
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
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def iterations(self, recipe: str, segmentor: str) -> int:
        """Training iterations of a segmentor on a recipe; ``longest`` follows the longest recipe of the tables."""
        schedule = self.recipes[recipe].schedule
        if schedule == "longest":
            compared = {name for table in self.tables.values() for name in table.recipes}
            schedule = max([1.0, *(s for name in compared if (s := self.recipes[name].schedule) != "longest")])
        return round(self.segmentors[segmentor].iterations * schedule)

    def copies(self, control: str, sampler: str) -> int:
        """Synthetic tiles made per real one: as many as the most demanding recipe takes, 1 where none takes any."""
        return max((r.synthetic_per_real for r in self.recipes.values() if (r.control, r.sampler) == (control, sampler)), default=1)


def _explain(source: str, error: ValidationError) -> ConfigError:
    """One line per fault: the key's path, what is wrong, what is allowed."""
    lines = []
    for fault in error.errors():
        path = ".".join(_keys_of(fault["loc"]))
        message = re.sub(r"^Value error, ", "", fault["msg"])
        if fault["type"] == "extra_forbidden":
            message = f"unknown key; allowed: {', '.join(_allowed_keys(error.title, fault['loc'][:-1])) or 'none'}"
        elif "input" in fault and not isinstance(fault["input"], (dict, list)):
            message += f" (found {fault['input']!r})"
        # a section's own check names the key below it first ("rectify.steps: ...")
        joint = "." if fault["type"] == "value_error" and re.match(r"[\w.]+: ", message) else ": "
        lines += [f"  {path}{joint}{message}" if path else f"  {part}" for part in message.split("\n")[: 1 if path else None]]
    return ConfigError(f"{source} is not a valid configuration:\n" + "\n".join(lines))


def _keys_of(location: tuple) -> Iterator[str]:
    """The keys of a fault's location, without the kinds and types that pydantic puts between them."""
    for before, part in zip(("", *location), location, strict=False):
        is_kind = before in ("base_model", "source") and part in ("embedded", "folder", "hub")
        if not is_kind and not re.match(r"constrained-|literal\[", str(part)):
            yield str(part)


def _allowed_keys(model_name: str, location: tuple) -> list[str]:
    """Keys allowed in the section at ``location``, found by walking the schema the models give."""
    schema = {"Settings": Settings, "Dataset": Dataset}[model_name].model_json_schema()
    node = schema

    def resolve(node: dict) -> dict:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        return node

    for part in location:
        node = resolve(node)
        if "discriminator" in node and part in node["discriminator"]["mapping"]:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif isinstance(part, int):
            node = node.get("items", {})
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:
            node = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), {})
    return list(resolve(node).get("properties", {}))


def load_settings(config: dict, source: str = "configuration") -> Settings:
    """Check a configuration as read from YAML. Raises ConfigError naming every wrong key, with what is allowed."""
    try:
        return Settings.model_validate(config)
    except ValidationError as error:
        raise _explain(source, error) from None


def load_dataset(path: Path | str) -> Dataset:
    """Read a dataset file. Raises ConfigError when it is missing, not YAML or not a valid dataset."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return Dataset.model_validate(content)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in Path(path).parent.glob("*.yaml")))
        raise ConfigError(f"datasets: no file {path}; allowed: a path, or one of {known or '(no files there)'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise _explain(str(path), error) from None


def load_datasets(settings: Settings, root: Path | str) -> dict[str, Dataset]:
    """Read the dataset files that ``settings.datasets`` names (below ``root``/configs/datasets, or as paths) and check
    that every split the recipes name exists."""
    datasets = {}
    for entry in settings.datasets:
        path = Path(entry) if entry.endswith(".yaml") else Path(root) / "configs" / "datasets" / f"{entry}.yaml"
        dataset = load_dataset(path)
        if dataset.name in datasets:
            raise ConfigError(f"datasets: the name {dataset.name!r} occurs twice ({entry})")
        datasets[dataset.name] = dataset
        for name, recipe in settings.recipes.items():
            if recipe.split is not None and recipe.split not in dataset.splits:
                raise ConfigError(
                    f"recipes.{name}.split: {dataset.name} has no split {recipe.split!r}; allowed: {', '.join(dataset.splits)}"
                )
            if (recipe.split or dataset.train) == dataset.test:
                raise ConfigError(f"recipes.{name}.split: {recipe.split!r} is the test split of {dataset.name}; nothing may train on it")
    return datasets


def json_schema() -> str:
    """The configuration's JSON schema, as written to configs/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
