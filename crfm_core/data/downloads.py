"""Datasets from where they are published: fetched where they are not there, with what was fetched and its licence written down."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from crfm_core import DataError, ResourceError
from crfm_core.data.adapters.fusu import label_folder
from crfm_core.data.adapters.loveda import AREAS, SPLITS
from crfm_core.data.archives import SUFFIXES, extract, stem_of
from crfm_core.data.transfers import fetch
from crfm_core.files import exclusive, read_json, sha256_of, write_json
from crfm_core.hub import RECORD, fetch_repository, read_record
from crfm_core.settings import Dataset, FusuSource, LoveDASource

WORK = ".fetching"  #: folder for what is on its way, below the dataset's
LOVEDA_RECORD = "records/5706578"
#: Archives of that record and their MD5 as Zenodo lists them; Test.zip is left out, as its labels are secret.
LOVEDA_ARCHIVES = {"Train.zip": "de2b196043ed9b4af1690b3f9a7d558f", "Val.zip": "84cae2577468ff0b5386758bb386d31d"}
FUSU_SPLITS = ("train", "val", "test")
FUSU_FOLDERS = ("im1", "im2", "im1_label", "im2_label", "label1", "label2")
MANY = 1000  #: files that the note of a fetched dataset lists; of more it names the record


def fetch_dataset(dataset: Dataset, root: Path | str, out: Path | str, command: str = "fetch_dataset") -> None:
    """See to it that the dataset's files are there, and write the note ``out`` (JSON) that says where and what they are.

    A dataset that is there in its layout, or for FUSU one folder down, is used as it is and nothing is written into it. Otherwise it is
    downloaded to ``source.root`` (relative: counted from ``root``), where ``source.download`` permits: LoveDA from its Zenodo record,
    FUSU from the model hub (:func:`crfm_core.hub.fetch_repository`). What is on its way lies in ``.fetching`` there; a stopped run
    continues. Archives are removed after they are unpacked; a Train.zip or Val.zip that the user put into the folder is taken instead of
    a download, if it is the right one, and left there. ``fetched.json`` beside the data says what was downloaded, with checksums.

    ``CRFM_ZENODO`` gives another address for https://zenodo.org (a mirror), ``HF_ENDPOINT`` and ``HF_TOKEN`` those of the hub.

    The note holds ``source`` (kind), ``folder``, ``repo``, ``revision`` and ``files`` (of what was downloaded: sizes and checksums; of
    more than :data:`MANY` those of the record), ``licence``. It is written last.

    Raises DataError (not there and not to be downloaded, no network, wrong content) and ResourceError (the disk).
    """
    source, folder = dataset.source, (Path(root) / dataset.source.root).resolve()
    print(f"{dataset.name}: licence: {dataset.licence or 'not stated; ask those who publish it'}", flush=True)
    place = find_dataset(dataset, root)
    if place is None or (folder / WORK).is_dir():
        try:
            with exclusive(folder / WORK) as work:  # another job may just have fetched it, or been killed before its last step
                BRING[source.kind](source, folder, work, command)
                place = PLACES[source.kind](folder, source)
                shutil.rmtree(work)
        except OSError as error:
            raise ResourceError(f"source.root: {error}; set it to a folder that can be written, or free some space there") from None
    record = read_record(place)
    files = record.get("files", {})
    if len(files) > MANY:
        files = {RECORD: {"size": (place / RECORD).stat().st_size, "sha256": sha256_of(place / RECORD)}}
    note = {"source": source.kind, "folder": str(place), "repo": record.get("repo"), "revision": record.get("revision"), "files": files}
    write_json(out, note | {"licence": dataset.licence})


def find_dataset(dataset: Dataset, root: Path | str) -> Path | None:
    """Where a published dataset lies; None where it has to be fetched. Raises DataError when it is not there and may not be fetched."""
    source, folder = dataset.source, (Path(root) / dataset.source.root).resolve()
    place = PLACES[source.kind](folder, source)
    if place is None and not source.download:
        raise DataError(
            f"source.root: {folder} lacks {_lacking(folder, source)}; set source.download to true to have the dataset fetched, or "
            f"source.root to where it lies"
        )
    return place


def _lacking(folder: Path, source: LoveDASource | FusuSource) -> str:
    """What is not there of a dataset, in words."""
    if isinstance(source, LoveDASource):
        return ", ".join(lack for part in SPLITS.values() for lack in _loveda_lacks(folder, part))
    date = source.date
    return f"images (.png) in im{date}/ with labels in im{date}_label/ or label{date}/ beside it, there or in train/, val/, test/"


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix == ".png" and not path.name.startswith(".") for path in folder.iterdir())


def _loveda_lacks(folder: Path, part: str) -> list[str]:
    names = [f"{part}/{area}/{kind}" for area in AREAS for kind in ("images_png", "masks_png")]
    return [name for name in names if not _holds_images(folder / name)]


def _loveda_place(folder: Path, source: LoveDASource) -> Path | None:
    return None if any(_loveda_lacks(folder, part) for part in SPLITS.values()) else folder


def _bring_loveda(source: LoveDASource, folder: Path, work: Path, command: str) -> None:
    """Fetch and unpack the parts that are not there."""
    base = os.environ.get("CRFM_ZENODO", "https://zenodo.org").rstrip("/")
    record = read_record(folder)
    for name, md5 in LOVEDA_ARCHIVES.items():
        part = stem_of(Path(name))
        if not (lacks := _loveda_lacks(folder, part)):
            continue
        if (folder / part).is_dir() and any((folder / part).iterdir()):
            raise DataError(f"source.root: {folder} has {part} but lacks {', '.join(lacks)}; complete it, or delete it to have it fetched")
        archive = folder / name if (folder / name).is_file() else work / name
        fetch(f"{base}/{LOVEDA_RECORD}/files/{name}?download=1", archive, md5=md5, space=2, command=command)  # 2: PNGs do not shrink
        shutil.rmtree(work / part, ignore_errors=True)
        extract(archive, work / part)
        if lacks := _loveda_lacks(work, part):
            raise DataError(f"{archive}: lacks {', '.join(lacks)}; it is not LoveDA's {name}")
        files = record.get("files", {}) | {name: {"size": archive.stat().st_size, "md5": md5}}
        record = {"repo": f"https://zenodo.org/{LOVEDA_RECORD}", "files": files}
        write_json(folder / RECORD, record)
        (work / part).rename(folder / part)
        if archive.parent == work:
            archive.unlink()


def _fusu_place(folder: Path, source: FusuSource, depth: int = 1) -> Path | None:
    """The folder in which a layout begins: ``folder`` or one at most ``depth`` below it. DataError when several below it have one."""

    def has_layout(place: Path) -> bool:
        for part in (place, *(place / split for split in FUSU_SPLITS)):
            labels = label_folder(part, source.date)
            if labels and _holds_images(part / f"im{source.date}") and _holds_images(part / labels):
                return True
        return False

    if has_layout(folder):
        record = read_record(folder)
        held = (record.get("repo"), record.get("revision"), record.get("asked"))
        if held[1] and (source.repo != held[0] or source.revision not in held[1:]):
            raise DataError(
                f"source.revision: {folder} holds {held[0]} at {held[1]}, not {source.repo} at {source.revision}; set source.repo and "
                "source.revision to what it holds, or source.root to another folder to have the other fetched"
            )
        return folder
    level = [folder]
    for _ in range(depth):
        level = [below for place in level if place.is_dir() for below in sorted(place.iterdir()) if below.is_dir() and _is_data(below)]
        found = [place for place in level if has_layout(place)]
        if len(found) > 1:
            raise DataError(f"source.root: {', '.join(map(str, found))} each hold a layout of FUSU; set source.root to one, or merge them")
        if found:
            return found[0]
    return None


def _is_data(folder: Path) -> bool:
    """Whether a folder is neither hidden nor one of those that programs add."""
    return not folder.name.startswith((".", "__"))


def _bring_fusu(source: FusuSource, folder: Path, work: Path, command: str) -> None:
    """Fetch the repository, unpack its archives, and move what is the dataset into its place."""
    whole = work / "whole"
    if not whole.is_dir():
        if _fusu_place(folder, source):
            return
        if there := [name for name in (*FUSU_FOLDERS, *FUSU_SPLITS) if (folder / name).exists()]:
            raise DataError(
                f"source.root: {folder} has {', '.join(there)} but lacks {_lacking(folder, source)}; complete it, or delete them to have "
                "the dataset fetched"
            )
        place = _fetch_fusu(source, folder, work / "hub", command)
        for text in (path for path in (work / "hub").iterdir() if path.is_file() and _is_text(path.name)):
            if not (folder / text.name).exists():
                shutil.copyfile(text, folder / text.name)
        place.rename(whole)
    for held in (work / "hub", whole):  # the record lies in one of them, with what was not renamed; written again by a run that goes on
        if record := read_record(held):
            write_json(folder / RECORD, record)
    for path in sorted(whole.iterdir()):
        if path.is_dir() and _is_data(path):
            if (folder / path.name).exists():
                raise DataError(f"source.root: {folder / path.name} is there already; move it away to have the dataset's put there")
            path.rename(folder / path.name)


def _fetch_fusu(source: FusuSource, folder: Path, hub: Path, command: str) -> Path:
    """The fetched and unpacked repository, or the folder in it that has a layout."""
    instead = f"put the dataset into {folder} by hand"

    def check(names: set[str]) -> None:
        if all(_is_text(name) for name in names):
            raise DataError(
                f"source.repo: {source.repo} holds neither images in {', '.join(FUSU_FOLDERS)} nor archives ({', '.join(SUFFIXES)}); "
                f"{instead}"
            )

    held = read_record(hub)
    if held and (held["repo"] != source.repo or source.revision not in (held["revision"], held["asked"])):
        shutil.rmtree(hub)  # with what was unpacked of the other revision
    options = {"repo_type": "dataset", "check": check, "key": "source", "place": "root", "instead": instead, "command": command}
    fetch_repository(source.repo, source.revision, hub, needed=_is_of_fusu, **options)
    names = sorted(read_json(hub / RECORD)["files"])
    targets = {name: (hub / name).with_name(stem_of(hub / name)) for name in names if name.lower().endswith(SUFFIXES)}
    for name, target in targets.items():
        below = f"{target.relative_to(hub).as_posix()}/"
        if list(targets.values()).count(target) > 1 or any(other.startswith(below) for other in names):
            raise DataError(f"source.repo: {source.repo} has {name} and files in a folder of that name or two such archives; {instead}")
        if not target.exists():  # it is whole when it is there
            extract(hub / name, target)
    if (place := _fusu_place(hub, source, depth=3)) is None:
        raise DataError(
            f"source.repo: what {source.repo} holds ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''}) lacks "
            f"{_lacking(hub, source)}; it lies unpacked in {hub}: bring it into a layout and move that to {folder}"
        )
    return place


def _is_text(name: str) -> bool:
    return PurePosixPath(name).name.upper().startswith(("README", "LICENSE", "LICENCE"))


def _is_of_fusu(name: str) -> bool:
    """Whether a file of the repository is part of the dataset: not the monthly Sentinel images, which nothing here reads."""
    path = PurePosixPath(name)
    return _is_text(name) or name.lower().endswith(SUFFIXES) or (path.suffix == ".png" and path.parent.name in FUSU_FOLDERS)


#: By kind of source: what finds the dataset in a folder, and what brings it there.
PLACES = {"loveda": _loveda_place, "fusu": _fusu_place}
BRING = {"loveda": _bring_loveda, "fusu": _bring_fusu}
