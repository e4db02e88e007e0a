"""Where scenes come from: one module per kind of source, named like the kind and imported when a dataset uses it.

A new kind is one module here with one subclass of :class:`SceneSource`, and its section in :mod:`crfm_core.settings`.
"""

from __future__ import annotations

import glob
import importlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crfm_core import ConfigError, DataError, ResourceError
from crfm_core.data.globs import files_by_key
from crfm_core.files import exclusive, read_json, sha256_of, write_json
from crfm_core.hub import FETCH_RECORD, read_record
from crfm_core.settings import UNLABELLED, Dataset

WORK = ".fetching"  #: folder of unfinished downloads, below the dataset's
LISTED_FILES = 1000  #: files that the note of a downloaded dataset lists; of more it names the record


@dataclass(frozen=True)
class FoundScene:
    """A scene as it lies in its source; paths are absolute."""

    key: tuple[str, ...]  #: identifies it, and becomes its name
    image: Path
    label: Path | None  #: None where there is none, or :meth:`SceneSource.write_labels` writes it
    relative: Path  #: of the image, below the source's folder
    split: str = ""  #: "" where the dataset's section ``split`` decides
    group: str = ""  #: the part of the key that its folders gave
    caption: str = ""


@dataclass(frozen=True)
class ExpectedScenes:
    """How many scenes a split has before any is listed, their side in pixels, and how that is known."""

    count: float
    side: int
    basis: str


class SceneSource:
    """The scenes of a dataset: where they lie, how they pair with labels and, for published datasets, how they are downloaded.

    Args:
        dataset: its ``source`` holds the settings of this kind.
        root: folder that a relative ``source.root`` counts from.
        note: what :func:`fetch_dataset` wrote of a downloaded dataset; its folder replaces ``source.root``.
    """

    def __init__(self, dataset: Dataset, root: Path | str = ".", note: Path | str | None = None) -> None:
        self.dataset = dataset
        self.settings: Any = dataset.source
        self.folder = Path(read_json(note)["folder"]) if note else (Path(root) / getattr(self.settings, "root", "")).resolve()

    def require_folder(self) -> None:
        """Raise DataError when the configured folder does not exist."""
        if hasattr(self.settings, "root") and not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; set source.root of dataset {self.dataset.name} to where its scenes lie")

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """All scenes; ``out`` is the folder for files that the source writes itself. DataError when files are not as they should be."""
        raise NotImplementedError

    def write_labels(self, rows: list[dict], out: Path) -> None:
        """Write into ``out`` the labels that have to be made first, and name them in the rows (of the scene manifest, paths absolute)."""

    def find_unlabelled(self, out: Path) -> list[FoundScene]:
        """The scenes of ``source.unlabelled``, of which only the image is read; ``out`` as of :meth:`find_scenes`. DataError when a glob
        matches nothing."""
        scenes: dict[Path, FoundScene] = {}  # an image that two of the globs match is one scene
        for pattern in getattr(self.settings, "unlabelled", None) or []:
            images = files_by_key(self.folder, pattern, exclude=getattr(self.settings, "exclude", None))
            if not images:
                raise DataError(
                    f"dataset {self.dataset.name}: no file matches unlabelled: {pattern} below {self.folder}; correct the glob or the root"
                )
            for key, image in sorted(images.items()):
                scenes.setdefault(image, FoundScene(key, image, None, image.relative_to(self.folder), UNLABELLED, "-".join(key[:-1])))
        return list(scenes.values())

    def faults(self) -> list[str]:
        """Which files are missing by a quick check: no image is read and nothing is paired."""
        return []

    def faults_of_unlabelled(self) -> list[str]:
        """The same of the images without labels."""
        return unmatched(self.dataset, self.folder, getattr(self.settings, "unlabelled", None) or [])

    def expected(self, split: str) -> ExpectedScenes | None:
        """The number of scenes of a labelled split by configuration or publication; None if it is known only after listing."""

    def expected_unlabelled(self) -> ExpectedScenes | None:
        """The number of scenes without labels; None if it is known only after listing."""

    # sources whose settings class has CAN_DOWNLOAD:

    def locate(self) -> Path | None:
        """The folder in which the dataset lies in its layout; None where it has to be downloaded."""
        return None if self.lacking() else self.folder

    def lacking(self) -> list[str]:
        """What of the layout is missing; nothing if it is complete."""
        raise NotImplementedError

    def download(self, work: Path, command: str) -> None:
        """Download what is missing into :attr:`folder`, so that :meth:`locate` finds it, and write its record ``fetched.json`` there.

        ``work`` holds unfinished downloads, so that a stopped run continues; finished ones are removed. Messages name
        ``command`` as what to run again.
        """
        raise NotImplementedError

    def download_bytes(self) -> float | None:
        """Disk space for the download and its unpacked files together; None if not known."""

    def find(self) -> Path | None:
        """:meth:`locate`. Raises DataError when the dataset is not there and ``source.download`` is false."""
        folder = self.locate()
        if folder is None and not self.settings.download:
            raise DataError(
                f"source.root: {self.folder} lacks {', '.join(self.lacking())}; set source.download to true to have the dataset fetched, "
                "or source.root to where it lies"
            )
        return folder

    # sources whose settings class has HAS_SERVER:

    def submission(self) -> SceneSource:
        """The images that the dataset's own server scores, as a source to find and download like the others."""
        raise ConfigError(f"dataset {self.dataset.name}: a source of kind {self.settings.kind} has no images for a server of its own")

    def submission_images(self) -> list[Path]:
        """Those images, in the order of the submission. DataError when they are not whole."""
        raise NotImplementedError

    def submission_ids(self) -> Any:
        """The server's id of each training id, uint8 [256]. ConfigError when the dataset's classes are not those of the server."""
        raise NotImplementedError


def open_source(dataset: Dataset, root: Path | str = ".", note: Path | str | None = None) -> SceneSource:
    """The source of a dataset, by the kind in its settings; arguments as of :class:`SceneSource`."""
    module = importlib.import_module(f"{__name__}.{dataset.source.kind}")
    (kind,) = (
        one for one in vars(module).values() if isinstance(one, type) and issubclass(one, SceneSource) and one.__module__ == module.__name__
    )
    return kind(dataset, root, note)


def unmatched(dataset: Dataset, folder: Path, patterns: Iterable[str | None]) -> list[str]:
    """A message for each glob that matches no file below ``folder``."""
    missing = [pattern for pattern in patterns if pattern and not any(glob.iglob(pattern, root_dir=folder, recursive=True))]
    return [f"dataset {dataset.name}: no file matches {pattern} below {folder}; correct the glob or the root" for pattern in missing]


def fetch_dataset(dataset: Dataset, root: Path | str, out: Path | str, command: str = "fetch_dataset", *, submission: bool = False) -> None:
    """Make sure that the dataset's files are there, and write the note ``out`` (JSON) that says where and what they are.

    A dataset that is there in its layout is used as it is and nothing is written into it. Otherwise, where ``source.download`` permits,
    it is downloaded to ``source.root`` (relative: counted from ``root``) as its source says. Unfinished downloads lie in ``.fetching``
    there; a stopped run continues. ``fetched.json`` beside the data says what was downloaded, with checksums.

    With ``submission`` it is the images that the dataset's own server scores, instead of the labelled scenes.

    The note holds ``source`` (kind), ``folder``, ``repo``, ``revision`` and ``files`` (of what was downloaded: sizes and checksums; of
    more than :data:`LISTED_FILES` those of the record), ``licence``. It is written last.

    Raises DataError (not there and not to be downloaded, no network, wrong content) and ResourceError (the disk).
    """
    source = open_source(dataset, root)
    if submission:
        source = source.submission()
    print(f"{dataset.name}: licence: {dataset.licence or 'not stated; ask those who publish it'}", flush=True)
    folder = source.find()
    if folder is None or (source.folder / WORK).is_dir():
        try:
            with exclusive(source.folder / WORK) as work:  # another job may just have downloaded it, or been killed before its last step
                source.download(work, command)
                folder = source.locate()
                if {path.name for path in work.iterdir()} == {".lock"}:
                    shutil.rmtree(work)
        except OSError as error:
            raise ResourceError(f"source.root: {error}; set it to a folder that can be written, or free some space there") from None
    assert folder is not None, "a download ends with the layout that locate finds"
    record = read_record(folder)
    files = record.get("files", {})
    if len(files) > LISTED_FILES:
        files = {FETCH_RECORD: {"size": (folder / FETCH_RECORD).stat().st_size, "sha256": sha256_of(folder / FETCH_RECORD)}}
    note = {"source": dataset.source.kind, "folder": str(folder), "repo": record.get("repo"), "revision": record.get("revision")}
    write_json(out, note | {"files": files, "licence": dataset.licence})
