"""The file configs/rates.yaml: what the jobs of each rule do, and what a unit of it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from crfm_core import ConfigError
from crfm_core.settings import EmbeddedBase, Section, Settings

#: A number for all, or one per control scheme or architecture.
ByName = float | dict[str, float]


class Unknown(Exception):
    """Why something cannot be estimated; no fault of anyone's, so no error of the package."""


class UnitRate(Section):
    """What one unit of work takes."""

    seconds: ByName | None = Field(None, description="on one core, of the embedded networks")
    tflop: ByName | None = Field(None, description="of networks of full size")
    grows: Literal["area", "autoencoder", "transformer"] | None = None


class JobRate(Section):
    """What a job of one rule does and leaves on the disk, for each unit of what it counts."""

    start: float | None = Field(None, description="seconds before and after its work; null: of a job that loads networks")
    work: dict[str, UnitRate] = {}
    files: dict[str, str] = Field({}, description="what is counted -> kind of file")


class NetworkSize(Section):
    """What the seconds were measured on."""

    tile: int
    layers: int
    width: int
    tokens: int
    channels: int


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
    size: NetworkSize
    tile: int = Field(description="side of the tiles that TFLOP and memory are of")
    bytes: dict[str, float]
    weights: dict[str, ByName] = Field(description="billions")
    training: dict[str, ByName] = Field(description="what a process of a training holds")
    speed: Speed

    @property
    def base_model_bytes(self) -> float:
        """Of a download of SD3.5-medium, two bytes a weight."""
        return 2e9 * sum(map(self.billions, ("transformer", "text_encoders", "autoencoder")))

    def billions(self, part: str) -> float:
        """Weights of a part of the base model."""
        return number_of(self.weights[part]) or 0.0

    def seconds(self, unit: UnitRate, name: str | None, settings: Settings, tile: int, gpu: str | None) -> tuple[float, str]:
        """Seconds of one unit on a core, or on a GPU of a known name, and whether they are "scaled" or a "guess".

        ``name`` is the control scheme or architecture. Raises Unknown where there is no number for it.
        """
        seconds, tflop = number_of(unit.seconds, name), number_of(unit.tflop, name)
        if seconds is not None and (settings.base_model.kind == "embedded" or unit.tflop is None or isinstance(unit.seconds, dict)):
            if gpu:
                raise Unknown("the embedded networks were not measured on a GPU")
            return seconds * self._growth(unit, settings, tile), "scaled"
        if tflop is None:
            raise Unknown(f"configs/rates.yaml has no number for {name}")
        speed = self.speed.share * self.speed.gpus[gpu] if gpu else self.speed.core
        return tflop * ((tile / self.tile) ** 2 if unit.grows else 1.0) / speed, "guess"

    def _growth(self, unit: UnitRate, settings: Settings, tile: int) -> float:
        """The size of a unit relative to the one that was measured."""
        area, base, size = (tile / self.size.tile) ** 2, settings.base_model, self.size
        if not isinstance(base, EmbeddedBase) or unit.grows in (None, "area"):
            return area if unit.grows else 1.0
        if unit.grows == "autoencoder":
            return area * (base.vae.channels[-1] / size.channels) ** 2
        tokens = (tile / 2 ** (len(base.vae.channels) - 1) / base.transformer.patch_size) ** 2
        width = base.transformer.heads * base.transformer.head_dim
        return base.transformer.layers / size.layers * (width / size.width) ** 2 * tokens / size.tokens


def number_of(numbers: ByName | None, name: str | None = None) -> float | None:
    """The number of a name, or the one for all names; None where there is none."""
    if isinstance(numbers, dict):
        return numbers.get(name) if name else None
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
