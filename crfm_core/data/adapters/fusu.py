"""FUSU (Yuan et al., NeurIPS 2024 Datasets and Benchmarks, arXiv 2405.19055).

Features: 62,752 RGB patches of 512x512 at 0.2-0.5 m, two dates, of five urban areas in China. Format: PNG, either ``im1/6_255.png`` with
``im1_label/6_255.png`` or ``{train,val,test}/im1`` with ``label1``. Classes: 0 background, then 17 of fine-grained land use. No split
lists are published, and the data's licence is not stated.
"""

from __future__ import annotations

from pathlib import Path

from crfm_core import DataError
from crfm_core.data.adapters.folder import pair_files
from crfm_core.data.adapters.found import FoundScene
from crfm_core.settings import Dataset, FolderSplit, FusuSource


def label_folder(folder: Path, date: int) -> str | None:
    """The name of the folder with the labels of ``im{date}`` in ``folder``; None when images or labels are not there."""
    names = (f"im{date}_label", f"label{date}")
    return next((name for name in names if (folder / name).is_dir()), None) if (folder / f"im{date}").is_dir() else None


def find_scenes(dataset: Dataset, root: Path) -> list[FoundScene]:
    """The patches of one date, in splits where the copy has them. DataError when the layout is not what the dataset's file says."""
    source: FusuSource = dataset.source
    parts = {split: split for split in source.splits} if source.splits else {"": "."}
    scenes = []
    for split, part in parts.items():
        folder = root / part
        if (labels := label_folder(folder, source.date)) is None:
            other = [name for name in ("train", "val", "test") if label_folder(root / name, source.date)]
            if other and not source.splits:
                remedy = f"it has splits of its own: set source.splits to [{', '.join(other)}] and leave out split"
            elif source.splits and label_folder(root, source.date):
                remedy = "it has no splits: leave out source.splits and add the section split"
            else:
                remedy = "set source.root to where they lie"
            raise DataError(f"{folder}: has no im{source.date} with im{source.date}_label or label{source.date} beside it; {remedy}")
        prefix = "" if part == "." else f"{part}/"
        files = FolderSplit(images=f"{prefix}im{source.date}/*.png", labels=f"{prefix}{labels}/*.png")
        scenes += [FoundScene(one.key, one.image, one.label, one.relative, split, one.key[-1].split("_")[0])
                   for one in pair_files(dataset.name, root, split, files)]  # fmt: skip
    return scenes
