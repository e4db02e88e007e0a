"""FUSU: its two layouts, and its download from the model hub however it is packed there."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from crfm_core import DataError
from crfm_core.data.archives import ARCHIVE_SUFFIXES, extract, stem_of
from crfm_core.data.sources import ExpectedScenes, FoundScene, SceneSource
from crfm_core.data.sources.folder import holds_images, pair_files
from crfm_core.files import read_json, remove, write_json
from crfm_core.hub import FETCH_RECORD, Repository, read_record
from crfm_core.settings import FolderSplit, FusuSource

SPLITS = ("train", "val", "test")
FOLDERS = ("im1", "im2", "im1_label", "im2_label", "label1", "label2")
PATCHES, PATCH_SIDE = 62_752, 512


class FUSU(SceneSource):
    """FUSU: fine-grained urban land use of China at two dates.

    Features: 62,752 RGB patches of 512x512 pixels at 0.2-0.5 m, of five urban areas, each at two dates.
    Format: PNG, either ``im1/6_255.png`` with ``im1_label/6_255.png``, or ``{train,val,test}/im1`` with ``label1``.
    Classes: 0 background, then 17 of fine-grained land use.
    Splits: no lists are published; those of the copy, or the section ``split``.
    Licence: of the data not stated.
    Citation: Yuan et al., "FUSU: A Multi-temporal-source Land Use Change Segmentation Dataset for Fine-grained Urban Semantic
    Understanding", NeurIPS 2024 Datasets and Benchmarks, arXiv 2405.19055.
    """

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """The patches of one date, in splits where the copy has them. DataError when the layout is not what the configuration says."""
        settings, root = self.settings, self.folder
        parts = {split: split for split in settings.splits} if settings.splits else {"": "."}
        scenes = []
        for split, part in parts.items():
            folder = root / part
            if (labels := label_folder(folder, settings.date)) is None:
                other = [name for name in SPLITS if label_folder(root / name, settings.date)]
                if other and not settings.splits:
                    remedy = f"it has splits of its own: set source.splits to [{', '.join(other)}] and leave out split"
                elif settings.splits and label_folder(root, settings.date):
                    remedy = "it has no splits: leave out source.splits and add the section split"
                else:
                    remedy = "set source.root to where they lie"
                raise DataError(
                    f"{folder}: has no im{settings.date} with im{settings.date}_label or label{settings.date} beside it; {remedy}"
                )
            prefix = "" if part == "." else f"{part}/"
            files = FolderSplit(images=f"{prefix}im{settings.date}/*.png", labels=f"{prefix}{labels}/*.png")
            scenes += [FoundScene(one.key, one.image, one.label, one.relative, split, one.key[-1].split("_")[0])
                       for one in pair_files(self.dataset.name, root, split, files)]  # fmt: skip
        return scenes

    def expected(self, split: str) -> ExpectedScenes | None:
        how = self.dataset.split
        if not how or how.by != "group":
            return None
        return ExpectedScenes(how.shares[split] / sum(how.shares.values()) * PATCHES, PATCH_SIDE, "about, share of the published number")

    def locate(self) -> Path | None:
        """The folder in which a layout begins: the source's own, or one below it. DataError when it is of another revision."""
        if (place := self._layout(self.folder)) == self.folder:
            held, wanted = read_record(place), self.settings
            if held.get("revision") and not Repository(wanted.repo, wanted.revision, place).matches(held):
                raise DataError(
                    f"source.revision: {place} holds {held.get('repo')} at {held['revision']}, not {wanted.repo} at {wanted.revision}; set "
                    "source.repo and source.revision to what it holds, or source.root to another folder to have the other fetched"
                )
        return place

    def lacking(self) -> list[str]:
        return [] if self._layout(self.folder) else [self._needed()]

    def _needed(self) -> str:
        date = self.settings.date
        return f"images (.png) in im{date}/ with labels in im{date}_label/ or label{date}/ beside it, there or in train/, val/, test/"

    def download_bytes(self) -> float | None:
        """That of images and labels without compression."""
        return 4.0 * PATCHES * PATCH_SIDE**2 if self.settings.repo == FusuSource(kind="fusu").repo else None

    def _layout(self, folder: Path, depth: int = 1) -> Path | None:
        """``folder`` or the one at most ``depth`` below it in which a layout begins. DataError when several below it have one."""
        date = self.settings.date

        def has_layout(place: Path) -> bool:
            for part in (place, *(place / split for split in SPLITS)):
                labels = label_folder(part, date)
                if labels and holds_images(part / f"im{date}") and holds_images(part / labels):
                    return True
            return False

        level = [folder]
        for _ in range(depth + 1):
            found = [place for place in level if has_layout(place)]
            if len(found) > 1:
                raise DataError(
                    f"source.root: {', '.join(map(str, found))} each hold a layout of FUSU; set source.root to one, or merge them"
                )
            if found:
                return found[0]
            level = [below for place in level if place.is_dir() for below in sorted(place.iterdir()) if _is_data(below)]
        return None

    def download(self, work: Path, command: str) -> None:
        """Download the repository, unpack its archives, and move what is the dataset into its place."""
        hub, whole = work / "hub", work / "whole"
        if not whole.is_dir() and self.locate() is None:
            if there := [name for name in (*FOLDERS, *SPLITS) if (self.folder / name).exists()]:
                raise DataError(
                    f"source.root: {self.folder} has {', '.join(there)} but lacks {self._needed()}; complete it, or delete them to "
                    "have the dataset fetched"
                )
            place = self._unpacked(hub, command)
            for text in (path for path in hub.iterdir() if path.is_file() and _is_text(path.name)):
                if not (self.folder / text.name).exists():
                    shutil.copyfile(text, self.folder / text.name)
            place.rename(whole)
        # a run that was stopped while it moved the data goes on here
        for held in (hub, whole):  # the record lies in one of them, with what was not renamed
            if whole.is_dir() and (record := read_record(held)):
                write_json(self.folder / FETCH_RECORD, record)
        for path in sorted(whole.iterdir()) if whole.is_dir() else []:
            if _is_data(path):
                target = self.folder / path.name
                if target.exists():
                    raise DataError(f"source.root: {target} is there already; move it away to have the dataset's put there")
                path.rename(target)
        remove(hub)
        remove(whole)

    def _unpacked(self, hub: Path, command: str) -> Path:
        """The downloaded and unpacked repository, or the folder in it that has a layout."""
        settings, instead = self.settings, f"put the dataset into {self.folder} by hand"

        def check(names: set[str]) -> None:
            if all(_is_text(name) for name in names):
                raise DataError(
                    f"source.repo: {settings.repo} holds neither images in {', '.join(FOLDERS)} nor archives "
                    f"({', '.join(ARCHIVE_SUFFIXES)}); {instead}"
                )

        repository = Repository(settings.repo, settings.revision, hub, _is_needed, "dataset", check, "source", "root", instead, command)
        if (held := read_record(hub)) and not repository.matches(held):
            shutil.rmtree(hub)  # with what was unpacked of the other revision
        repository.fetch()
        names = sorted(read_json(hub / FETCH_RECORD)["files"])
        targets = {name: (hub / name).with_name(stem_of(hub / name)) for name in names if name.lower().endswith(ARCHIVE_SUFFIXES)}
        for name, target in targets.items():
            below = f"{target.relative_to(hub).as_posix()}/"
            if list(targets.values()).count(target) > 1 or any(other.startswith(below) for other in names):
                raise DataError(
                    f"source.repo: {settings.repo} has {name} and files in a folder of that name or two such archives; {instead}"
                )
            if not target.exists():  # it is whole when it is there
                extract(hub / name, target)
        if (place := self._layout(hub, depth=3)) is None:
            raise DataError(
                f"source.repo: what {settings.repo} holds ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''}) lacks "
                f"{self._needed()}; it lies unpacked in {hub}: bring it into a layout and move that to {self.folder}"
            )
        return place


def label_folder(folder: Path, date: int) -> str | None:
    """The name of the folder with the labels of ``im{date}`` in ``folder``; None when images or labels are not there."""
    names = (f"im{date}_label", f"label{date}")
    return next((name for name in names if (folder / name).is_dir()), None) if (folder / f"im{date}").is_dir() else None


def _is_data(path: Path) -> bool:
    """Whether a path is a folder, and neither hidden nor one of those that programs add."""
    return path.is_dir() and not path.name.startswith((".", "__"))


def _is_text(name: str) -> bool:
    return PurePosixPath(name).name.upper().startswith(("README", "LICENSE", "LICENCE"))


def _is_needed(name: str) -> bool:
    """Whether a file of the repository is part of the dataset: not the monthly Sentinel images, which nothing here reads."""
    path = PurePosixPath(name)
    return _is_text(name) or name.lower().endswith(ARCHIVE_SUFFIXES) or (path.suffix == ".png" and path.parent.name in FOLDERS)
