"""Segmentors: how they are trained, evaluated and chosen as critic or judge."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from crfm_core.settings.base import Location, Name, Positive, Section


class Download(Section):
    """A file of weights with a fixed content."""

    url: str = Field(pattern=r"^https?://", description="where it is fetched from, once")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{8,64}$", description="checksum, whole or its first digits, which model zoos put into file names"
    )
    path: Location | None = Field(None, description="the file to download to; null: models/ and the name in the url")

    @model_validator(mode="after")  # of the section: an error of the key itself would show its value
    def _no_secret(self) -> Download:
        if re.search(r"//[^/?#]*@|[?&][^=&]*(token|key|sig|secret|passw|auth|credential)[^=&]*=", self.url, re.IGNORECASE):
            raise ValueError("url: holds a password or token, which the report would show; fetch the file by hand and give its path")
        return self

    @property
    def file(self) -> str:
        """Where the weights are, or will be downloaded to."""
        return self.path or f"models/{self.url.split('?')[0].rsplit('/', 1)[-1]}"


Architecture = Literal["segformer_tiny", "unet_tiny", "pspnet_r50", "segformer_b2", "upernet_convnext_t", "deeplabv3plus_r50"]


class Segmentor(Section):
    """A segmentation model and how it is trained."""

    model_config = ConfigDict(json_schema_extra={"alternatives": [["architecture"], ["config"]]})

    PERFORMANCE_KEYS = frozenset({"checkpoint_every"})

    architecture: Architecture | None = Field(None, description="a model known by name; null: that of config")
    config: Location | None = Field(None, description="instead: a configuration file of mmsegmentation, whose model is taken, read as data")
    iterations: Positive = Field(description="length of the 1x schedule")
    batch_size: int = Field(ge=2, description="tiles per iteration, of all processes together; one is too few for batch normalisation")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    optimiser: Literal["AdamW", "SGD"] = Field("AdamW", description="optimiser of mmsegmentation's runs")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of the optimiser")
    warmup: int = Field(0, ge=0, description="iterations of linear warm-up; after it the rate falls as poly")
    poly_power: float = Field(0.9, gt=0, description="power of the falling rate")
    class_weights: Literal["median_frequency"] | list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="of the loss: median frequency / frequency of each class among the pixels trained on, or one number per class"
    )
    pretrained: Location | Download | None = Field(None, description="file of backbone weights, or url and sha256 of one; null: none")
    precision: Literal["no", "bf16"] = Field("no", description="bf16: automatic mixed precision; weights stay float32")
    processes: Positive = Field(1, description="training processes, each with a GPU of its own")
    checkpoint_every: Positive = Field(500, description="iterations between checkpoints to resume from")
    validate_every: Positive | None = Field(
        None, description="iterations between evaluations on the dataset's split val, where it has one; null: a tenth of all"
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

    model_config = ConfigDict(json_schema_extra={"alternatives": [["recipe", "segmentor", "seed"], ["path"]]})

    recipe: Name | None = Field(None, description="recipe it is trained on")
    segmentor: Name | None = Field(None, description="which of the segmentors")
    seed: int = Field(0, description="seed it is trained with")
    path: Location | None = Field(
        None, description="instead: a checkpoint of mmsegmentation, or a folder of a transformers model for semantic segmentation"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Judge:
        trained = [name for name in ("recipe", "segmentor") if getattr(self, name) is not None]
        if len(trained) != (0 if self.path else 2):
            raise ValueError("recipe: give recipe and segmentor of one to train, or the path of one from elsewhere")
        return self


class Evaluation(Section):
    """How a trained segmentor predicts tiles and scenes."""

    PERFORMANCE_KEYS = frozenset({"batch_size"})

    mode: Literal["whole", "slide"] = Field("whole", description="whole tiles, or windows of the side window whose logits are averaged")
    window: Positive | None = Field(None, description="side in pixels, for mode slide and for whole scenes; null: the tile size")
    stride: Positive | None = Field(None, description="distance between windows; null: two thirds of the window")
    scales: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0], min_length=1, description="test-time augmentation: probabilities are averaged over these"
    )
    flip: bool = Field(False, description="test-time augmentation: and over the image as it is and mirrored")
    batch_size: Positive = Field(16, description="tiles or windows predicted together")

    @model_validator(mode="after")
    def _no_gaps(self) -> Evaluation:
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(f"stride: {self.stride} with windows of {self.window} pixels leaves gaps; allowed: 1...{self.window}")
        return self
