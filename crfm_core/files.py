"""Files that are whole or absent: atomic writes, content hashes, locks, and paths that stay inside their root."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from crfm_core import CrfmError, DataError, ResourceError

#: Messages of libraries that do not raise an OSError with a number when the disk is full: safetensors, torch's writer of checkpoints.
FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|iostream error|unexpected pos")


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(FULL.search(str(error)))


def full_disk_behind(error: BaseException | None) -> BaseException | None:
    """The error of a full disk that ``error`` is or was caused by; None where there is none.

    A library that cannot write to the log while it loads a model would otherwise be taken to say that the model is damaged.
    """
    if error and not isinstance(error, CrfmError) and is_full_disk(error):
        return error
    while error and not (isinstance(error, OSError) and is_full_disk(error)):
        error = error.__context__
    return error


@contextlib.contextmanager
def _disk_errors_named(target: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk while ``target`` is written into a ResourceError that names it."""
    try:
        yield
    except ResourceError:
        raise
    except Exception as error:
        if is_full_disk(error):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ResourceError(f"{target}: could not be written whole ({reason}); free some space on its disk") from None
        if isinstance(error, OSError) and (
            error.errno == errno.EROFS or error.errno in (errno.EACCES, errno.EPERM) and str(target.parent) in str(error.filename)
        ):
            raise ResourceError(
                f"{target}: may not be written ({error.strerror}); set `results` to a folder that you may write to"
            ) from None
        raise


@contextlib.contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` (same suffix) that is renamed to it when the block succeeds.

    The block may create a file or a folder there. If it raises, what it wrote is removed and ``target`` is untouched; what a killed
    process left is removed by the next one that writes ``target``. Raises ResourceError when the disk is full or read-only.
    """
    target = Path(target)
    with _disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(target) as holder:
            temporary = holder / target.name
            yield temporary
            if temporary.is_dir() and target.is_dir():
                shutil.rmtree(target)
            elif temporary.is_file():
                with temporary.open("rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(temporary, target)


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` for this process alone.

    It has a fixed name, so that what a killed process left in it is found without a search; while another process holds that one
    (two jobs may write one file of a shared store), it has a random name.
    """
    holder = target.with_name(f".{target.name}.writing")
    handle = None
    try:
        handle = _locked(holder, wait=False)
    except BlockingIOError:
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for left in holder.iterdir():
            if left.name != ".lock":
                remove(left)
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        if handle:
            handle.close()


def _locked(folder: Path, wait: bool) -> IO:
    """Create ``folder`` and lock it: the open lock. Without ``wait`` raises BlockingIOError while another process holds it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = (folder / ".lock").open("w")
        except FileNotFoundError:
            if not folder.parent.is_dir():
                raise
            continue  # its holder has just removed it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                handle.close()
                raise
            print(f"Waiting for {folder}, which a job of an earlier run still holds", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat((folder / ".lock").stat(), os.fstat(handle.fileno())):
                return handle
        handle.close()  # the other process removed the folder when it finished, and this lock with it


def write_bytes(target: Path | str, content: bytes) -> None:
    """Write a temporary file and rename it, without waiting for the disk: for many files whose manifest is written last."""
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with _disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(target: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path | str, value: object) -> None:
    """Write JSON atomically, keys in their order, floats in full precision."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> dict:
    """Read a JSON file written by :func:`write_json`. Raises DataError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; build it by naming it as a target of the workflow") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); delete it and run the workflow again") from None


def sha256_of(*paths: Path | str) -> str:
    """Hash of the contents of files, or of all files under folders (names included), as 64 hex digits."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for member in members:
            if path.is_dir():
                digest.update(str(member.relative_to(path)).encode())
            with member.open("rb") as handle:
                hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def hash_of(*parts: object) -> str:
    """Hash of values through their canonical JSON, as 64 hex digits: equal values give equal hashes on any machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, so that a sample's noise depends on its identity and not on where or when it is drawn."""
    return int(hash_of(*parts)[:16], 16) >> 1


def inside(root: Path | str, relative: str) -> Path:
    """Resolve ``relative`` below ``root``. Raises DataError when it leads outside (absolute, ``..`` or through a link) or is no path."""
    root = Path(root).resolve()
    if "\0" in relative:
        raise DataError(f"path {relative!r} holds a null character")
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"path {relative!r} leads outside {root}; paths in manifests must stay below their root")
    return path


@contextlib.contextmanager
def exclusive(folder: Path | str) -> Iterator[Path]:
    """Lock ``folder`` (created if missing) for this process; wait while another process holds it.

    The kernel releases the lock when its holder dies, however it dies, so a killed run never blocks the next.
    """
    with _locked(Path(folder), wait=True):
        yield Path(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def work_folder(folder: Path | str, fingerprint: str) -> Iterator[Path]:
    """Lock a folder of resumable state that belongs to ``fingerprint``; state of any other fingerprint is discarded first.

    The folder is removed when the block succeeds and kept when it is interrupted, so that the next attempt continues from it.
    """
    with exclusive(folder) as held:
        mark = held / "fingerprint"
        if not mark.is_file() or mark.read_text() != fingerprint:
            for member in held.iterdir():
                if member.name != ".lock":
                    remove(member)
            write_text(mark, fingerprint)
        yield held
        shutil.rmtree(held)


def existing_parent(folder: Path | str) -> Path:
    """``folder``, or its nearest parent that exists."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return place


def require_writable(folder: Path | str, remedy: str) -> None:
    """Raise ResourceError with ``remedy`` unless ``folder`` can be written to, or created; nothing is left there."""
    try:
        with tempfile.TemporaryFile(dir=existing_parent(folder)):
            pass
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be written to ({error.strerror}); {remedy}") from None


def require_disk(folder: Path | str, needed_bytes: float, remedy: str = "set `results` to another disk") -> None:
    """Raise ResourceError unless the file system of ``folder`` has ``needed_bytes`` free; ``remedy`` is what else helps."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed_bytes:
        raise ResourceError(f"{folder}: {needed_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; free some space or {remedy}")
