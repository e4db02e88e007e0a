"""Datasets: where their scenes lie, which splits they have, how scenes are cut into tiles and which tiles are kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from crfm_core.settings.base import Byte, Location, Name, Positive, Section, Words


class Source(Section):
    """Where scenes come from. Each kind is a subclass here, and has a module of its name in crfm_core.data.sources."""

    #: Whether it can be downloaded; its keys are then ``root`` and ``download``, among others.
    CAN_DOWNLOAD: ClassVar[bool] = False
    #: Whether it has images that a server of its own scores.
    HAS_SERVER: ClassVar[bool] = False
    #: Whether listing its scenes writes their labels, of training ids.
    WRITES_LABELS: ClassVar[bool] = False
    #: Whether its scenes come with prompts.
    HAS_PROMPTS: ClassVar[bool] = False

    def split_names(self) -> list[str]:
        """Names of its own splits, in their order; none where the dataset's section ``split`` makes them."""
        return list(getattr(self, "splits", None) or [])


class EmbeddedSource(Source):
    """Scenes drawn by the package itself."""

    kind: Literal["embedded"]
    scenes: dict[Name, Positive] = Field(description="how many scenes to draw per split")
    size: Positive = Field(256, description="side of a scene in pixels of 0.3 m")
    seed: int = Field(0, description="another seed is another world")

    def split_names(self) -> list[str]:
        return list(self.scenes)


class FolderSplit(Section):
    """Where the scenes of one split lie."""

    images: str = Field(description="glob of image files below the root, e.g. Train/*/images_png/*.png")
    labels: str = Field(description="glob of label rasters below the root; paired with the images by file stem and parent order")


class FolderSource(Source):
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


class GeotiffSource(Source):
    """Georeferenced scenes, and labels that lie elsewhere: rasters of another grid, or polygons with an attribute."""

    WRITES_LABELS = True

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


class ReleasedSource(Source):
    """What the authors' released code reads: an index.jsonl of label, image and prompt per split.

    ``captions: {kind: given}`` takes the prompts.
    """

    HAS_PROMPTS = True

    kind: Literal["released"]
    root: str = Field(description="the folder that the paths in the index count from")
    splits: dict[Name, str] = Field(description="split name to its index file below the root")


class LoveDASource(Source):
    """LoveDA in its official layout, downloaded from its Zenodo record when it is not there."""

    CAN_DOWNLOAD = True
    HAS_SERVER = True

    kind: Literal["loveda"]
    root: str = Field("data/LoveDA", description="the folder that holds, or will hold, Train/ and Val/")
    download: bool = Field(True, description="fetch what is missing; false: refuse to start without it")

    def split_names(self) -> list[str]:
        return ["train", "val"]


class FusuSource(Source):
    """FUSU in either of its layouts, downloaded from the model hub when it is not there."""

    CAN_DOWNLOAD = True

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
        return list(self.split.shares) if self.split else self.source.split_names()

    @property
    def tile_label_map(self) -> dict[int | str, int] | None:
        """``label_map`` as tiling applies it: None where listing the scenes has already written training ids."""
        return None if self.source.WRITES_LABELS else self.label_map

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
        if self.split and self.source.split_names():
            raise ValueError("split: the source has splits of its own; leave one of them out")
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
