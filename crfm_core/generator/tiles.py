"""The tiles of a training, as it takes them: their latents and their prompts' embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from crfm_core import DataError
from crfm_core.generator.latents import Batch, CachedLatents
from crfm_core.manifest import read_manifest
from crfm_core.models.latent_space import normalise
from crfm_core.text.encoders import NO_PROMPT, PromptCache


class TileFiles(BaseModel):
    """Files of one set of tiles.

    Attributes:
        latents: of :func:`crfm_core.generator.latents.encode_tiles`.
        prompts: prompt cache.
        captions: manifest with the column ``prompt``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    latents: Path
    prompts: Path
    captions: Path

    def paths(self) -> list[Path]:
        """All of them."""
        return [self.latents, self.prompts, self.captions]


class OpenedTiles:
    """A set of tiles, opened; ``labelled`` False for tiles that need no masks. Raises DataError naming the file that does not fit."""

    def __init__(self, files: TileFiles, labelled: bool = True) -> None:
        self.files = files
        table = read_manifest(files.captions, labelled=labelled)
        self.latents, self.prompts = CachedLatents(files.latents, table), PromptCache(files.prompts)
        self.ids, self.keys = list(table.tile_id), list(table.prompt)
        if labelled and not self.latents.has_masks:
            raise DataError(f"{files.latents}: holds no masks; delete it and run the workflow again")

    def check(self, base: Path, mask_code: str, num_classes: int) -> None:
        """Raise DataError unless the parts of the folder ``base`` made these latents and embeddings."""
        self.latents.check(base, mask_code, num_classes)
        self.prompts.check(base)

    def embeddings(self, rows: Sequence[int], unprompted: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Prompt embeddings [B,T,D] and [B,P] of tiles; of the empty prompt for those that are ``unprompted``."""
        empty = unprompted or [False] * len(rows)
        return self.prompts.take([NO_PROMPT if none else self.keys[row] for row, none in zip(rows, empty, strict=True)])


def embeddings_of(batch: Batch, labelled: OpenedTiles, unlabelled: OpenedTiles | None) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [B,T,D] and [B,P] of a batch's samples."""
    if unlabelled is None:
        return labelled.embeddings(batch.rows, batch.unprompted)
    drawn = zip(batch.rows, batch.unprompted, batch.unlabelled, strict=True)
    each = [(unlabelled if other else labelled).embeddings([row], [empty]) for row, empty, other in drawn]
    text, pooled = (torch.cat(parts) for parts in zip(*each, strict=True))
    return text, pooled


class HeldOutTiles(NamedTuple):
    """What :func:`crfm_core.generator.objective.losses_by_level` takes of tiles that nothing trains on, on the CPU."""

    clean: Tensor
    text: Tensor
    pooled: Tensor
    mask: Tensor | None  #: None: masks are left out

    @classmethod
    def of(cls, tiles: OpenedTiles, rows: Sequence[int], vae: AutoencoderKL) -> HeldOutTiles:
        """These rows of a set of tiles; ``vae`` gives the latents' scale."""
        latents, masks = tiles.latents.modes(rows)
        return cls(normalise(latents, vae), *tiles.embeddings(rows), masks)
