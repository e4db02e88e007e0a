"""Files of pretrained weights, fetched once and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from crfm_core import CrfmError, ResourceError
from crfm_core.data.transfers import fetch
from crfm_core.files import exclusive, sha256_of
from crfm_core.settings import Download


@contextlib.contextmanager
def _one_at_a_time(path: Path, elsewhere: str) -> Iterator[None]:
    """Hold the folder while a file is fetched: two segmentors may start from the same one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / ".lock").touch()
    except OSError as error:
        raise ResourceError(f"{path}: may not be written ({error.strerror}); {elsewhere}") from None
    with exclusive(path.parent):
        yield


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
        with _one_at_a_time(path, elsewhere):
            fetch(download.url, path, sha256=download.sha256, command=command, elsewhere=elsewhere)
    except CrfmError as error:
        if not optional:
            raise
        print(f"continuing without these weights: {error}", flush=True)
        return {"missing": str(error)}
    return {"file": str(path), "url": download.url, "sha256": sha256_of(path)}
