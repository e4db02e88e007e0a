"""Download one file: resumed where it was stopped, and checked before it gets its name."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

from crfm_core import DataError, ResourceError, __version__
from crfm_core.files import require_disk

TIMEOUT = (30, 60)  #: seconds to wait for a connection, and for the next bytes
RETRIES = 5  #: attempts in a row that may bring nothing new
PAUSE, LONGEST_PAUSE = 1.0, 60.0  #: seconds before the first retry, doubled for each further one, and their limit
REDIRECTS = 10
RECEIVED_BYTES = 1 << 16
ANOTHER_DISK = "set source.root to a folder on another disk"


class _TransientError(Exception):
    """An error that a retry may cure: no connection, a busy server, a body that ended early."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks for


def fetch(
    url: str,
    path: Path | str,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    space: float = 1.0,
    command: str = "fetch",
    elsewhere: str = ANOTHER_DISK,
) -> Path:
    """Download ``url`` to ``path`` and return ``path``; nothing is downloaded when the file exists with the right size and checksums.

    Received bytes are kept in ``path`` + ".part", and a later call continues after them where the server supports ranges. The file gets
    its name when its length is the server's (and ``size``) and ``md5`` and ``sha256`` match; these may be the first digits of a checksum.
    Broken connections, timeouts and busy servers are retried until nothing new came :data:`RETRIES` times. Only https is used, also
    after redirects (http on this machine itself); proxies are those of the environment. ``space`` is the free disk space to require, in
    sizes of the file. Messages name ``command`` as what to run again, and ``elsewhere`` as the remedy for a full disk. Only one process
    at a time may do this for the same ``path``.

    Raises DataError (no network, refused, wrong content) and ResourceError (the disk). Messages hold addresses without what follows
    "?" and without names and passwords.
    """
    path, shown, again = Path(path), _shown(url), f"run `{command}` again"
    _check_address(url, shown)
    checksums = {name: value for name, value in (("md5", md5), ("sha256", sha256)) if value}
    if path.is_file():
        if fault := _fault(path, size, checksums):
            raise DataError(f"{path}: {fault}; delete it to have it fetched from {shown}")
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _complete(url, part, size, space, command, elsewhere)
        if fault := _fault(part, size, checksums):
            part.unlink()
            raise DataError(f"{shown}: the download {fault}; it is deleted, {again}, and if that fails too check the address")
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ResourceError(f"{path}: {error}; free some space there or {elsewhere}, then {again}, it continues where it stopped") from None
    return path


def _fault(path: Path, size: int | None, checksums: dict[str, str]) -> str:
    """What is wrong with a file, by its size and its checksums by algorithm; "" if nothing is."""
    if size is not None and path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, expected {size}"
    for name, expected in checksums.items():
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, partial(hashlib.new, name, usedforsecurity=False)).hexdigest()
        if not found.startswith(expected.lower()):
            return f"has the {name} {found}, expected {expected.lower()}"
    return ""


def _complete(url: str, part: Path, size: int | None, space: float, command: str, elsewhere: str) -> None:
    """Request the file until ``part`` holds all of it, by its length."""
    failures = furthest = 0
    while True:
        begin = part.stat().st_size if part.exists() else 0
        if begin == size:
            return
        if size is not None and begin > size:
            part.unlink()
            begin = 0
        try:
            _continue(url, part, begin, size, space, elsewhere)
            return
        except _TransientError as error:
            reached = part.stat().st_size if part.exists() else 0
            failures = 0 if reached > furthest else failures + 1  # a server that begins anew each time brings nothing new
            furthest = max(furthest, reached)
            if failures > RETRIES:
                raise DataError(
                    f"{_shown(url)}: {error}, and nothing new came in {failures} tries; where there is a network, such as the login node "
                    f"of a cluster, run `{command}` again, it continues where it stopped; or put the file at {part.with_suffix('')}"
                ) from None
            wait = min(max(PAUSE * 2 ** max(failures - 1, 0), error.wait), LONGEST_PAUSE)
            print(f"{_shown(url)}: {error}; trying again in {wait:.0f} s", flush=True)
            time.sleep(wait)


def _continue(url: str, part: Path, begin: int, size: int | None, space: float, elsewhere: str) -> None:
    """One request for what follows the first ``begin`` bytes. Returns when all has come."""
    shown = _shown(url)
    headers = {"Accept-Encoding": "identity", "User-Agent": f"crfm_core/{__version__}"} | ({"Range": f"bytes={begin}-"} if begin else {})
    with _answer(url, headers) as answer:
        status = answer.status_code
        if status == 416 and begin:
            if answer.headers.get("Content-Range", "").replace(" ", "") == f"bytes*/{begin}":
                return  # it was whole
            part.unlink()
            raise _TransientError(f"has nothing after byte {begin}")
        if status in (408, 429) or status >= 500:
            wait = answer.headers.get("Retry-After", "")
            raise _TransientError(f"answered with status {status}", float(wait) if wait.isdigit() else 0.0)
        if status not in (200, 206):
            raise DataError(f"{shown}: answered with status {status}; check the address, and whether the file is still published there")
        if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
            raise DataError(f"{shown}: is sent with the encoding {encoding}, which was not requested; check the address and the proxy")
        if status == 200:
            begin = 0  # the server does not serve ranges
        total = _total(answer, begin, shown)
        if size is not None and total not in (None, size):
            raise DataError(f"{shown}: has {total} bytes there, expected {size}; the file there has been replaced")
        require_disk(part.parent, round(space * (total or 0)) - begin, elsewhere)
        _append(answer, part, begin, total, shown)


def _total(answer: requests.Response, begin: int, shown: str) -> int | None:
    """The length of the whole file by the answer's headers; None where they lack it."""
    if answer.status_code == 200:
        length = answer.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    header = answer.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", header.strip())
    if not found or not begin or int(found[1]) != begin or not begin <= int(found[2]) < int(found[3]):
        raise DataError(
            f"{shown}: answers a request from byte {begin} on with Content-Range {header!r}; delete the .part file, or fetch it by hand"
        )
    return int(found[3])


def _append(answer: requests.Response, part: Path, begin: int, total: int | None, shown: str) -> None:
    """Write the body to ``part`` after its first ``begin`` bytes, as it arrives."""
    bar = tqdm(desc=part.stem, initial=begin, total=total, unit="B", unit_scale=True, disable=None)
    with part.open("ab" if begin else "wb") as out, bar:
        try:  # with reads of whole blocks, the library would lose the part of a block before a connection broke
            while block := answer.raw.read1(RECEIVED_BYTES, decode_content=False):
                out.write(block)
                bar.update(len(block))
        except urllib3.exceptions.HTTPError as error:
            raise _TransientError(_cause(error)) from None
        found = out.tell()
    if total is not None and found < total:
        raise _TransientError(f"ended after {found} of {total} bytes")
    if total is not None and found > total:
        part.unlink()
        raise DataError(f"{shown}: sent {found} bytes and said that the file has {total}; what came is deleted, fetch it by hand")


@contextlib.contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[requests.Response]:
    """The answer to a request, after redirects, each to a permitted address."""
    start = url
    with requests.Session() as session:
        for _ in range(REDIRECTS + 1):
            shown = _shown(url)
            try:
                answer = session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=TIMEOUT)
            except requests.exceptions.SSLError as error:
                raise DataError(
                    f"{shown}: cannot be reached safely ({_cause(error)}); REQUESTS_CA_BUNDLE names a proxy's own certificates"
                ) from None
            except requests.RequestException as error:
                if isinstance(error, ValueError):  # no network error
                    raise DataError(f"{shown}: cannot be requested ({type(error).__name__}); check the address and the proxy") from None
                raise _TransientError(f"cannot be reached ({_cause(error)})") from None
            with answer:
                if not answer.is_redirect:
                    yield answer
                    return
            url = urljoin(url, answer.headers["Location"])
            _check_address(url, f"{_shown(start)} leads to {_shown(url)}", from_here=_is_here(start))
        raise DataError(f"{_shown(start)}: redirects more than {REDIRECTS} times; check the address, and whether the network wants a login")


def _cause(error: BaseException) -> str:
    """The innermost reason; the outer ones repeat addresses with their secrets."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shown(url: str) -> str:
    """An address for messages: without user name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _check_address(url: str, shown: str, from_here: bool = True) -> None:
    """Refuse an address without https, except on this machine, to which no other host may redirect."""
    parts = urlsplit(url)
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and _is_here(url) and from_here)):
        raise DataError(f"{shown}: only https is permitted; check the address, and whether the network wants a login")


def _is_here(url: str) -> bool:
    """Whether the address is on the loopback."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
