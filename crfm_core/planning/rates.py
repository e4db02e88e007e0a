"""The file configs/rates.yaml: what the jobs of each rule do, and what a unit of it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from crfm_core import ConfigError
from crfm_core.settings import EmbeddedBase, Section, Settings

#: A number for all, or by name: of a control scheme, an architecture, a device, ``embedded`` or ``full``.
ByName = float | dict[str, float]

#: What jobs are counted in (:meth:`crfm_core.planning.workload.Workload.count`).
Unit = Literal[
    "jobs", "drawn_scenes", "tiles", "tiles_to_cut", "captions", "prompts", "autoencoder_images", "generator_images", "crops",
    "segmentor_files", "scored_tiles", "layouts", "unlabelled_tiles", "synthetic_tiles", "shard_images", "passes",
]  # fmt: skip


class Unknown(Exception):
    """Why something cannot be estimated; no fault of anyone's, so no error of the package."""


class JobRate(Section):
    """What a unit of the work of one rule takes, and what it leaves on the disk."""

    unit: Unit = "jobs"
    start: float | None = Field(None, description="seconds before and after its work; null: of a job that loads networks")
    seconds: ByName | None = Field(None, description="on one core, of the embedded networks")
    tflop: ByName | None = Field(None, description="of networks of full size")
    grows: Literal["area", "transformer"] | None = Field(None, description="with the area of a tile, and the transformer's sizes too")
    files: Unit = Field("jobs", description="what it leaves files of")
    bytes: ByName = Field(0.0, description="of each, beside pixels")
    pixel_bytes: ByName = Field(0.0, description="of each, per pixel of a tile")


class NetworkSize(Section):
    """What the seconds were measured on."""

    tile: int
    layers: int
    width: int
    tokens: int


class Weights(Section):
    """Of SD3.5-medium, in billions."""

    base_model: float
    transformer: float = Field(description="with the table of positions")
    table: float = Field(description="of positions")
    trained: dict[str, float] = Field(description="by control scheme")


class Speed(Section):
    """TFLOP per second."""

    core: float = Field(gt=0, description="of a core, measured")
    share: float = Field(gt=0, le=1, description="of a GPU's peak, assumed")
    gpus: dict[str, float] = Field(min_length=1, description="peaks by a part of the GPU's name; the first stands for others")


class Rates(Section):
    """The whole file."""

    measured: str = Field(description="where the seconds were measured")
    counted: str = Field(description="where the TFLOP were counted")
    start: float
    jobs: dict[str, JobRate]
    correction_passes: ByName = Field(description="passes of the network that take as long as a correction")
    size: NetworkSize
    tile: int = Field(description="side of the tiles that TFLOP and memory are of")
    weights: Weights
    training: dict[str, dict[str, float]] = Field(description="what a process of a training holds, by control scheme")
    speed: Speed

    @property
    def base_model_bytes(self) -> float:
        """Of a download of SD3.5-medium, two bytes a weight."""
        return 2e9 * self.weights.base_model

    def seconds(self, rate: JobRate, keys: Sequence[str], settings: Settings, tile: int, gpu: str | None) -> tuple[float, str]:
        """Seconds of one unit on a core, or on a GPU of a known name, and whether they are "scaled" or a "guess".

        Raises Unknown where there is no number for any of ``keys``.
        """
        seconds, tflop = number_of(rate.seconds, keys), number_of(rate.tflop, keys)
        if seconds is not None and (settings.base_model.kind == "embedded" or rate.tflop is None or isinstance(rate.seconds, dict)):
            if gpu:
                raise Unknown("the embedded networks were not measured on a GPU")
            return seconds * self._growth(rate, settings, tile), "scaled"
        if tflop is None:
            raise Unknown(f"configs/rates.yaml has no number for {', '.join(keys)}")
        speed = self.speed.share * self.speed.gpus[gpu] if gpu else self.speed.core
        return tflop * ((tile / self.tile) ** 2 if rate.grows else 1.0) / speed, "guess"

    def _growth(self, rate: JobRate, settings: Settings, tile: int) -> float:
        """The size of a unit relative to the one that was measured."""
        base, size = settings.base_model, self.size
        if rate.grows is None:
            return 1.0
        if rate.grows == "area" or not isinstance(base, EmbeddedBase):
            return (tile / size.tile) ** 2
        tokens = (tile / 2 ** (len(base.vae.channels) - 1) / base.transformer.patch_size) ** 2
        width = base.transformer.heads * base.transformer.head_dim
        return base.transformer.layers / size.layers * (width / size.width) ** 2 * tokens / size.tokens


def number_of(numbers: ByName | None, keys: Sequence[str]) -> float | None:
    """The number of the first key that has one, or the one for all; None where there is none."""
    if isinstance(numbers, dict):
        return next((numbers[key] for key in keys if key in numbers), None)
    return numbers


def read_rates(path: Path | str) -> Rates:
    """Read configs/rates.yaml, or another file like it. Raises ConfigError naming the wrong key."""
    try:
        return Rates.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore the file that ships with the workflow") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'the whole file'}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(faults[:3])}; restore the file that ships with the workflow") from None
