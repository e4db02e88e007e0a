"""LoveDA (Wang et al., NeurIPS 2021 Datasets and Benchmarks, arXiv 2110.08733).

Features: 5,987 RGB scenes of 1024x1024 at 0.3 m, urban and rural, of three Chinese cities; 2,522 to train on, 1,669 to validate, 1,796
whose labels are secret. Format: PNG, ``{Train,Val}/{Urban,Rural}/{images_png,masks_png}/N.png``. Classes: 0 no data, then background,
building, road, water, barren, forest, agriculture. Licence: CC BY-NC-SA 4.0, academic use.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from crfm_core import DataError
from crfm_core.data.adapters.folder import pair_files
from crfm_core.data.adapters.found import FoundScene
from crfm_core.settings import Dataset, FolderSplit

SPLITS = {"train": "Train", "val": "Val"}
AREAS = ("Urban", "Rural")


def find_scenes(dataset: Dataset, root: Path) -> list[FoundScene]:
    """The labelled scenes below ``root``, as splits train and val. DataError when an area is missing or a number is in both splits."""
    scenes = []
    for split, part in SPLITS.items():
        for area in AREAS:
            files = FolderSplit(images=f"{part}/{area}/images_png/*.png", labels=f"{part}/{area}/masks_png/*.png")
            scenes += [
                FoundScene((area, *one.key), one.image, one.label, one.relative, split, area)
                for one in pair_files(dataset.name, root, split, files)
            ]
    repeated = [number for number, count in Counter(scene.image.stem for scene in scenes).items() if count > 1]
    if repeated:
        raise DataError(
            f"{root}: {len(repeated)} scene numbers occur twice, such as {repeated[0]}.png; LoveDA numbers each scene once, "
            "so this copy mixes its splits: unpack Train.zip and Val.zip anew into an empty folder"
        )
    return scenes
