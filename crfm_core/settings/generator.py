"""The generator: its base model, how a mask steers it and how that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Location, Positive, Section


class EmbeddedVAE(Section):
    """The small autoencoder trained on the tiles."""

    channels: list[Positive] = Field([24, 48], description="channels per level; n levels shrink the image by 2^(n-1)")
    latent_channels: Positive = Field(4, description="channels of a latent")
    steps: Positive = Field(800, description="training steps")
    batch_size: Positive = Field(8, description="tiles per training step")
    learning_rate: float = Field(6e-3, gt=0, description="learning rate of its training")


class EmbeddedTransformer(Section):
    """The small SD3 transformer (dual attention, qk-norm)."""

    layers: Positive = Field(3, description="number of blocks")
    heads: Positive = Field(3, description="attention heads")
    head_dim: Positive = Field(32, description="channels of an attention head")
    patch_size: Positive = Field(4, description="side of a token in latents")
    text_dim: Positive = Field(32, description="width of the tiny text encoders")
    text_length: Positive | None = Field(None, description="tokens of a prompt per text encoder; null: as many as the longest caption has")
    words: list[str] = Field([], description="texts whose words the tokenizers know whole, beside those of the captions")
    largest_tile: Positive | None = Field(None, description="side in pixels of the largest tile that it can draw; null: that of the tiles")


class Base(Section):
    """What all kinds of base model have in common."""

    #: Built on the tiles of each dataset, instead of being a folder of weights that exist before the run.
    IS_BUILT: ClassVar[bool] = False
    #: Downloaded from the model hub by the run.
    IS_FETCHED: ClassVar[bool] = False


class EmbeddedBase(Base):
    """A tiny base model of the same classes as SD3.5, built on the dataset's own tiles."""

    IS_BUILT = True

    kind: Literal["embedded"] = Field(description="kind of base model")
    seed: int = Field(0, description="seed of its weights and of the autoencoder's training")
    vae: EmbeddedVAE = Field(EmbeddedVAE(), description="the autoencoder")
    transformer: EmbeddedTransformer = Field(EmbeddedTransformer(), description="the transformer")


class FolderBase(Base):
    """SD3.5 as a diffusers pipeline folder."""

    kind: Literal["folder"] = Field(description="kind of base model")
    path: Location = Field(description="the folder that contains model_index.json")


class HubBase(Base):
    """SD3.5 from the model hub, downloaded once into a diffusers pipeline folder; HF_TOKEN gives access to gated models."""

    IS_FETCHED = True

    kind: Literal["hub"] = Field(description="kind of base model")
    repo: str = Field("stabilityai/stable-diffusion-3.5-medium", pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME on the hub")
    revision: str = Field(
        "b940f670f0eda2d07fbb75229e779da1ad11eb80", pattern=r"^[0-9a-f]{40}$", description="commit, so that every run gets the same files"
    )
    path: Location = Field("models/stable-diffusion-3.5-medium", description="folder to download to")


AnyBase = Annotated[EmbeddedBase | FolderBase | HubBase, Field(discriminator="kind")]


class LoRA(Section):
    """Low-rank updates of linear layers instead of training them whole; the saved generator has them added in."""

    rank: Positive = Field(64, description="rank of the updates")
    alpha: float = Field(64, gt=0, description="the update is scaled by alpha / rank")
    branches: list[Literal["image", "mask"]] = Field(["image"], min_length=1, description="trained branches that get low-rank updates")


@dataclass(frozen=True)
class Scheme:
    """What of a control scheme is known without its network, which is the module of its name in :mod:`crfm_core.models.schemes`.

    Attributes:
        description: one sentence for the report.
        trained: the branches that train by default.
        mask_init: how the mask's weights start by default.
        options: settings of :class:`Control` that only some schemes have, this one among them.
    """

    description: str
    trained: tuple[str, ...]
    mask_init: str
    options: tuple[str, ...] = ()


#: The control schemes by name: what `scheme` of a control may be.
SCHEMES = {
    "triattention": Scheme(
        "Mask tokens form a third branch of every block, with weights of its own; one attention joins image, text and mask.",
        trained=("image", "mask"),
        mask_init="random",
        options=("mask_mlp_modulation",),
    ),
    "siamese": Scheme(
        "Mask tokens form a third branch of every block; image and text share one attention, image and mask another, and the results "
        "for the image are added.",
        trained=("image", "mask"),
        mask_init="random",
        options=("mask_mlp_modulation",),
    ),
    "adapter": Scheme(
        "The image tokens of every block also attend to the mask's by a cross-attention; the base model stays as it is.",
        trained=("mask",),
        mask_init="random",
    ),
    "controlnet": Scheme(
        "A copy of the base model's first blocks reads the mask and adds to the image tokens of the base, which stays as it is.",
        trained=("mask",),
        mask_init="copy",
        options=("controlnet_layers",),
    ),
}


class Control(Section):
    """How the mask steers the generator, and how that is trained."""

    PERFORMANCE_KEYS = frozenset({"parallel", "gradient_checkpointing", "compile", "checkpoint_every", "keep_checkpoints"})
    LATER_KEYS = frozenset({"mask_dropout", "unlabelled_share", "unlabelled_masks", "validate_every", "patience", "validation_share"})

    scheme: Literal["triattention", "siamese", "adapter", "controlnet"] = Field(
        "triattention", description="control scheme: how the mask enters the network"
    )
    mask_init: Literal["random", "copy"] | None = Field(
        None, description="mask weights at the start: random, or those of the image branch; null: copy for controlnet, else random"
    )
    mask_mlp_modulation: Literal["own", "image"] = Field(
        "own", description="own (paper) or the image branch's vectors (released code); triattention and siamese"
    )
    controlnet_layers: Positive | None = Field(
        None, description="scheme controlnet: blocks of the control network; null, and at most: half of the base model's"
    )
    mask_code: Literal["grey", "grey_compat"] = Field(
        "grey", description="grey levels that encode class ids; grey_compat: as the released code, ignored pixels wrap around"
    )
    trainable: list[Literal["image", "mask", "text"]] | None = Field(
        None, min_length=1, description="branches that train; null: image and mask, for adapter and controlnet the mask alone"
    )
    lora: LoRA | None = Field(None, description="low-rank updates of some branches; null: branches train whole")
    start_from: Location | None = Field(
        None, description="weights to start from: a generator folder of the same scheme, or a file with the released code's names"
    )
    steps: int = Field(ge=0, description="optimiser updates; 0: the weights of start_from as they are")
    batch_size: Positive = Field(description="samples per process and micro-step")
    accumulate: Positive = Field(1, description="micro-steps per update")
    processes: Positive = Field(1, description="training processes, each with a GPU of its own (with device: cpu, over gloo)")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: ddp (weights in each) | fsdp (weights and optimiser state sharded)"
    )
    optimiser: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: state in 8 bits (needs bitsandbytes)")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate after the warm-up")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of the optimiser")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are saved; null: saves the last weights")
    density: Literal["uniform", "logit_normal"] = Field("uniform", description="density of training noise levels before the shift")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a joint horizontal flip")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="share of samples trained with an empty prompt; guidance_scale needs it")
    mask_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of labelled samples trained with the mask left out; a sampler's mask_guidance_scale needs some; 1: all, to "
        "train a base model",
    )
    unlabelled_share: float = Field(0.0, ge=0, lt=1, description="share of the samples that are drawn from the dataset's unlabelled tiles")
    unlabelled_masks: Literal["none", "predicted"] = Field(
        "none", description="masks of unlabelled tiles: left out, or the critic's, its unsure pixels ignored"
    )
    precision: Literal["no", "bf16"] = Field("no", description="autocast of the forward pass; the weights that train stay float32")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    compile: bool = Field(False, description="torch.compile of the transformer's blocks")
    validate_every: Positive | None = Field(
        None, description="updates between two looks at held-out tiles, whose lowest loss chooses the weights; null: the last weights"
    )
    patience: Positive | None = Field(
        None, description="looks in a row without a lower loss that end the training; null: it does all steps"
    )
    validation_share: float = Field(
        0.125,
        gt=0,
        lt=1,
        description="share of the training tiles, 64 at most, that are left out to be looked at; none where the dataset has val",
    )
    checkpoint_every: Positive = Field(500, description="updates between checkpoints to resume from")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept while training")
    seed: int = Field(0, description="seed of weights, batches and noise levels")

    @property
    def initialisation(self) -> str:
        """How the mask weights start, "random" or "copy"."""
        return self.mask_init or SCHEMES[self.scheme].mask_init

    @property
    def trained(self) -> list[str]:
        """The branches that train."""
        return list(self.trainable or SCHEMES[self.scheme].trained)

    @property
    def misses_masks(self) -> bool:
        """Whether some samples are trained without a mask."""
        return bool(self.mask_dropout or (self.unlabelled_share and self.unlabelled_masks == "none"))

    @property
    def knows_missing_masks(self) -> bool:
        """Whether the velocity without a mask is a learnt one: of samples without masks, or of a base model that does not train."""
        return self.misses_masks or (self.trained == ["mask"] and not self.start_from)

    @property
    def scheme_options(self) -> dict[str, Any]:
        """The settings that only this scheme and perhaps a few others have."""
        return {name: getattr(self, name) for name in SCHEMES[self.scheme].options}

    @model_validator(mode="after")
    def _consistent(self) -> Control:
        idle = [branch for branch in (self.lora.branches if self.lora else []) if branch not in self.trained]
        if idle:
            raise ValueError(f"lora.branches: {idle[0]!r} is not trained at all; allowed: {', '.join(self.trained)}")
        if self.lora and "mask" in self.lora.branches and self.initialisation == "random":
            raise ValueError("lora.branches: a random mask branch cannot be learned by low-rank updates; set mask_init: copy")
        if self.parallel == "fsdp" and self.optimiser == "adamw_8bit":
            raise ValueError("optimiser: adamw_8bit does not work with parallel: fsdp; set one of them back")
        if self.unlabelled_masks != "none" and not self.unlabelled_share:
            raise ValueError(f"unlabelled_masks: {self.unlabelled_masks}, and no sample is of an unlabelled tile; set unlabelled_share")
        if self.mask_dropout == 1 and "mask" in self.trained:
            raise ValueError("mask_dropout: 1 leaves all masks out, and the branch mask would learn nothing; leave it out of trainable")
        if self.patience and not self.validate_every:
            raise ValueError("patience: nothing is looked at while training; set validate_every, or leave it out")
        if not self.steps and not self.start_from:
            raise ValueError("steps: 0 trains nothing; set start_from to weights that are trained already, or more steps")
        for name in sorted({name for scheme in SCHEMES.values() for name in scheme.options} - {*SCHEMES[self.scheme].options}):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: the scheme {self.scheme} has no such option; leave it out")
        return self
