"""Real and synthetic tiles in one training set."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from crfm_core import DataError
from crfm_core.files import hash_of
from crfm_core.manifest import read_manifest, relocate, write_manifest


def mix(
    real_manifest: Path | str,
    synthetic_manifest: Path | str | None,
    out: Path | str,
    synthetic_per_real: float = 0,
    real_weight: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Write the manifest ``out``: all real tiles and ``synthetic_per_real`` times as many synthetic ones.

    Column ``source`` says which is which; ``weight`` says how often a row is drawn in training: ``real_weight`` for real ones, 1 for
    synthetic ones. First copies are taken before second ones (column ``copy``), in an order drawn from ``seed``, so that fewer
    synthetic tiles are a part of more. Raises DataError when there are too few.
    """
    real = read_manifest(real_manifest).assign(source="real", weight=float(real_weight))
    parts = [_moved(real, real_manifest, out)]
    wanted = round(synthetic_per_real * len(real))
    if wanted and synthetic_manifest is None:
        raise DataError(f"{out}: {wanted} synthetic tiles are asked for and no synthetic manifest is named; name one")
    if wanted:
        synthetic = read_manifest(synthetic_manifest).assign(source="synthetic", weight=1.0)
        if len(synthetic) < wanted:
            raise DataError(
                f"{synthetic_manifest}: {len(synthetic)} synthetic tiles, and {synthetic_per_real} for each of {len(real)} real ones "
                f"are {wanted}; make more copies or lower synthetic_per_real"
            )
        copy = synthetic.get("copy", 0)
        order = synthetic.assign(_copy=copy, _draw=[hash_of(seed, tile_id) for tile_id in synthetic.tile_id])
        chosen = synthetic.loc[order.sort_values(["_copy", "_draw"]).index[:wanted]]
        parts.append(_moved(chosen, synthetic_manifest, out))
    return write_manifest(out, pd.concat(parts, ignore_index=True))


def _moved(table: pd.DataFrame, old: Path | str, new: Path | str) -> pd.DataFrame:
    """The table with its paths relative to the manifest ``new``."""
    return table.assign(**{column: [relocate(path, old, new) for path in table[column]] for column in ("image", "label")})
