"""Archives: unpacked whole or not at all, and never out of their folder."""

from __future__ import annotations

import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from loopback_files import BODY, in_small_disk, tarred, zipped
from loopback_hub import contents

from crfm_core import DataError
from crfm_core.data.archives import extract


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def zip_special(name: str, mode: int) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info, b"/etc/passwd"


TREE = {"a/1.png": b"one", "a/Ünï çödé 地.png": b"two", "b c/d/3.txt": b"", "4.bin": bytes(200_000)}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
def test_an_archive_is_unpacked_as_it_was_packed_without_its_permissions(tmp_path, suffix):
    path = tmp_path / f"Some data{suffix}"
    if suffix == ".zip":
        zipped(path, [("a/", b""), *TREE.items(), zip_special("tool.sh", stat.S_IFREG | 0o6777)])
    else:
        script = tarfile.TarInfo("./tool.sh")
        script.mode = 0o6777
        tarred(path, [special("./", tarfile.DIRTYPE), *((f"./{name}", body) for name, body in TREE.items()), script])
    folder = extract(path, tmp_path / "new" / "out")
    found = contents(folder)
    assert found.pop("tool.sh") == (b"/etc/passwd" if suffix == ".zip" else b"") and found == TREE
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o7777 for path in folder.rglob("*") if path.is_file()} == {0o666 & ~mask}
    assert path.exists() and [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_lone_folder_of_the_wanted_name_is_the_wanted_folder_and_what_macos_adds_is_left_out(tmp_path):
    added = {"__MACOSX/Train/._1.png": b"?", "Train/.DS_Store": b"?"}
    files = {"Train/Urban/1.png": b"one", **added}
    assert contents(extract(zipped(tmp_path / "1.zip", files), tmp_path / "Train")) == {"Urban/1.png": b"one"}
    assert contents(extract(tmp_path / "1.zip", tmp_path / "Other")) == {"Train/Urban/1.png": b"one"}
    other = {"Train/1.png": b"one", "Val/1.png": b"two"}
    assert contents(extract(zipped(tmp_path / "2.zip", other), tmp_path / "Val")) == other


NAMES = [
    ("../evil", "its name leads upwards"),
    ("a/../../evil", "its name leads upwards"),
    ("a/..", "its name leads upwards"),
    ("/etc/evil", "its name is absolute"),
    ("a\\..\\evil", "its name holds a backslash"),
    ("C:/evil", "its name begins with a drive letter"),
    ("C:evil", "its name begins with a drive letter"),
    ("a\nb", "its name holds control characters"),
    ("x" * 256, "its name is too long"),
]


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.parametrize(("name", "why"), NAMES)
def test_no_member_leads_out_of_the_folder(tmp_path, name, why, suffix):
    path, members = tmp_path / f"x{suffix}", [("good", b"1"), (name, b"2")]
    (zipped if suffix == ".zip" else tarred)(path, members)
    with pytest.raises(DataError) as caught:
        extract(path, tmp_path / "in" / "out")
    assert str(caught.value) == f"{path}: member {name!r} is refused: {why}; nothing of the archive is unpacked"
    assert {path.name for path in tmp_path.rglob("*")} == {path.name, "in"}


def test_a_name_that_a_nul_cuts_short_is_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", {"good.pngXevil": b"1"})
    path.write_bytes(path.read_bytes().replace(b"pngX", b"png\0"))
    with pytest.raises(DataError, match="its name holds control characters"):
        extract(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([special("link", tarfile.SYMTYPE)], "member 'link' is refused: it is a symbolic link"),
        ([special("a/link", tarfile.LNKTYPE)], "member 'a/link' is refused: it is a hard link"),
        ([special("disk", tarfile.BLKTYPE)], "it is a device"),
        ([special("tty", tarfile.CHRTYPE)], "it is a device"),
        ([special("pipe", tarfile.FIFOTYPE)], "it is a pipe"),
        ([special("sub", tarfile.SYMTYPE), ("sub/evil", b"1")], "it is a symbolic link"),
        ([zip_special("link", stat.S_IFLNK | 0o777)], "member 'link' is refused: it is a symbolic link"),
        ([zip_special("pipe", stat.S_IFIFO)], "it is a device or pipe"),
        ([zip_special("disk", stat.S_IFBLK)], "it is a device or pipe"),
        ([("a", b"1"), ("a", b"2")], "member 'a' is refused: another member has its name"),
        ([("a/b", b"1"), ("./a//b", b"2")], "another member has its name"),
        ([("A.png", b"1"), ("a.PNG", b"2")], "member 'a.PNG' is refused: another member has its name, or one that differs in case only"),
        ([("\u00fc", b"1"), ("u\u0308", b"2")], "another member has its name"),
        ([("a", b"1"), ("a/b", b"2")], "member 'a/b' is refused: another member is a file where it needs a folder"),
        ([("A/b", b"1"), ("a", b"2")], "member 'a' is refused: another member has its name"),
        ([("a", b"1"), special("a/", tarfile.DIRTYPE)], "another member is a file of its name"),
        ([], "holds no files"),
        ([special("a/", tarfile.DIRTYPE)], "holds no files"),
    ],
)  # fmt: skip
def test_links_devices_and_names_that_collide_are_refused_before_anything_is_written(tmp_path, members, message):
    as_tar = any(isinstance(member, tarfile.TarInfo) for member in members)
    path = tarred(tmp_path / "x.tar", [("good", b"1"), *members] if "no files" not in message else members) if as_tar else zipped(
        tmp_path / "x.zip", members
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        extract(path, tmp_path / "out")
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_a_bomb_is_not_unpacked(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".zip":
        info = zipfile.ZipInfo("zeros")
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 0
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, bytes(1000))
        body = path.read_bytes()
        path.write_bytes(body.replace((1000).to_bytes(4, "little"), (2_000_000_000).to_bytes(4, "little")))
    else:
        info = tarfile.TarInfo("zeros")
        info.size = 2_000_000_000  # what follows need not even be there
        with tarfile.open(path, "w:gz") as archive:
            archive.fileobj.write(info.tobuf())
    with pytest.raises(DataError, match=rf"x\{suffix}: unpacks to more than 1\.0 GB, which a sound archive of its size does not"):
        extract(path, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def encrypt(path: Path) -> None:
    """Set the flag that says so, in both of a zip file's headers."""
    body = bytearray(path.read_bytes())
    body[6] |= 1
    body[body.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(body)


PACKED = (".tar.gz", ".tar.bz2", ".tar.xz")


def flip(path: Path, place: float) -> None:
    body = bytearray(path.read_bytes())
    body[int(len(body) * place)] ^= 255
    path.write_bytes(body)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".zip", encrypt, "member 'a/1.png' is refused: it is a file behind a password"),
        (".zip", lambda path: os.truncate(path, path.stat().st_size - 30), r"is damaged, truncated or no such archive \(File is not a zip"),
        (".zip", lambda path: os.truncate(path, 1000), "is damaged, truncated"),
        (".zip", lambda path: path.write_bytes(path.read_bytes()[500:]), "is damaged"),
        (".zip", lambda path: flip(path, 0.5), r"is damaged, .*Bad CRC-32 for file '4.bin'"),
        (".zip", lambda path: path.write_bytes(b"<html>"), "is damaged, truncated or no such archive"),
        (".zip", lambda path: path.write_bytes(b""), "is damaged, truncated or no such archive"),
        (".tar", lambda path: os.truncate(path, 2048), r"is damaged, .*\(it ends without its end mark\)"),
        (".tar", lambda path: os.truncate(path, 1700), "is damaged"),
        (".tar", lambda path: os.truncate(path, 100_000), r"is damaged, .*\(unexpected end of data\)"),
        (".tar", lambda path: flip(path, 1100 / path.stat().st_size), r"is damaged, .*\(it ends without its end mark\)"),
        (".tar", lambda path: path.write_bytes(b"<html>" * 500), r"is damaged, .*\(file could not be opened successfully\)"),
        (".tar", lambda path: path.write_bytes(b""), "is damaged"),
        *((suffix, lambda path: os.truncate(path, path.stat().st_size // 2), "is damaged") for suffix in PACKED),
        *((suffix, lambda path: os.truncate(path, path.stat().st_size - 4), "is damaged") for suffix in (".tar.gz", ".tar.xz")),
        (".tar.gz", lambda path: flip(path, 0.5), "is damaged"),
    ],
)  # fmt: skip
def test_an_archive_that_cannot_be_read_to_its_end_is_named_and_leaves_nothing(tmp_path, suffix, damage, message):
    path, files = tmp_path / f"x{suffix}", [("a/1.png", b"one"), ("2.txt", b"two"), ("4.bin", BODY[:200_000])]
    (zipped if suffix == ".zip" else tarred)(path, files)
    damage(path)
    with pytest.raises(DataError, match=rf"^{path}: {message}"):
        extract(path, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_there_is_not_touched_and_what_a_killed_run_left_aside_is_removed(tmp_path):
    path = zipped(tmp_path / "x.zip", TREE)
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking" / "half").write_bytes(b"?")
    assert contents(extract(path, tmp_path / "out")) == TREE
    with pytest.raises(DataError, match=r"out: already exists; delete it to have \S+x\.zip unpacked to it"):
        extract(path, tmp_path / "out")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["out", "x.zip"]


def test_a_disk_that_fills_while_unpacking_is_named_and_given_back_its_space(tmp_path):
    program = """
import os
from crfm_core.data.archives import extract
for options in ("nr_inodes=20", "size=100k"):
    os.system(f"mount -o remount,{options} '{sys.argv[1]}'")
    try:
        extract(sys.argv[2 if "inodes" in options else 3], sys.argv[1] + "/out")
    except CrfmError as error:
        print(type(error).__name__, error, os.listdir(sys.argv[1]))
"""
    many = zipped(tmp_path / "many.zip", {f"{number}.png": b"1" for number in range(100)})
    large = zipped(tmp_path / "large.zip", {"large": BODY})
    said = in_small_disk(tmp_path / "disk", "size=1m", program, str(many), str(large)).splitlines()
    assert re.match(
        r"ResourceError \S+many\.zip: cannot be unpacked to \S+out: .*No space left .*; free some space there, or .* \[\]$", said[0]
    )
    assert re.match(r"ResourceError .*GB needed, 0\.0 GB free; free some space or unpack to a folder on another disk \[\]$", said[1])
