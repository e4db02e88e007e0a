"""Images and label rasters of one grid in a folder, paired by globs: whatever the nesting, whatever the format."""

from __future__ import annotations

from pathlib import Path

from crfm_core import DataError
from crfm_core.data.globs import files_by_key, folder_pattern
from crfm_core.data.sources import FoundScene, SceneSource, unmatched
from crfm_core.settings import FolderSplit


class ImageFolder(SceneSource):
    """Images and label rasters in a folder of one's own.

    Features: whatever the images show.
    Format: any raster of :mod:`crfm_core.data.rasters`; image and label have one size and are paired by what the folder wildcards of
    their globs stand for and the stem.
    Classes: ids or colours of the labels, by the dataset's ``label_map``.
    Splits: a pair of globs each, or one pair of globs and the section ``split``.
    Licence: that of the files.
    Citation: that of the files.
    """

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """The scenes that the globs match. DataError when a glob matches no image, or an image has no label."""
        settings = self.settings
        splits = settings.splits or {"": FolderSplit(images=settings.images, labels=settings.labels)}
        return [
            scene
            for split, files in splits.items()
            for scene in pair_files(self.dataset.name, self.folder, split, files, settings.label_suffix, settings.exclude)
        ]

    def faults(self) -> list[str]:
        settings, splits = self.settings, (self.settings.splits or {}).values()
        patterns = [settings.images, settings.labels, *(pattern for files in splits for pattern in (files.images, files.labels))]
        return unmatched(self.dataset, self.folder, patterns)


def pair_files(
    name: str, root: Path, split: str, files: FolderSplit, label_suffix: str = "", exclude: list[str] | None = None
) -> list[FoundScene]:
    """Pair images and labels of one split by what the folder wildcards of their globs stand for, and the stem.

    ``Train/*/images/*.png`` and ``Train/*/masks/*.png`` pair ``Urban/…/1`` with ``Urban/…/1``. When the two globs have unlike numbers
    of folder wildcards the stem alone must identify the pair.
    """
    where = f"dataset {name}, split {split}" if split else f"dataset {name}"
    by_stem = folder_pattern(files.images).groups != folder_pattern(files.labels).groups
    labels = files_by_key(root, files.labels, label_suffix, by_stem)
    # Labels may lie among the images: a glob like *.tif then matches both.
    skip = set(labels.values()) if label_suffix or files.images != files.labels else set()
    images = files_by_key(root, files.images, "", by_stem, skip, exclude)
    if not images:
        raise DataError(f"{where}: no file matches images: {files.images} below {root}; correct the glob or the root")
    if without := [image for key, image in images.items() if key not in labels]:
        raise DataError(
            f"{where}: {len(without)} of {len(images)} images have no label matching {files.labels}"
            f" (stem of the image{' + ' + label_suffix if label_suffix else ''}): {', '.join(map(str, without[:3]))}"
            f"{' ...' if len(without) > 3 else ''}; add the labels, correct labels: or label_suffix:, or leave the images out by exclude:"
        )
    return [
        FoundScene(key, image, labels[key], image.relative_to(root), split, "-".join(key[:-1]) or str(image.parent.relative_to(root)))
        for key, image in sorted(images.items())
    ]


def holds_images(folder: Path) -> bool:
    """Whether a folder holds a PNG."""
    return folder.is_dir() and any(path.suffix == ".png" and not path.name.startswith(".") for path in folder.iterdir())
