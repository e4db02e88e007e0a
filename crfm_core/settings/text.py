"""Captions of tiles, and models of transformers that read or write text."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from crfm_core.settings.base import Location, Positive, Section


class Model(Section):
    """A folder of a transformers model, or what it is downloaded from."""

    path: Location | None = Field(None, description="its folder; with repo the folder to download to, null: models/NAME")
    repo: str | None = Field(None, pattern=r"^[\w.-]+/\w[\w.-]*$", description="OWNER/NAME on the hub; null: the folder is there already")
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="commit, with repo, so that every run gets the same files")

    @property
    def folder(self) -> str:
        """Where the model is, or will be downloaded to."""
        return self.path or f"models/{str(self.repo).rpartition('/')[2]}"

    @model_validator(mode="after")
    def _one_place(self) -> Model:
        if not (self.path or self.repo):
            raise ValueError("path: give the model's folder, or repo and revision of one on the model hub")
        if (self.repo is None) != (self.revision is None):
            raise ValueError("revision: repo and revision go together; give the commit (40 hexadecimal digits) to download")
        return self


class CaptionModel(Model):
    """A vision-language model of transformers (any that takes an image and a text and returns text) that writes the captions."""

    prompt: str = Field(
        "Describe this satellite image in one sentence.",
        pattern=r"\S",
        description="the prompt; a model without a chat template may need its placeholder for the image in it, such as <image>",
    )
    max_new_tokens: Positive = Field(60, description="a caption is cut after this many tokens")
    batch_size: Positive = Field(8, description="images captioned together")


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
    model: CaptionModel | None = Field(None, description="kind vlm: the model that describes the images")
    unlabelled: str = Field(
        "a satellite image",
        pattern=r"\S",
        description="caption of every tile of the split unlabelled, which shows no known class; with kind vlm the model describes it",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Captions:
        places = re.findall(r"\{(classes|shares|words)\}", self.template)
        others = re.search(r"[{}]", re.sub(r"\{(classes|shares|words)\}", "", self.template))
        if not places or len(set(places)) < len(places) or others:
            raise ValueError("template: must hold {classes}, {shares} or {words}, each at most once, and no other braces")
        if self.kind == "vlm" and not self.model:
            raise ValueError("model: kind vlm needs a model; give its path, or repo and revision")
        if self.model and self.kind != "vlm":
            raise ValueError(f"model: is not used with kind {self.kind}; set kind: vlm, or model: null")
        return self
