"""Real, synthetic and pseudo-labelled tiles in one training set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pyarrow.parquet import read_metadata

from crfm_core import DataError
from crfm_core.curation.selection import print_counts, relocate_rows
from crfm_core.files import hash_of
from crfm_core.manifest import check_paths, read_manifest, write_manifest
from crfm_core.settings import PSEUDO


def mix(
    real_manifest: Path | str,
    synthetic_manifest: Path | str | None,
    out: Path | str,
    synthetic_per_real: float = 0,
    real_weight: float = 1.0,
    seed: int = 0,
    exactly: bool = True,
    classes: Sequence[str] | None = None,
    root: Path | str | None = None,
    pseudo_manifest: Path | str | None = None,
    pseudo_weight: float = 1.0,
) -> pd.DataFrame:
    """Write the manifest ``out``: all real tiles, ``synthetic_per_real`` times as many synthetic ones, and all pseudo-labelled ones.

    The column ``source`` is "real", "synthetic" or "pseudo"; ``weight`` is how often a row is drawn in training: ``real_weight`` for real
    tiles, 1 for synthetic ones, ``pseudo_weight`` for pseudo-labelled ones. Columns that only some of them have are empty for the others;
    ``corrections``, most of a manifest's size and of no use in training, is left out.

    Args:
        exactly: there must be that many synthetic tiles, and first copies are taken before second ones (column ``copy``), in an order
            drawn from ``seed``, so that a smaller mix is part of a larger one. False, after a filter of images or a re-sampling: at most
            that many, drawn from ``seed`` whatever their copy, so that the tiles these favour stay favoured.
        classes: names for the log; None: the ids.
        root: folder that files of rows must exist in; None: not checked.
        pseudo_manifest: unlabelled tiles with labels of the critic (:func:`crfm_core.curation.pseudo_labels.label_tiles`); None: none.

    Raises DataError when there are too few synthetic tiles, or none that can be trained on.
    """
    if root is not None:
        for path in (real_manifest, synthetic_manifest, pseudo_manifest):
            if path:
                check_paths(path, read_manifest(path), root)
    real = read_manifest(real_manifest).assign(source="real", weight=float(real_weight))
    parts, pseudo = [relocate_rows(real, real_manifest, out)], None
    if pseudo_manifest is not None:
        pseudo = _read_pseudo(pseudo_manifest, out, real).assign(source=PSEUDO, weight=float(pseudo_weight))
    wanted = round(synthetic_per_real * len(real))
    if wanted:
        if synthetic_manifest is None:
            raise DataError(f"{out}: needs {wanted} synthetic tiles, and no synthetic manifest is given; give one")
        synthetic = _read_synthetic(synthetic_manifest, out).assign(source="synthetic", weight=1.0)
        if exactly and len(synthetic) < wanted:
            raise DataError(
                f"{synthetic_manifest}: {len(synthetic)} synthetic tiles, and {synthetic_per_real} for each of {len(real)} real ones "
                f"are {wanted}; make more copies or lower synthetic_per_real"
            )
        copy = synthetic.get("copy", 0) if exactly else 0
        drawn = synthetic.assign(_copy=copy, _draw=[hash_of(seed, tile_id) for tile_id in synthetic.tile_id])
        chosen = synthetic.loc[drawn.sort_values(["_copy", "_draw"]).index[:wanted]]
        _print_mix(real, synthetic, chosen, wanted, classes, pseudo)
        # whole numbers stay whole beside rows without them: as floats, seeds would lose their last digits
        whole = {name: "Int64" for name in chosen.select_dtypes("integer") if name not in real}
        parts.append(relocate_rows(chosen.astype(whole), synthetic_manifest, out))
    else:
        print(f"{len(real)} real tiles", flush=True)
    if pseudo is not None and pseudo_manifest is not None:
        _print_pseudo(pd.concat(parts), pseudo)
        parts.append(relocate_rows(pseudo, pseudo_manifest, out))
    return write_manifest(out, pd.concat(parts, ignore_index=True))


def _read_synthetic(manifest: Path | str, out: Path | str) -> pd.DataFrame:
    """The synthetic tiles. Raises DataError when there are none, or none with a labelled pixel."""
    remedy = "keep more by the recipe's filter and re-sampling, or make more synthetic tiles"
    if Path(manifest).is_file() and read_metadata(manifest).num_rows == 0:
        raise DataError(f"{out}: no synthetic tile is left in {manifest}; {remedy}")
    table = read_manifest(manifest, without="corrections")
    if not any(pixels.any() for pixels in table.pixels):
        raise DataError(f"{out}: none of the {len(table)} synthetic tiles of {manifest} has a labelled pixel left; {remedy}")
    return table


def _read_pseudo(manifest: Path | str, out: Path | str, real: pd.DataFrame) -> pd.DataFrame:
    """The pseudo-labelled tiles, without those that are real tiles, too: a scene that is trained on may also be among the unlabelled ones.
    Raises DataError when none is left."""
    table = read_manifest(manifest)
    known = table.tile_id.isin(real.tile_id)
    if "image_digest" in table and "image_digest" in real:
        known |= table.image_digest.isin(real.image_digest)
    if known.any():
        print(f"{known.sum()} of {len(table)} pseudo-labelled tiles are real ones, whose labels are taken", flush=True)
    if known.all():
        raise DataError(f"{out}: all {len(table)} tiles of {manifest} are among the real ones; name other unlabelled scenes")
    return table[~known]


def _print_pseudo(others: pd.DataFrame, pseudo: pd.DataFrame) -> None:
    share = pseudo.weight.sum() / (others.weight.sum() + pseudo.weight.sum())
    weight = pseudo.weight.iloc[0] / others.weight.iloc[0]  # the first of the others are real
    print(f"{len(pseudo)} pseudo-labelled tiles, each drawn {weight:g} times as often as a real one: {100 * share:.1f} % of all draws")


def _print_mix(
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    chosen: pd.DataFrame,
    wanted: int,
    classes: Sequence[str] | None,
    pseudo: pd.DataFrame | None,
) -> None:
    print(f"{len(real)} real tiles, {len(chosen)} of {wanted} wanted synthetic tiles")
    others = 0 if pseudo is None else pseudo.weight.sum()
    share = real.weight.sum() / (real.weight.sum() + chosen.weight.sum() + others)
    print(f"a real tile is drawn {real.weight.iloc[0]:g} times as often as a synthetic one: {100 * share:.1f} % of all draws are real")
    print("synthetic tiles, available and taken:")
    print_counts(synthetic, chosen, classes or [str(c) for c in range(len(synthetic.pixels.iloc[0]))])
