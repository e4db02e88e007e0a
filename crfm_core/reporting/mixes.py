"""What a recipe trained on, from its manifest of mixed tiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.manifest import read_manifest


@dataclass(frozen=True)
class Mix:
    """The tiles of a recipe; ``synthetic`` is its synthetic rows, possibly none."""

    real: int
    synthetic: pd.DataFrame
    draws: float  #: share of the draws in training that are real tiles

    @property
    def per_real(self) -> float:
        """Synthetic tiles per real one."""
        return len(self.synthetic) / self.real


def read_mix(path: Path) -> Mix:
    """Read mixes/{recipe}.parquet. Raises DataError when it is missing, lacks a column or holds no real tile."""
    table = read_manifest(path)
    if missing := [name for name in ("source", "weight") if name not in table]:
        raise DataError(f"{path}: columns missing: {', '.join(missing)}; delete it and run the workflow again")
    is_real = table.source == "real"
    if not is_real.any():
        raise DataError(f"{path}: holds no real tile; delete it and run the workflow again")
    return Mix(int(is_real.sum()), table[~is_real], float(table.weight[is_real].sum() / table.weight.sum()))
