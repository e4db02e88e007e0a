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
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from crfm_core import ConfigError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="a name used in file paths")]
Positive = Annotated[int, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


def _plain(path: str) -> str:
    """Refuse a path with what the engine takes for a wildcard, or the shell that starts its jobs could take for a command."""
    if found := re.search(r"""^-|[{}"'`$;&|<>\\\n\t]""", path):
        raise ValueError(f"a path may not {'begin with' if found[0] == '-' else 'hold'} {found[0]!r}; rename the file or folder")
    return path


Location = Annotated[str, AfterValidator(_plain)]
#: What stands in cells of CSV files: none that a spreadsheet takes for a formula.
Words = Annotated[str, Field(pattern=r"^[^=+@-]")]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Keys that change nothing about what is made, but for rounding: how fast it is, in how much memory, how often it is saved.
    MEANS: ClassVar[frozenset[str]] = frozenset()

    def without_effect(self) -> frozenset[str]:
        """Those of :attr:`MEANS` that hold for these values."""
        return self.MEANS

    def essence(self) -> dict[str, Any]:
        """What depends on this section depends on these keys of it, as plain values."""
        return self.model_dump(mode="json", exclude=set(self.without_effect()))

    def means(self) -> dict[str, Any]:
        """The other keys, as plain values."""
        return self.model_dump(mode="json", include=set(self.without_effect()))

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        """No text holds control characters, with which it could write anything to a terminal, but line ends and tabs."""
        for key, value in data.items() if isinstance(data, dict) else ():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
                    raise ValueError(f"{key}: holds control characters, in {text!r}; write it without")
        return data


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
    """Images and label rasters on the same grid, as ids or as colours, in a folder; formats as of crfm_core.data.rasters."""

    kind: Literal["folder"]
    root: str = Field(description="the folder; relative to where the workflow runs")
    splits: dict[Name, FolderSplit] | None = Field(None, description="split name to its files; or images and labels, and a section split")
    images: str | None = Field(None, description="glob of all images, where the section split makes the splits")
    labels: str | None = Field(None, description="glob of all label rasters")
    label_suffix: str = Field("", description="what the label's stem has after the image's stem, e.g. _label")
    exclude: list[str] = Field([], description="globs below the root of images to leave out")

    @model_validator(mode="after")
    def _consistent(self) -> FolderSource:
        if (self.images is None) != (self.labels is None) or (self.splits is None) == (self.images is None):
            raise ValueError("splits: give splits with images and labels each, or images and labels for all scenes and a section split")
        return self


class GeotiffSource(Section):
    """Georeferenced scenes, and labels that lie elsewhere: rasters of another grid, or polygons with an attribute."""

    kind: Literal["geotiff"]
    root: str = Field(description="the folder; relative to where the workflow runs")
    splits: dict[Name, str] | None = Field(None, description="split name to a glob of its scenes; or images, and a section split")
    images: str | None = Field(None, description="glob of all scenes, where the section split makes the splits")
    labels: list[str] = Field(min_length=1, description="globs of label rasters or vector files; later ones lie over earlier ones")
    attribute: str | None = Field(None, description="vector labels: the field that tells the class; its values are the keys of label_map")
    layer: str | None = Field(None, description="vector labels: the layer; null: the only one")
    background: int = Field(255, description="training id of ground that no label covers; 255: ignored")
    exclude: list[str] = Field([], description="globs below the root of scenes to leave out")

    @field_validator("labels", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> GeotiffSource:
        if (self.splits is None) == (self.images is None):
            raise ValueError("splits: give splits with a glob each, or images for all scenes and a section split")
        return self


class ReleasedSource(Section):
    """What the authors' released code reads: an index.jsonl of label, image and prompt per split.

    ``captions: {kind: given}`` takes the prompts.
    """

    kind: Literal["released"]
    root: str = Field(description="the folder that the paths in the index count from")
    splits: dict[Name, str] = Field(description="split name to its index file below the root")


class LoveDASource(Section):
    """LoveDA in its official layout, downloaded from its Zenodo record when it is not there."""

    kind: Literal["loveda"]
    root: str = Field("data/LoveDA", description="the folder that holds, or will hold, Train/ and Val/")
    download: bool = Field(True, description="fetch what is missing; false: refuse to start without it")


class FusuSource(Section):
    """FUSU in either of its layouts, downloaded from the model hub when it is not there."""

    kind: Literal["fusu"]
    root: str = Field("data/FUSU", description="the folder that holds, or will hold, im1/ and im1_label/, or train/im1/, train/label1/ ...")
    download: bool = Field(True, description="fetch what is missing; false: refuse to start without it")
    repo: str = Field("sp-juni/FUSU-Fine_grained_Urban_Semantic_Understanding", pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field("main", pattern=r"^[\w./-]+$", description="commit; a branch is fixed to its commit by the first download")
    date: Literal[1, 2] = Field(1, description="which of the two dates: im1 or im2")
    splits: list[Name] | None = Field(None, description="folders train, val, test if the copy has them; null: the section split makes them")


class GroupSplit(Section):
    """Splits that keep together what belongs together."""

    by: Literal["group"]
    group: str = Field(
        "folder", description="folder (what the globs' folder wildcards stand for) | scene | a regular expression with one group, "
        "searched in the image's path below the root"
    )  # fmt: skip
    shares: dict[Name, Annotated[float, Field(gt=0)]] = Field(min_length=2, description="split name to its share of the scenes")
    seed: int = 0

    @model_validator(mode="after")
    def _one_group(self) -> GroupSplit:
        if self.group not in ("folder", "scene"):
            try:
                groups = re.compile(self.group).groups
            except re.error as error:
                raise ValueError(f"group: {self.group!r} is no regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"group: allowed are folder, scene, or a regular expression with one group (found {self.group!r})")
        return self


class BlockSplit(Section):
    """Splits of ground: square blocks, each wholly in one split, with ground left out between blocks of different splits."""

    by: Literal["blocks"]
    block: Positive = Field(description="least side of a block in pixels of the tiles")
    buffer: int = Field(0, ge=0, description="pixels left out between blocks of different splits")
    shares: dict[Name, Annotated[float, Field(gt=0)]] = Field(min_length=2, description="split name to its share of the ground")
    seed: int = 0


class Scale(Section):
    """From any depth to 0...255, each band by two percentiles of its valid pixels."""

    low: float = Field(2.0, ge=0, lt=100, description="percentile that becomes 0")
    high: float = Field(98.0, gt=0, le=100, description="percentile that becomes 255")
    over: Literal["scene", "dataset"] = Field("scene", description="percentiles of each scene, or of the training split's scenes together")

    @model_validator(mode="after")
    def _rising(self) -> Scale:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} must be below high: {self.high:g}")
        return self


class Tiling(Section):
    """How scenes are cut."""

    size: Positive = Field(description="side of a tile in pixels")
    stride: Positive | None = Field(None, description="distance between tiles; null: the tile size (no overlap)")
    edge: Literal["shift", "pad", "drop"] = Field(
        "shift", description="where tiles do not fit: the last is shifted back, padded with ignored pixels, or left out"
    )
    min_labelled: float = Field(0.0, ge=0, le=1, description="least labelled share of a tile's pixels; tiles without any are never kept")
    bands: list[Positive] | None = Field(
        None,
        description="three bands, counted from 1, for red, green, blue, or one for grey; null: the first three, or the only one",
    )
    scale: Scale | None = Field(None, description="scenes that are not uint8 need it; null: pixels stay as they are")
    ground_distance: float | None = Field(None, gt=0, description="metres per pixel to resample scenes to; null: as they are")
    format: Literal["tif", "png"] | None = Field(None, description="null: GeoTIFF for georeferenced scenes, PNG for others")

    @model_validator(mode="after")
    def _consistent(self) -> Tiling:
        if self.stride and self.stride > self.size:
            raise ValueError(f"stride: {self.stride} with tiles of {self.size} pixels leaves gaps; allowed: 1...{self.size}")
        if self.bands and len(self.bands) not in (1, 3):
            raise ValueError(f"bands: give three bands or one (found {len(self.bands)})")
        return self


class Selection(Section):
    """Which tiles of a split are kept: drawn by the seed, classes present in about the shares of all, fewer always a part of more."""

    tiles: Positive | None = Field(None, description="so many tiles, stratified by class presence")
    fraction: float | None = Field(None, gt=0, le=1, description="this share of the tiles, likewise")
    n_shot: Positive | None = Field(None, description="for each class so many tiles that show it")
    ids: Location | None = Field(None, description="those of a file with one tile id per line")
    seed: int = 0

    @model_validator(mode="after")
    def _one(self) -> Selection:
        if sum(value is not None for value in (self.tiles, self.fraction, self.n_shot, self.ids)) != 1:
            raise ValueError("tiles: give one of tiles, fraction, n_shot and ids")
        return self


def _colour(value: Any) -> Any:
    """A palette entry "#RRGGBB" as [red, green, blue]."""
    if isinstance(value, str):
        if not re.fullmatch(r"#[0-9A-Fa-f]{6}", value):
            raise ValueError(f"{value!r} is no colour; allowed: [red, green, blue] or '#RRGGBB'")
        return tuple(bytes.fromhex(value[1:]))
    return value


Colour = Annotated[tuple[Byte, Byte, Byte], BeforeValidator(_colour)]


class Dataset(Section):
    """One dataset: where its scenes are, its classes and its splits (a file of configs/datasets/)."""

    name: Name
    about: str = Field("", description="source and layout in a sentence or two")
    licence: str = Field("", description="shown at download and in the report, and written into every tile")
    classes: list[Words] = Field(min_length=2, max_length=254, description="class names in order of id 0...K-1")
    palette: list[Colour] = Field(description="one colour per class, for pictures: [red, green, blue] or '#RRGGBB'")
    label_map: dict[int | str, int] | None = Field(
        None,
        description="what labels hold (ids, colours '#RRGGBB', values of the attribute) to training id; 255 = ignored. null: training ids",
    )
    source: EmbeddedSource | FolderSource | GeotiffSource | ReleasedSource | LoveDASource | FusuSource = Field(discriminator="kind")
    split: GroupSplit | BlockSplit | None = Field(None, discriminator="by", description="makes the splits; null: the source has them")
    tile: Tiling
    select: dict[Name, Selection] = Field({}, description="split name to which of its tiles are kept; all where none is named")
    train: Name = Field("train", description="split the generator, the critic and the recipes train on")
    test: Name = Field("test", description="split that is scored; nothing trains on it")
    val: Name | None = Field(None, description="split that chooses the best checkpoint of a segmentor; null: the last one is used")

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of the file."""
        if self.split:
            return list(self.split.shares)
        if isinstance(self.source, LoveDASource):
            return ["train", "val"]
        return list(self.source.scenes if isinstance(self.source, EmbeddedSource) else self.source.splits or [])

    @property
    def tile_label_map(self) -> dict[int | str, int] | None:
        """``label_map`` as tiling applies it: None where listing the scenes has already written training ids."""
        return None if isinstance(self.source, GeotiffSource) else self.label_map

    @model_validator(mode="before")
    @classmethod
    def _label_keys(cls, data: Any) -> Any:
        """Keys of ``label_map``: as text where they are an attribute's values, else whole numbers as ids and colours in capitals."""
        if not isinstance(data, dict) or not isinstance(data.get("label_map"), dict):
            return data
        source, keys = data.get("source"), {}
        as_text = bool(source.get("attribute") if isinstance(source, dict) else getattr(source, "attribute", None))
        for key, new in data["label_map"].items():
            if isinstance(key, bool):
                raise ValueError(f"label_map: YAML reads a key as {key}; write it in quotes, 'yes' or 'true' as the labels have it")
            text = "null" if key is None else str(int(key)) if isinstance(key, float) and key.is_integer() else str(key).strip()
            if not as_text:
                text = int(text) if re.fullmatch(r"-?\d+", text) else text.upper() if re.fullmatch(r"#[0-9A-Fa-f]{6}", text) else text
            if text in keys:
                raise ValueError(f"label_map: {text} occurs twice")
            keys[text] = new
        return data | {"label_map": keys}

    @model_validator(mode="after")
    def _consistent(self) -> Dataset:
        if len(self.palette) != len(self.classes):
            raise ValueError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")
        if repeated := [name for name in self.classes if self.classes.count(name) > 1]:
            raise ValueError(f"classes: {repeated[0]!r} occurs twice")
        if self.split and getattr(self.source, "splits", None):
            raise ValueError("split: the source has splits of its own; leave one of them out")
        if self.split and isinstance(self.source, (EmbeddedSource, ReleasedSource, LoveDASource)):
            raise ValueError(f"split: a source of kind {self.source.kind} has splits of its own; leave this out")
        if not self.splits:
            raise ValueError("split: the source has no splits; add the section split, or splits to the source")
        for key in ("train", "test", "val"):
            if (name := getattr(self, key)) is not None and name not in self.splits:
                raise ValueError(f"{key}: {name!r} is no split of the source; it has: {', '.join(self.splits)}")
        if self.val in (self.train, self.test):
            raise ValueError(
                f"val: {self.val!r} is trained on or scored; a checkpoint chosen there would flatter itself; name another split"
            )
        if unknown := [name for name in self.select if name not in self.splits]:
            raise ValueError(f"select: {unknown[0]!r} is no split of the source; it has: {', '.join(self.splits)}")
        for raw, new in (self.label_map or {}).items():
            if new != 255 and not 0 <= new < len(self.classes):
                raise ValueError(f"label_map: {raw} -> {new} is no class id; allowed: 0...{len(self.classes) - 1} and 255")
        self._check_labels()
        if isinstance(self.split, BlockSplit) and self.tile.scale and self.tile.scale.over == "dataset":
            raise ValueError("tile.scale.over: with a split by blocks no scene is for training alone; set it to scene")
        if isinstance(self.split, BlockSplit) and self.split.block < self.tile.size + self.split.buffer:
            raise ValueError(f"split.block: {self.split.block} is less than a tile of {self.tile.size} and a buffer of {self.split.buffer}")
        return self

    def _check_labels(self) -> None:
        source, texts = self.source, [key for key in self.label_map or {} if isinstance(key, str)]
        if isinstance(source, GeotiffSource):
            if source.background != 255 and not 0 <= source.background < len(self.classes):
                raise ValueError(f"source.background: {source.background} is no class id; allowed: 0...{len(self.classes) - 1} and 255")
            if source.attribute and not self.label_map:
                raise ValueError(f"label_map: give the training id of each value of the attribute {source.attribute}")
            if texts and not source.attribute:
                raise ValueError(f"label_map: {texts[0]!r} is no id; set source.attribute if the labels are polygons")
            return
        if wrong := [key for key in texts if not key.startswith("#")]:
            raise ValueError(f"label_map: {wrong[0]!r} is neither an id nor a colour '#RRGGBB'")
        if texts and len(texts) < len(self.label_map):
            raise ValueError("label_map: holds ids and colours; give one kind")


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
    path: Location = Field(description="the folder that holds model_index.json")


class HubBase(Section):
    """SD3.5 from the model hub, downloaded once into a diffusers pipeline folder; HF_TOKEN gives access to gated models."""

    kind: Literal["hub"]
    repo: str = Field("stabilityai/stable-diffusion-3.5-medium", pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME on the hub")
    revision: str = Field(
        "b940f670f0eda2d07fbb75229e779da1ad11eb80", pattern=r"^[0-9a-f]{40}$", description="commit, so that every run gets the same files"
    )
    path: Location = Field("models/stable-diffusion-3.5-medium", description="folder to download to")


class Model(Section):
    """A folder of a transformers model, or what it is downloaded from."""

    path: Location | None = Field(None, description="its folder; with repo the folder to download to, null: models/NAME")
    repo: str | None = Field(None, pattern=r"^[\w.-]+/\w[\w.-]*$", description="OWNER/NAME on the hub; null: the folder is there already")
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="commit, with repo, so that every run gets the same files")

    @property
    def folder(self) -> str:
        """Where the model is, or will be downloaded to."""
        return self.path or f"models/{self.repo.split('/')[1]}"

    @model_validator(mode="after")
    def _one_place(self) -> Model:
        if not (self.path or self.repo):
            raise ValueError("path: give the model's folder, or repo and revision of one on the model hub")
        if (self.repo is None) != (self.revision is None):
            raise ValueError("revision: repo and revision go together; give the commit (40 hexadecimal digits) to download")
        return self


class CaptionModel(Model):
    """A vision-language model of transformers (any that takes an image and a text and gives text), asked for the captions."""

    prompt: str = Field(
        "Describe this satellite image in one sentence.",
        pattern=r"\S",
        description="what it is asked; a model without a chat template may need its sign for the image in it, such as <image>",
    )
    max_new_tokens: Positive = Field(60, description="an answer is cut after so many tokens")
    batch_size: Positive = Field(8, description="images asked about together")


class Captions(Section):
    """Text that goes with a tile: the prompt its image is drawn from."""

    kind: Literal["template", "given", "vlm"] = Field(
        "template", description="template | given (prompts that come with the dataset) | vlm (a vision-language model describes the image)"
    )
    template: str = Field(
        "a satellite image of {classes}",
        description="{classes}: names of the classes present, in order of id; {shares}, {words}: with their shares of the labelled pixels "
        "in percent or in words, the largest first. With the other kinds it captions the windows of whole scenes, which are no tiles",
    )
    model: CaptionModel | None = Field(None, description="kind vlm: the model that is asked")

    @model_validator(mode="after")
    def _consistent(self) -> Captions:
        places = re.findall(r"\{(classes|shares|words)\}", self.template)
        others = re.search(r"[{}]", re.sub(r"\{(classes|shares|words)\}", "", self.template))
        if not places or len(set(places)) < len(places) or others:
            raise ValueError("template: must hold {classes}, {shares} or {words}, each at most once, and no other braces")
        if self.kind == "vlm" and not self.model:
            raise ValueError("model: kind vlm needs a model; give its path, or repo and revision")
        if self.model and self.kind != "vlm":
            raise ValueError(f"model: is not asked with kind {self.kind}; set kind: vlm, or leave it out")
        return self


class LoRA(Section):
    """Low-rank updates of linear layers instead of training them whole; the saved generator has them added in."""

    rank: Positive = 64
    alpha: float = Field(64, gt=0, description="the update is scaled by alpha / rank")
    branches: list[Literal["image", "mask"]] = Field(["image"], min_length=1, description="trained branches that get low-rank updates")


class Control(Section):
    """How the mask steers the generator, and how that is trained."""

    MEANS = frozenset({"parallel", "gradient_checkpointing", "compile", "checkpoint_every", "keep_checkpoints"})

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
    start_from: Location | None = Field(
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
    ascend: Annotated[
        bool, Field(description="Add the gradient instead of taking it away, as releases before 2026-02-04 did; for comparison only.")
    ] = False
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
        alone = not (self.shrink or self.clamp or self.ascend) and (self.normalise, self.pixels, self.inner_steps) == (
            "relative",
            "valid",
            1,
        )
        if self.search == "backtracking" and not alone:
            raise ValueError(
                "search: backtracking needs normalise: relative, pixels: valid, one inner step, and no shrink, clamp or ascend"
            )

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

    MEANS = frozenset({"batch_size", "compile", "pad"})

    num_steps: Positive = Field(23, description="Euler steps")
    preset: Preset | None = Field(None, description="settings of the correction to start from; null: none")
    rectify: dict[str, Any] = Field({}, description="fields of RectifySettings that differ from the preset")
    batch_size: Positive = Field(8, description="images sampled together")
    guidance_scale: float = Field(1.0, ge=1, description="classifier-free guidance; above 1 the generator needs caption_dropout")
    pad: bool = Field(False, description="pad masks that the latent grid does not divide, and crop their images; false: refuse them")
    compile: Literal["default", "reduce-overhead"] | None = Field(
        None, description="torch.compile of the transformer's blocks; reduce-overhead: with CUDA graphs"
    )
    critic_decoder: Location | None = Field(
        None, description="folder of a smaller diffusers decoder for the same latents, which the critic looks through; null: the VAE"
    )

    @property
    def rectification(self) -> RectifySettings | None:
        """The correction's settings, None when there is none."""
        if self.preset is None:
            return None
        return PRESETS[self.preset](**self.rectify)

    def without_effect(self) -> frozenset[str]:
        """All of :attr:`MEANS`; without the batch size where the correction divides by it."""
        correction = self.rectification
        return self.MEANS - ({"batch_size"} if correction and correction.reduction == "mean" else set())

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


class Download(Section):
    """A file of weights with a fixed content."""

    url: str = Field(pattern=r"^https?://", description="where it is fetched from, once")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{8,64}$", description="checksum, whole or its first digits, which model zoos put into file names"
    )
    path: Location | None = Field(None, description="the file to download to; null: models/ and the name in the url")

    @model_validator(mode="after")  # of the section: a fault of the key itself would be told with its value
    def _no_secret(self) -> Download:
        if re.search(r"//[^/?#]*@|[?&][^=&]*(token|key|sig|secret|passw|auth|credential)[^=&]*=", self.url, re.IGNORECASE):
            raise ValueError("url: holds a password or token, which the report would show; fetch the file by hand and give its path")
        return self

    @property
    def file(self) -> str:
        """Where the weights are, or will be downloaded to."""
        return self.path or f"models/{self.url.split('?')[0].rsplit('/', 1)[-1]}"


class Segmentor(Section):
    """A segmentation model and how it is trained."""

    MEANS = frozenset({"checkpoint_every"})

    architecture: (
        Literal["segformer_tiny", "unet_tiny", "pspnet_r50", "segformer_b2", "upernet_convnext_t", "deeplabv3plus_r50"] | None
    ) = Field(None, description="a model known by name; null: that of config")  # fmt: skip
    config: Location | None = Field(None, description="instead: a configuration file of mmsegmentation, whose model is taken, read as data")
    iterations: Positive = Field(description="length of the 1x schedule")
    batch_size: int = Field(ge=2, description="tiles per iteration, of all processes together; one is too few for batch normalisation")
    learning_rate: float = Field(gt=0)
    optimiser: Literal["AdamW", "SGD"] = "AdamW"
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0, description="iterations of linear warm-up; after it the rate falls as poly")
    poly_power: float = Field(0.9, gt=0)
    class_weights: Literal["median_frequency"] | list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="of the loss: median frequency / frequency of each class among the pixels trained on, or one number per class"
    )
    pretrained: Location | Download | None = Field(None, description="file of backbone weights, or url and sha256 of one; null: none")
    precision: Literal["no", "bf16"] = Field("no", description="bf16: automatic mixed precision; weights stay float32")
    processes: Positive = Field(1, description="each on a GPU of its own")
    checkpoint_every: Positive = Field(500, description="iterations between checkpoints to resume from")
    validate_every: Positive | None = Field(
        None, description="iterations between looks at the dataset's split val, where it names one; null: a tenth of all"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Segmentor:
        if (self.architecture is None) == (self.config is None):
            raise ValueError("architecture: give the name of one, or config, a configuration file of mmsegmentation")
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size: {self.batch_size} tiles cannot be shared out evenly over {self.processes} processes")
        if isinstance(self.class_weights, list) and not any(self.class_weights):
            raise ValueError("class_weights: all are 0; nothing would be learned")
        return self


class Judge(Section):
    """Which trained segmentor judges or guides: one that the workflow trains, or one from elsewhere."""

    recipe: Name | None = Field(None, description="recipe it is trained on")
    segmentor: Name | None = None
    seed: int = 0
    path: Location | None = Field(
        None, description="instead: a checkpoint of mmsegmentation, or a folder of a transformers model for semantic segmentation"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Judge:
        trained = [name for name in ("recipe", "segmentor") if getattr(self, name) is not None]
        if len(trained) != (0 if self.path else 2):
            raise ValueError("recipe: give recipe and segmentor of one to train, or the path of one from elsewhere")
        return self


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


class Table(Section):
    """Recipes that are compared."""

    title: str
    recipes: list[Name] = Field(min_length=1)
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


class Evaluation(Section):
    """How a trained segmentor looks at tiles and scenes."""

    MEANS = frozenset({"batch_size"})

    mode: Literal["whole", "slide"] = Field("whole", description="whole tiles, or windows of the side window whose logits are averaged")
    window: Positive | None = Field(None, description="side in pixels, for mode slide and for whole scenes; null: the tile size")
    stride: Positive | None = Field(None, description="distance between windows; null: two thirds of the window")
    scales: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0], min_length=1, description="test-time augmentation: probabilities are averaged over these"
    )
    flip: bool = Field(False, description="test-time augmentation: and over the image as it is and mirrored")
    batch_size: Positive = Field(16, description="tiles or windows looked at together")

    @model_validator(mode="after")
    def _no_gaps(self) -> Evaluation:
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(f"stride: {self.stride} with windows of {self.window} pixels leaves gaps; allowed: 1...{self.window}")
        return self


class Generation(Section):
    """How samples are compared with real tiles: distance of their distributions, copies of training tiles, diversity."""

    MEANS = frozenset({"batch_size"})

    features: Literal["inception", "clip", "judge"] = Field(
        "judge", description="what distances are measured in: inception (FID, KID), clip, or the judge's deepest features (small scale)"
    )
    weights: Location | Download | None = Field(
        None, description="inception: file of its weights (pt_inception, converted from TensorFlow), or url and sha256; missing: no FID"
    )
    cmmd: bool = Field(False, description="also the maximum mean discrepancy of CLIP embeddings (CMMD); needs the section clip")
    split: Name | None = Field(None, description="real tiles that samples are compared with; null: those trained on")
    subset: Positive = Field(100, description="KID: tiles per subset")
    batch_size: Positive = 16


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


#: The kinds that pydantic puts between the keys of a fault's location.
KINDS = {
    "base_model": ("embedded", "folder", "hub"),
    "source": ("embedded", "folder", "geotiff", "released", "loveda", "fusu"),
    "split": ("group", "blocks"),
}


def _keys_of(location: tuple) -> Iterator[str]:
    """The keys of a fault's location, without the kinds and types that pydantic puts between them."""
    for before, part in zip(("", *location), location, strict=False):
        is_kind = part in KINDS.get(before, ())
        if not is_kind and not re.match(r"constrained-|literal\[|function-", str(part)):
            yield str(part)


def _allowed_keys(model_name: str, location: tuple) -> list[str]:
    """Keys allowed in the section at ``location``, found by walking the schema the models give."""
    schema = {"Settings": Settings, "Dataset": Dataset}[model_name].model_json_schema()
    node = schema

    def resolve(node: dict) -> dict:
        while "$ref" in node or "anyOf" in node:
            if "anyOf" in node:  # one or null
                node = next(option for option in node["anyOf"] if option.get("type") != "null")
            else:
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
    """Read a dataset file; with ``like: NAME`` it takes what it does not say itself from the file NAME.yaml beside it.

    Raises ConfigError when it is missing, not YAML or not a valid dataset.
    """
    content = _read_dataset(Path(path))
    try:
        return Dataset.model_validate(content)
    except ValidationError as error:
        raise _explain(str(path), error) from None


def _read_dataset(path: Path, liked: tuple[Path, ...] = ()) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"datasets: no file {path}; allowed: a path, or one of {known or '(no files there)'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no keys; write a dataset as in configs/datasets/folder.yaml")
    if (other := content.pop("like", None)) is None:
        return content
    if path in liked or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(other)):
        raise ConfigError(f"{path}: like: {other!r} {'goes in a circle' if path in liked else 'is no name'}; name a dataset file beside it")
    return _read_dataset(path.parent / f"{other}.yaml", (*liked, path)) | content


def load_datasets(settings: Settings, root: Path | str) -> dict[str, Dataset]:
    """Read the dataset files that ``settings.datasets`` names (below ``root``/configs/datasets, or as paths), and those that only its
    experiments name, and check that what the settings say of splits and classes fits each of those that the run uses."""
    folder = Path(root) / "configs" / "datasets"
    datasets: dict[str, Dataset] = {}
    for entry in settings.datasets:
        dataset = load_dataset(entry if entry.endswith(".yaml") else folder / f"{entry}.yaml")
        if dataset.name in datasets:
            raise ConfigError(f"datasets: the name {dataset.name!r} occurs twice ({entry})")
        datasets[dataset.name] = dataset
    for key, table in settings.experiments.items():
        for name in table.datasets or []:
            if name not in datasets:
                dataset = load_dataset(folder / f"{name}.yaml")
                if dataset.name != name:
                    raise ConfigError(f"experiments.{key}.datasets: {folder / name}.yaml is named {dataset.name!r}; let both be the same")
                datasets[name] = dataset
    compared = [name for table in settings.selected.values() for name in table.datasets or []]
    for name in dict.fromkeys([*list(datasets)[: len(settings.datasets)], *compared]):
        _check_fit(settings, datasets[name])
    return datasets


def _check_fit(settings: Settings, dataset: Dataset) -> None:
    """Raise ConfigError when the settings name splits or classes that the dataset does not have, or train on its test split."""
    named = {f"recipes.{name}.split": recipe.split or dataset.train for name, recipe in settings.recipes.items()}
    named |= {f"filters.{name}.statistics_split": one.statistics_split for name, one in settings.filters.items()}
    for key, split in named.items():
        if split is not None and split not in dataset.splits:
            raise ConfigError(f"{key}: {dataset.name} has no split {split!r}; allowed: {', '.join(dataset.splits)}")
        if split == dataset.test:
            raise ConfigError(f"{key}: {split!r} is the test split of {dataset.name}; nothing may train on it")
    looked = settings.evaluation
    if looked.stride and looked.stride > (looked.window or dataset.tile.size):
        raise ConfigError(
            f"evaluation.stride: {looked.stride} with windows of {dataset.name}'s tile size, {dataset.tile.size}, leaves gaps"
        )
    if settings.generation.split not in (None, *dataset.splits):
        raise ConfigError(
            f"generation.split: {dataset.name} has no split {settings.generation.split!r}; allowed: {', '.join(dataset.splits)}"
        )
    for name, resampling in settings.resamplings.items():
        if unknown := [one for one in resampling.classes or [] if one not in dataset.classes]:
            raise ConfigError(
                f"resamplings.{name}.classes: {dataset.name} has no class {unknown[0]!r}; allowed: {', '.join(dataset.classes)}"
            )
    for name, segmentor in settings.segmentors.items():
        if isinstance(segmentor.class_weights, list) and len(segmentor.class_weights) != len(dataset.classes):
            raise ConfigError(
                f"segmentors.{name}.class_weights: {len(segmentor.class_weights)} numbers for the {len(dataset.classes)} classes of "
                f"{dataset.name}; give one per class"
            )


def json_schema() -> str:
    """The configuration's JSON schema, as written to configs/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
