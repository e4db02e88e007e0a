"""Files of pretrained weights, fetched once and checked."""

from __future__ import annotations

from pathlib import Path

from crfm_core import CrfmError
from crfm_core.data.transfers import fetch
from crfm_core.files import exclusive, require_writable, sha256_of
from crfm_core.settings import Download


def fetch_weights(download: Download, command: str = "fetch_weights", optional: bool = False) -> dict[str, str]:
    """Fetch a file unless it is there; returns {"file": its absolute path, "url", "sha256": its whole checksum}.

    Args:
        command: to run again, for messages.
        optional: return {"missing": reason} for a file that cannot be fetched, and go on.

    Raises DataError (no network, wrong content) and ResourceError (the disk).
    """
    path = Path(download.file).resolve()
    elsewhere = "set `path` of the download to a place on another disk"
    try:
        require_writable(path.parent, elsewhere)
        with exclusive(path.parent):  # two segmentors may start from one file
            fetch(download.url, path, sha256=download.sha256, command=command, elsewhere=elsewhere)
    except CrfmError as error:
        if not optional:
            raise
        print(f"continuing without these weights: {error}", flush=True)
        return {"missing": str(error)}
    return {"file": str(path), "url": download.url, "sha256": sha256_of(path)}
