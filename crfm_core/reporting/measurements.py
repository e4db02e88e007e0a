"""What earlier stages measured of segmentors, samples and generators, as typed values; None is a score that is undefined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from crfm_core import DataError

Score = float | None
Who = Literal["judge", "critic"]


def as_float(value: Score) -> float:
    """NaN for a score that is undefined."""
    return math.nan if value is None else value


# ---------------------------------------------------------------------------------------------------------- segmentors


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


# ------------------------------------------------------------------------------------------------- samples and masks


class Agreement(BaseModel):
    """Images against their masks by one segmentor, percent."""

    OA: Score
    mIoU: Score
    mAcc: Score


class AgreementOverCopies(Agreement):
    """The same over copies, each one draw of the noise for every mask; sd is None for one copy."""

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

    def by(self, who: Who) -> AgreementOverCopies:
        return self.judge if who == "judge" else self.critic

    def copies_of(self, who: Who) -> list[float]:
        """Every copy's mIoU."""
        return [as_float(copy.mIoU) for copy in self.by(who).copies]


class OfBoth(BaseModel):
    """What judge and critic see in the same images."""

    judge: Agreement
    critic: Agreement

    def by(self, who: Who) -> Agreement:
        return self.judge if who == "judge" else self.critic


class Reconstruction(BaseModel):
    """``agreement/reconstruction.json``: real training tiles, and what the autoencoder keeps of them."""

    tiles: int
    real: OfBoth
    reconstructed: OfBoth


class GeneratorLoss(BaseModel):
    """``validation/{control}/final.json``: the generator's loss on tiles it never saw, with their masks and without."""

    loss: float
    loss_mask_ignored: float
    tiles: list[str]


# ---------------------------------------------------------------------------------------------- samples and real tiles


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

    @property
    def names(self) -> tuple[str, str]:
        """What the two distances are called; FID and KID are those of one extractor alone."""
        return ("FID", "KID") if self.kind == "inception" else ("Fréchet distance", "kernel distance")


def given(path: Path, paths: set[Path], needed_by: str) -> Path:
    """The path, if it is among those a stage was given; DataError otherwise."""
    if path.resolve() not in paths:
        raise DataError(f"{path}: not among the files given; {needed_by} needs it, so run the workflow again")
    return path
