"""Archives that are downloaded: checked member by member before anything is written, and unpacked completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import lzma
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from crfm_core import DataError, ResourceError
from crfm_core.files import require_disk
from crfm_core.hub import name_fault

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
BOMB_RATIO, BOMB_FROM = 200, 1_000_000_000  #: a bomb unpacks to more bytes than the second, and than the first times its own
COPIED_BYTES = 1 << 20

#: What the libraries raise for archives that are damaged, truncated, encrypted or compressed in an unknown way. An OSError without a
#: number, or from seeking before the file's beginning, is theirs too; any other is the disk's.
DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, struct.error, RuntimeError, ValueError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class _Member:
    """A file or folder of an archive, or something else in it."""

    name: str
    size: int
    kind: str  # file, folder, or what is refused: a link, a device, ...
    open: Callable[[], Any]  #: its content, a binary file

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.name)


def stem_of(archive: Path) -> str:
    """The archive's name without the suffixes of its format."""
    suffix = max((suffix for suffix in ARCHIVE_SUFFIXES if archive.name.lower().endswith(suffix)), key=len, default="")
    return archive.name[: len(archive.name) - len(suffix)]


def extract(archive: Path | str, folder: Path | str) -> Path:
    """Unpack a zip or tar file (by its suffix: :data:`ARCHIVE_SUFFIXES`) to ``folder``, which must not exist yet, and return ``folder``.

    All members are checked before the first is written: files and folders only, names that stay below ``folder`` and do not collide
    even where case does not count, no encryption, enough space on the disk, no bomb (:data:`BOMB_RATIO`). Content is written to a
    temporary folder that is renamed at the end, so that ``folder`` is complete when it exists. Permissions, owners and times are not
    kept, nor what macOS adds (``__MACOSX``, ``.DS_Store``). If everything lies below one folder of ``folder``'s own name, that one
    becomes ``folder``. Only one process at a time may do this for the same ``folder``.

    Raises DataError naming archive and member, and ResourceError when the disk is full or cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: already exists; delete it to have {archive} unpacked to it")
    temporary = folder.with_name(f".{folder.name}.unpacking")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        temporary.mkdir(parents=True)
        with _members_of(archive) as members:
            files = _checked(archive, members, temporary)
            with tqdm(total=sum(file.size for file in files), desc=archive.name, unit="B", unit_scale=True, disable=None) as progress:
                for file in files:
                    _write(archive, file, temporary, progress)
        names = [entry.name for entry in temporary.iterdir()]
        (temporary / folder.name if names == [folder.name] and (temporary / folder.name).is_dir() else temporary).rename(folder)
    except (OSError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise ResourceError(
                f"{archive}: cannot be unpacked to {folder}: {error}; free some space there, or use another folder"
            ) from None
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise DataError(f"{archive}: is damaged, truncated or no such archive ({reason}); delete it and fetch it again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _members_of(archive: Path) -> Iterator[Iterator[_Member]]:
    """The members of an archive that is open inside the block."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            yield (_zip_member(file, info) for info in file.infolist())
    else:
        with tarfile.open(archive, "r:*") as file:
            yield _tar_members(file)


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    mode = stat.S_IFMT(info.external_attr >> 16)  # 0 for archives not made on Unix
    kinds = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
    kind = "folder" if info.is_dir() and kinds.get(mode) == "file" else kinds.get(mode, "device or pipe")
    if info.flag_bits & 0x41:
        kind = "file behind a password"
    # the stored name may hold a NUL, where the library cuts it
    name = info.orig_filename if name_fault(info.orig_filename) else info.filename
    return _Member(name, info.file_size, kind, lambda: file.open(info))


def _tar_members(file: tarfile.TarFile) -> Iterator[_Member]:
    kinds = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link", tarfile.FIFOTYPE: "pipe"}
    for info in file:
        kind = "file" if info.isfile() else "folder" if info.isdir() else kinds.get(info.type, "device")
        yield _Member(info.name, info.size, kind, partial(file.extractfile, info))
    # The library takes a damaged header for the end, but the end is a block of zeros. The rest is read to verify its checksum.
    file.fileobj.seek(file.offset)
    if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends without its end mark")
    while file.fileobj.read(COPIED_BYTES):
        pass


def _checked(archive: Path, members: Iterator[_Member], folder: Path) -> list[_Member]:
    """The files to write, after a check of every member."""
    total, room = 0, max(BOMB_RATIO * archive.stat().st_size, BOMB_FROM)
    files: list[_Member] = []
    kinds: dict[str, str] = {}  # "file" or "folder" by name, with the folders of files
    for member in members:
        if fault := name_fault(member.name):
            if member.kind == "folder" and not member.path.parts and not member.name.startswith("/"):
                continue  # "./", the archive's own root
            _refuse(archive, member, f"its name {fault}")
        if member.kind not in ("file", "folder"):
            _refuse(archive, member, f"it is a {member.kind}")
        total += member.size
        if total > room:
            raise DataError(f"{archive}: unpacks to more than {room / 1e9:.1f} GB, which a sound archive of its size does not; delete it")
        if member.path.is_relative_to("__MACOSX") or member.path.name == ".DS_Store":
            continue
        names = [unicodedata.normalize("NFC", name).casefold() for name in accumulate(member.path.parts, "{}/{}".format)]
        for name in names[:-1]:
            if kinds.setdefault(name, "folder") == "file":
                _refuse(archive, member, "another member is a file where it needs a folder")
        if member.kind == "file" and names[-1] in kinds:
            _refuse(archive, member, "another member has its name, or one that differs in case only")
        if kinds.setdefault(names[-1], member.kind) != member.kind:
            _refuse(archive, member, "another member is a file of its name")
        if member.kind == "file":
            files.append(member)
    if not files:
        raise DataError(f"{archive}: holds no files; delete it and fetch it again")
    require_disk(folder, sum(file.size for file in files), "unpack to a folder on another disk")
    return files


def _refuse(archive: Path, member: _Member, why: str) -> None:
    raise DataError(f"{archive}: member {member.name!r} is refused: {why}; nothing of the archive is unpacked")


def _write(archive: Path, file: _Member, folder: Path, progress: tqdm) -> None:
    """Write a file with the permissions of new files."""
    path = folder.joinpath(*file.path.parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open() as source, path.open("xb") as out:
        while block := source.read(COPIED_BYTES):
            out.write(block)
            progress.update(len(block))
        found = out.tell()
    if found != file.size:
        raise DataError(f"{archive}: member {file.name!r} has {found} bytes of {file.size}; the archive is truncated, fetch it again")
