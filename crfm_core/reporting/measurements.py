"""What earlier stages measured of segmentors, samples and generators, as typed values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from crfm_core import DataError
from crfm_core.files import read_json
from crfm_core.manifest import read_manifest
from crfm_core.settings import PSEUDO

AnyModel = TypeVar("AnyModel", bound=BaseModel)
Score = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  #: NaN, in files null: undefined
Who = Literal["judge", "critic"]


def read_model(path: Path, model: type[AnyModel], remedy: str = "delete it") -> AnyModel:
    """The content of a JSON file as a ``model``. Raises DataError naming the file and what is wrong in it, key by key."""
    return validated(read_json(path), model, path, remedy)


def validated(content: object, model: type[AnyModel], path: Path, remedy: str) -> AnyModel:
    """The content of a file as a ``model``; DataError as of :func:`read_model`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'all of it'}: {fault['msg']}" for fault in error.errors()]
        raise DataError(f"{path}: {'; '.join(faults[:3])}; {remedy} and run the workflow again") from None


class SegmentorScores(BaseModel):
    """``scores.json`` of one trained segmentor, percent; lists have one entry per class."""

    OA: Score
    mIoU: Score
    mAcc: Score
    mF1: Score
    IoU: list[Score]
    classes: list[str]
    tiles: int

    @model_validator(mode="after")
    def _one_per_class(self) -> SegmentorScores:
        if len(self.IoU) != len(self.classes):
            raise ValueError(f"IoU has {len(self.IoU)} entries for {len(self.classes)} classes")
        return self


class Agreement(BaseModel):
    """Images against their masks by one segmentor, percent."""

    OA: Score
    mIoU: Score
    mAcc: Score


class AgreementOverCopies(Agreement):
    """The same over copies, each one draw of the noise for every mask; sd is NaN for one copy."""

    OA_sd: Score
    mIoU_sd: Score
    mAcc_sd: Score
    copies: list[Agreement] = Field(min_length=1)


class LowTile(BaseModel):
    """A sample that shows its mask badly: mIoU in percent."""

    tile_id: str
    judge: Score
    critic: Score


class SamplesAgreement(BaseModel):
    """``agreement/{control}/{sampler}.json``; ``lowest`` lists the samples with the lowest mIoU by the judge, the lowest first."""

    tiles: int
    judge: AgreementOverCopies
    critic: AgreementOverCopies
    lowest: list[LowTile]

    def copies_of(self, who: Who) -> list[float]:
        """Every copy's mIoU."""
        return [copy.mIoU for copy in (self.judge if who == "judge" else self.critic).copies]


class OfBoth(BaseModel):
    """What judge and critic see in the same images."""

    judge: Agreement
    critic: Agreement


#: A training has converged when the last quarter of its iterations gains less than this, in points of mIoU.
CONVERGED = 0.5


class HeldOutScores(Agreement):
    """A critic on real tiles that nothing trains on; ``last_quarter`` is what the last quarter of its training gained there."""

    tiles: int
    last_quarter: float | None

    @property
    def converged(self) -> bool | None:
        """Whether more of the same training would gain little; None where it is not known."""
        return None if self.last_quarter is None else self.last_quarter < CONVERGED


class HeldOutOfBoth(BaseModel):
    """How good judge and critic are on real tiles that nothing trains on."""

    judge: HeldOutScores
    critic: HeldOutScores


class Reconstruction(BaseModel):
    """``agreement/reconstruction.json``: real training tiles, and what the autoencoder keeps of them; ``held_out`` of other real tiles."""

    tiles: int
    real: OfBoth
    reconstructed: OfBoth
    held_out: HeldOutOfBoth | None = None


class GeneratorLoss(BaseModel):
    """``validation/{control}/final.json``: the generator's loss on tiles it never saw, with their masks and without."""

    loss: float
    loss_mask_ignored: float
    tiles: list[str]


class RealTiles(BaseModel):
    """The real tiles that samples are compared with."""

    split: str
    tiles: int


class Diversity(BaseModel):
    """How far apart pictures are: copies made for one mask, and real tiles."""

    copies: Score
    real: Score


class Neighbour(BaseModel):
    """A sample and the training tile it is closest to."""

    tile_id: str
    nearest: str
    ratio: float


class SampleDistances(BaseModel):
    """``generation/{control}/{sampler}.json``: samples beside real tiles; ``missing`` says why there is no distance."""

    features: str
    kind: Literal["inception", "clip", "judge"]
    real: RealTiles
    samples: int
    fid: Score
    kid: Score
    kid_sd: Score
    subset: int | None
    missing: str
    cmmd: Score
    cmmd_missing: str
    diversity: Diversity
    neighbours: list[Neighbour]
    memorised: list[str]
    threshold: float


def distance_names(kind: str) -> tuple[str, str]:
    """What the two distances are called; FID and KID are those of the Inception network alone."""
    return ("FID", "KID") if kind == "inception" else ("Fréchet distance", "kernel distance")


@dataclass(frozen=True)
class Mix:
    """The tiles that a recipe trained on; ``synthetic`` is its synthetic rows, possibly none."""

    real: int
    synthetic: pd.DataFrame
    pseudo: int  #: unlabelled tiles with labels of the critic
    draws: float  #: share of the draws in training that are real tiles
    synthetic_draws: float
    pseudo_draws: float

    @property
    def per_real(self) -> float:
        """Synthetic tiles per real one."""
        return len(self.synthetic) / self.real


def read_mix(path: Path) -> Mix:
    """Read mixes/{recipe}.parquet. Raises DataError when it is missing, lacks a column or holds no real tile."""
    table = read_manifest(path)
    if missing := [name for name in ("source", "weight") if name not in table]:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}; delete it and run the workflow again")
    is_real, is_pseudo = table.source == "real", table.source == PSEUDO
    is_synthetic = ~is_real & ~is_pseudo
    if not is_real.any():
        raise DataError(f"{path}: holds no real tile; delete it and run the workflow again")
    draws = [float(table.weight[chosen].sum() / table.weight.sum()) for chosen in (is_real, is_synthetic, is_pseudo)]
    return Mix(int(is_real.sum()), table[is_synthetic], int(is_pseudo.sum()), *draws)
