"""Published datasets: downloaded where they are not there, with what was downloaded and its licence written down."""

from __future__ import annotations

import shutil
from pathlib import Path

from crfm_core import ResourceError
from crfm_core.data.sources import open_source
from crfm_core.files import exclusive, sha256_of, write_json
from crfm_core.hub import FETCH_RECORD, read_record
from crfm_core.settings import Dataset

WORK = ".fetching"  #: folder of unfinished downloads, below the dataset's
LISTED_FILES = 1000  #: files that the note of a downloaded dataset lists; of more it names the record


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
