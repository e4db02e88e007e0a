"""Datasets: where their scenes lie, which splits they have, how scenes are cut into tiles and which tiles are kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from crfm_core.settings.base import Byte, Location, Name, Positive, Section, Words
from crfm_core.settings.sources import AnySource

#: The split of tiles that have no labels.
UNLABELLED = "unlabelled"
#: The name of the same tiles with labels of the critic.
PSEUDO = "pseudo"


class Split(Section):
    """What all ways of making splits have in common."""

    #: Scenes are cut: one scene can have ground in several splits.
    CUTS_SCENES: ClassVar[bool] = False

    shares: dict[Name, Annotated[float, Field(gt=0)]] = Field(
        min_length=2, description="split name to its share of the scenes or of the ground"
    )
    seed: int = Field(0, description="seed of the assignment")


class GroupSplit(Split):
    """Splits that keep together what belongs together."""

    by: Literal["group"] = Field(description="how the splits are made")
    group: str = Field(
        "folder", description="folder (what the globs' folder wildcards stand for) | scene | a regular expression with one group, "
        "searched in the image's path below the root"
    )  # fmt: skip

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


class BlockSplit(Split):
    """Splits of ground: square blocks, each wholly in one split, with ground left out between blocks of different splits."""

    CUTS_SCENES = True

    by: Literal["blocks"] = Field(description="how the splits are made")
    block: Positive = Field(description="smallest side of a block in pixels of the tiles")
    buffer: int = Field(0, ge=0, description="pixels left out between blocks of different splits")


AnySplit = Annotated[GroupSplit | BlockSplit, Field(discriminator="by")]


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
    """How scenes are cut into tiles."""

    size: Positive = Field(description="side of a tile in pixels")
    stride: Positive | None = Field(None, description="distance between tiles; null: the tile size (no overlap)")
    edge: Literal["shift", "pad", "drop"] = Field(
        "shift", description="where tiles do not fit: the last is shifted back, padded with ignored pixels, or left out"
    )
    min_labelled: float = Field(
        0.0, ge=0, le=1, description="smallest labelled share of a tile's pixels; tiles without labels are never kept"
    )
    bands: list[Positive] | None = Field(
        None,
        description="three bands, counted from 1, for red, green, blue, or one for grey; null: the first three, or the only one",
    )
    scale: Scale | None = Field(None, description="needed by scenes that are not uint8; null: pixels stay as they are")
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

    tiles: Positive | None = Field(None, description="number of tiles, stratified by class presence")
    fraction: float | None = Field(None, gt=0, le=1, description="share of the tiles, stratified likewise")
    n_shot: Positive | None = Field(None, description="number of tiles for each class that show it")
    ids: Location | None = Field(None, description="file with one tile id per line: these tiles")
    seed: int = Field(0, description="seed of the draw")
    rest_of: Name | None = Field(
        None,
        description="makes a split of its own: of this split's tiles those that its own selection leaves out, and that overlap none of it",
    )

    @model_validator(mode="after")
    def _one(self) -> Selection:
        if sum(value is not None for value in (self.tiles, self.fraction, self.n_shot, self.ids)) != 1:
            raise ValueError("tiles: give one of tiles, fraction, n_shot and ids")
        if self.rest_of and self.ids:
            raise ValueError("rest_of: a list of ids says itself which tiles are taken; leave one of the two out")
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

    name: Name = Field(description="name of the dataset in paths and reports")
    about: str = Field("", description="source and layout in a sentence or two")
    licence: str = Field("", description="shown at download and in the report, and written into every tile")
    classes: list[Words] = Field(min_length=2, max_length=254, description="class names in order of id 0...K-1")
    palette: list[Colour] = Field(description="one colour per class, for pictures: [red, green, blue] or '#RRGGBB'")
    label_map: dict[int | str, int] | None = Field(
        None,
        description="from what labels contain (ids, colours '#RRGGBB', values of the attribute) to training ids; 255: ignored. "
        "null: labels hold training ids",
    )
    source: AnySource = Field(description="where the scenes are")
    split: AnySplit | None = Field(None, description="makes the splits; null: the source has them")
    tile: Tiling = Field(description="how scenes are cut into tiles")
    select: dict[Name, Selection] = Field(
        {}, description="split name to which of its tiles are kept; splits not listed keep all; unlabelled ones are drawn"
    )
    train: Name = Field("train", description="split the generator, the critic and the recipes train on")
    test: Name = Field("test", description="split that is scored; nothing trains on it")
    val: Name | None = Field(None, description="split that chooses the best checkpoint of a segmentor; null: the last one is used")
    held_out: Name | None = Field(
        None,
        description="split on whose masks generators are validated and forms of the correction are compared; nothing trains on it. "
        "null: val; without val, too, both are left out",
    )

    @property
    def splits(self) -> list[str]:
        """Names of the labelled splits, in the order of the file; those that a selection makes of another one's rest come last."""
        own = list(self.split.shares) if self.split else self.source.split_names()
        return own + [name for name, selection in self.select.items() if selection.rest_of and name not in own]

    def scenes_split(self, split: str) -> str:
        """The split whose scenes a split is cut from: itself, or the one whose rest it is."""
        selection = self.select.get(split)
        return selection.rest_of if selection and selection.rest_of else split

    @property
    def has_unlabelled(self) -> bool:
        """Whether it has scenes without labels, which are the split :data:`UNLABELLED`."""
        return getattr(self.source, "unlabelled", None) is not None

    @property
    def held_out_split(self) -> str | None:
        """The split that is looked at where something is chosen; None where there is none."""
        return self.held_out or self.val

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
        source = data.get("source")
        keys: dict[int | str, Any] = {}
        as_text = bool(source.get("attribute") if isinstance(source, dict) else getattr(source, "attribute", None))
        for key, new in data["label_map"].items():
            if isinstance(key, bool):
                raise ValueError(f"label_map: YAML reads a key as {key}; write it in quotes, 'yes' or 'true' as the labels have it")
            text = "null" if key is None else str(int(key)) if isinstance(key, float) and key.is_integer() else str(key).strip()
            if not as_text and re.fullmatch(r"#[0-9A-Fa-f]{6}", text):
                text = text.upper()
            label = int(text) if not as_text and re.fullmatch(r"-?\d+", text) else text
            if label in keys:
                raise ValueError(f"label_map: {label} occurs twice")
            keys[label] = new
        return data | {"label_map": keys}

    @model_validator(mode="after")
    def _consistent(self) -> Dataset:
        self._check_classes()
        self._check_splits()
        self._check_unlabelled()
        self._check_label_map()
        self._check_blocks()
        return self

    def _check_classes(self) -> None:
        if len(self.palette) != len(self.classes):
            raise ValueError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")
        if repeated := [name for name in self.classes if self.classes.count(name) > 1]:
            raise ValueError(f"classes: {repeated[0]!r} occurs twice")

    def _check_splits(self) -> None:
        if self.split and (own := self.source.split_names()):
            raise ValueError(f"split: a source of kind {self.source.kind} has splits of its own here ({', '.join(own)}); leave one out")
        if not self.splits:
            raise ValueError("split: the source has no splits; add the section split, or splits to the source")
        named = {key: name for key in ("train", "test", "val", "held_out") if (name := getattr(self, key)) is not None}
        for key, name in [*named.items(), *(("select", name) for name in self.select if name != UNLABELLED)]:
            if name not in self.splits:
                raise ValueError(f"{key}: {name!r} is no split of the source; it has: {', '.join(self.splits)}")
        if self.val in (self.train, self.test):
            raise ValueError(
                f"val: {self.val!r} is trained on or scored; a checkpoint chosen there would flatter itself; name another split"
            )
        if self.held_out in (self.train, self.test):
            raise ValueError(
                f"held_out: {self.held_out!r} is trained on or scored; what is chosen there would flatter itself; name another"
            )
        own = list(self.split.shares) if self.split else self.source.split_names()
        for name, selection in self.select.items():
            if (base := selection.rest_of) is None:
                continue
            if name in own:
                raise ValueError(f"select.{name}.rest_of: {name!r} is a split already; give the rest of {base} another name")
            if base not in own or base not in self.select:
                raise ValueError(f"select.{name}.rest_of: needs a split of which `select` keeps some tiles (found {base!r})")

    def _check_unlabelled(self) -> None:
        own = list(self.split.shares) if self.split else self.source.split_names()
        if UNLABELLED in own:
            raise ValueError(f"split: the name {UNLABELLED!r} is that of the scenes in source.unlabelled; give the labelled split another")
        if (selection := self.select.get(UNLABELLED)) is None:
            return
        if selection.rest_of:
            raise ValueError(f"select.{UNLABELLED}.rest_of: the rest of {selection.rest_of} has labels; give it another name")
        if not self.has_unlabelled:
            raise ValueError(f"select.{UNLABELLED}: source.unlabelled names no scenes; set it, or leave out the selection")
        if selection.n_shot:
            raise ValueError(f"select.{UNLABELLED}.n_shot: tiles without labels show no known class; give tiles or fraction")

    def _check_label_map(self) -> None:
        for raw, new in (self.label_map or {}).items():
            if new != 255 and not 0 <= new < len(self.classes):
                raise ValueError(f"label_map: {raw} -> {new} is no class id; allowed: 0...{len(self.classes) - 1} and 255")
        self.source.check_labels(self.label_map or {}, len(self.classes))

    def _check_blocks(self) -> None:
        if not isinstance(self.split, BlockSplit):
            return
        if self.tile.scale and self.tile.scale.over == "dataset":
            raise ValueError("tile.scale.over: with a split by blocks no scene is for training alone; set it to scene")
        if self.split.block < self.tile.size + self.split.buffer:
            raise ValueError(f"split.block: {self.split.block} is less than a tile of {self.tile.size} and a buffer of {self.split.buffer}")
