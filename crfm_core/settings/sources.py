"""Where the scenes of a dataset come from: one class per kind of source, with what is known of the kind without reading any data.

What finds and lists the scenes of a kind is in :mod:`crfm_core.data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from crfm_core.settings.base import Name, Positive, Section

#: One glob or several.
Globs = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)]
UNLABELLED_GLOBS = "glob of images without labels below the root, or a list of globs; they become the split unlabelled"


class Source(Section):
    """What all kinds of source have in common."""

    #: Whether it can be downloaded; its keys are then ``root`` and ``download``, among others.
    CAN_DOWNLOAD: ClassVar[bool] = False
    #: Whether it has images that a server of its own scores.
    HAS_SERVER: ClassVar[bool] = False
    #: Whether listing its scenes writes their labels, of training ids; tiling then applies no label map.
    WRITES_LABELS: ClassVar[bool] = False
    #: Whether its scenes come with prompts.
    HAS_PROMPTS: ClassVar[bool] = False

    def split_names(self) -> list[str]:
        """Splits that the source itself defines, in their order; empty where the section ``split`` has to make them."""
        return list(getattr(self, "splits", None) or [])

    def check_labels(self, label_map: Mapping[int | str, int], num_classes: int) -> None:
        """Raise ValueError where the label map does not fit what the labels of this source contain."""
        texts = [key for key in label_map if isinstance(key, str)]
        if wrong := [key for key in texts if not key.startswith("#")]:
            raise ValueError(f"label_map: {wrong[0]!r} is neither an id nor a colour '#RRGGBB'")
        if texts and len(texts) < len(label_map):
            raise ValueError("label_map: contains ids and colours; use one of the two")


class EmbeddedSource(Source):
    """Scenes drawn by the package itself."""

    kind: Literal["embedded"] = Field(description="kind of source")
    scenes: dict[Name, Positive] = Field(description="number of scenes to draw per split")
    size: Positive = Field(256, description="side of a scene in pixels of 0.3 m")
    seed: int = Field(0, description="seed of the drawn world")
    country: Literal["home", "other"] = Field(
        "home", description="home: all scenes are of one kind of country | other: each is of another, of far wider variety, to pre-train on"
    )
    unlabelled: Positive | None = Field(None, description="number of scenes to draw without labels; they become the split unlabelled")

    def split_names(self) -> list[str]:
        return list(self.scenes)


class FolderSplit(Section):
    """Where the scenes of one split are."""

    images: str = Field(description="glob of image files below the root, e.g. Train/*/images_png/*.png")
    labels: str = Field(description="glob of label rasters below the root; paired with the images by file stem and parent order")


class FolderSource(Source):
    """Images and label rasters on the same grid, as ids or as colours, in a folder."""

    kind: Literal["folder"] = Field(description="kind of source")
    root: str = Field(description="the folder; relative to where the workflow runs")
    splits: dict[Name, FolderSplit] | None = Field(
        None, description="split name to its files; null: give images and labels, and the section split"
    )
    images: str | None = Field(None, description="glob of all images, where the section split makes the splits")
    labels: str | None = Field(None, description="glob of all label rasters, where the section split makes the splits")
    label_suffix: str = Field("", description="what follows the image's stem in the stem of its label, e.g. _label")
    exclude: list[str] = Field([], description="globs below the root of images to leave out")
    unlabelled: Globs | None = Field(None, description=UNLABELLED_GLOBS)

    @model_validator(mode="after")
    def _consistent(self) -> FolderSource:
        if (self.images is None) != (self.labels is None) or (self.splits is None) == (self.images is None):
            raise ValueError("splits: give splits with images and labels each, or images and labels for all scenes and a section split")
        return self


class GeotiffSource(Source):
    """Georeferenced scenes with labels from elsewhere: rasters of another grid, or polygons with an attribute."""

    WRITES_LABELS = True

    kind: Literal["geotiff"] = Field(description="kind of source")
    root: str = Field(description="the folder; relative to where the workflow runs")
    splits: dict[Name, str] | None = Field(None, description="split name to a glob of its scenes; null: give images, and the section split")
    images: str | None = Field(None, description="glob of all scenes, where the section split makes the splits")
    labels: list[str] = Field(min_length=1, description="globs of label rasters or vector files; later ones cover earlier ones")
    attribute: str | None = Field(None, description="vector labels: the field that holds the class; its values are the keys of label_map")
    layer: str | None = Field(None, description="vector labels: the layer; null: the only one")
    background: int = Field(255, description="training id of ground that no label covers; 255: ignored")
    exclude: list[str] = Field([], description="globs below the root of scenes to leave out")
    unlabelled: Globs | None = Field(None, description=UNLABELLED_GLOBS)

    @field_validator("labels", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> GeotiffSource:
        if (self.splits is None) == (self.images is None):
            raise ValueError("splits: give splits with a glob each, or images for all scenes and a section split")
        return self

    def check_labels(self, label_map: Mapping[int | str, int], num_classes: int) -> None:
        if self.background != 255 and not 0 <= self.background < num_classes:
            raise ValueError(f"source.background: {self.background} is no class id; allowed: 0...{num_classes - 1} and 255")
        if self.attribute and not label_map:
            raise ValueError(f"label_map: give the training id of each value of the attribute {self.attribute}")
        texts = [key for key in label_map if isinstance(key, str)]
        if texts and not self.attribute:
            raise ValueError(f"label_map: {texts[0]!r} is no id; set source.attribute if the labels are polygons")


class ReleasedSource(Source):
    """What the authors' released code reads: an index.jsonl of label, image and prompt per split."""

    HAS_PROMPTS = True

    kind: Literal["released"] = Field(description="kind of source")
    root: str = Field(description="the folder that the paths in the index start from")
    splits: dict[Name, str] = Field(description="split name to its index file below the root")
    unlabelled: Globs | None = Field(None, description=UNLABELLED_GLOBS)


class LoveDASource(Source):
    """LoveDA in its official layout, downloaded from its Zenodo record when it is not there."""

    CAN_DOWNLOAD = True
    HAS_SERVER = True

    kind: Literal["loveda"] = Field(description="kind of source")
    root: str = Field("data/LoveDA", description="the folder that holds, or will hold, Train/ and Val/")
    download: bool = Field(True, description="download what is missing; false: refuse to start without it")
    unlabelled: Globs | None = Field(None, description=UNLABELLED_GLOBS)

    def split_names(self) -> list[str]:
        return ["train", "val"]


class FusuSource(Source):
    """FUSU in either of its layouts, downloaded from the model hub when it is not there."""

    CAN_DOWNLOAD = True

    kind: Literal["fusu"] = Field(description="kind of source")
    root: str = Field("data/FUSU", description="the folder that holds, or will hold, im1/ and im1_label/, or train/im1/, train/label1/ ...")
    download: bool = Field(True, description="download what is missing; false: refuse to start without it")
    repo: str = Field(
        "sp-juni/FUSU-Fine_grained_Urban_Semantic_Understanding",
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="dataset repository OWNER/NAME on the hub",
    )
    revision: str = Field("main", pattern=r"^[\w./-]+$", description="commit; a branch is fixed to its commit by the first download")
    date: Literal[1, 2] = Field(1, description="which of the two dates: im1 or im2")
    splits: list[Name] | None = Field(None, description="folders train, val, test if the copy has them; null: the section split makes them")
    unlabelled: Globs | None = Field(None, description=UNLABELLED_GLOBS)


AnySource = Annotated[
    EmbeddedSource | FolderSource | GeotiffSource | ReleasedSource | LoveDASource | FusuSource, Field(discriminator="kind")
]
