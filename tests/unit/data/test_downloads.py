"""Downloads, archives and published datasets, from servers that this file starts on the loopback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from loopback_files import BODY, FLAT, REPO, Server, archive_bytes, dataset, in_small_disk, png, tarred, zipped
from loopback_hub import NEXT_REVISION, REVISION, Hub, contents, serve_hub, stop
from paths import CONFIGS, ROOT

from crfm_core import DataError
from crfm_core.data import downloads, transfers
from crfm_core.data.archives import extract
from crfm_core.data.downloads import fetch_dataset
from crfm_core.data.scenes import list_scenes, read_scenes
from crfm_core.data.transfers import fetch
from crfm_core.settings import Dataset

MD5, SHA256 = hashlib.md5(BODY).hexdigest(), hashlib.sha256(BODY).hexdigest()


# ------------------------------------------------------------------------------------------------------------- the server


def start_part(path: Path, bytes_there: bytes) -> Path:
    path.with_name(f"{path.name}.part").write_bytes(bytes_there)
    return path


# --------------------------------------------------------------------------------------------------------------- one file


def test_a_file_is_fetched_whole_and_then_never_again(server, tmp_path):
    path = fetch(f"{server.url}/file", tmp_path / "new" / "file", md5=MD5, sha256=SHA256, size=len(BODY))
    assert path.read_bytes() == BODY and list(tmp_path.rglob("*.part")) == []
    assert fetch(f"{server.url}/file", path, md5=MD5.upper()) == path
    assert server.requests == [("/file", None)]


@pytest.mark.parametrize("length", [0, 1, 100_000, 299_999])
def test_what_has_come_is_kept_and_only_the_rest_is_asked_for(server, tmp_path, length):
    path = start_part(tmp_path / "file", BODY[:length])
    assert fetch(f"{server.url}/file", path, md5=MD5).read_bytes() == BODY
    assert server.requests == [("/file", f"bytes={length}-" if length else None)]


@pytest.mark.parametrize("known", [{}, {"size": 300_000}], ids=["length unknown", "length known"])
def test_a_part_that_is_whole_needs_no_byte_more(server, tmp_path, known):
    path = start_part(tmp_path / "file", BODY)
    assert fetch(f"{server.url}/file", path, md5=MD5, **known).read_bytes() == BODY
    assert server.requests == ([] if known else [("/file", "bytes=300000-")]), "the server says by 416 that there is no more"


@pytest.mark.parametrize("known", [{}, {"size": 300_000}], ids=["length unknown", "length known"])
def test_a_part_that_is_too_long_is_begun_anew(server, tmp_path, known):
    path = start_part(tmp_path / "file", BODY + b"more")
    assert fetch(f"{server.url}/file", path, md5=MD5, **known).read_bytes() == BODY
    assert server.requests[-1] == ("/file", None)


def test_a_server_that_ignores_ranges_is_begun_anew(server, tmp_path):
    server.ranges = False
    path = start_part(tmp_path / "file", b"?" * 1000)
    assert fetch(f"{server.url}/file", path, md5=MD5).read_bytes() == BODY


def test_a_body_in_chunks_of_unknown_length_is_fetched_and_continued(server, tmp_path):
    server.chunked, server.headers = True, {"Transfer-Encoding": "chunked", "Content-Length": ""}
    assert fetch(f"{server.url}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY
    assert fetch(f"{server.url}/file", start_part(tmp_path / "other", BODY[:5000]), md5=MD5).read_bytes() == BODY
    assert server.requests == [("/file", None), ("/file", "bytes=5000-")]


def test_connections_that_break_again_and_again_are_continued_as_long_as_something_comes(server, tmp_path):
    server.cuts = [30_000] * 9
    assert fetch(f"{server.url}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY
    begins = [int(ranges[6:-1]) for _, ranges in server.requests[1:]]
    assert len(begins) == 9 > transfers.RETRIES and begins == sorted(set(begins)) and begins[0] > 0


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_stops_at_one_place_is_given_up_and_named(server, tmp_path, ranges):
    server.ranges, server.cuts = ranges, [140_000] + [0 if ranges else 140_000] * 50
    with pytest.raises(DataError, match=rf"{server.url}/file: .*nothing new came in 6 tries; .*run `get it` again, it continues"):
        fetch(f"{server.url}/file", tmp_path / "file", md5=MD5, command="get it")
    kept = (tmp_path / "file.part").read_bytes()
    assert 0 < len(kept) <= 140_000 and BODY.startswith(kept) and not (tmp_path / "file").exists()
    assert len(server.requests) <= 8


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_busy_server_is_asked_again(server, tmp_path, status):
    server.statuses = [status] * transfers.RETRIES
    assert fetch(f"{server.url}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY
    server.statuses = [status] * (transfers.RETRIES + 1)
    with pytest.raises(DataError, match=f"answered with status {status}, and nothing new came in 6 tries"):
        fetch(f"{server.url}/file", tmp_path / "again")


def test_a_server_asks_for_no_longer_pause_than_the_longest(server, tmp_path, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(transfers, "PAUSE", 1.0)
    monkeypatch.setattr(transfers, "LONGEST_PAUSE", 5.0)
    server.statuses = [503] * 5
    fetch(f"{server.url}/file", tmp_path / "file")
    assert pauses == [1, 2, 4, 5, 5] and "status 503; trying again in 4 s" in capsys.readouterr().out


def test_no_connection_at_all_says_where_to_run_what(server, tmp_path):
    server.shutdown(), server.server_close()
    with pytest.raises(DataError, match=r"cannot be reached \(ConnectionRefusedError: .*login node of a cluster, run `make it` again"):
        fetch(f"{server.url}/file", tmp_path / "file", command="make it")


@pytest.mark.parametrize(
    ("headers", "part", "message"),
    [
        ({}, b"", "what came has the md5 [0-9a-f]{32}, expected f{32}; it is deleted, run `get it` again"),
        ({"Content-Length": "200000"}, b"", "what came has the md5 .*; it is deleted"),
        ({"Content-Length": "400000"}, b"", "what came has the md5 .*; it is deleted"),
        ({"Transfer-Encoding": "chunked", "Content-Length": ""}, b"", "nothing new came in 6 tries"),
        ({"Content-Length": ""}, b"", "what came has the md5 .*; it is deleted"),
        ({"Content-Encoding": "gzip"}, b"", "comes encoded as gzip, which was not asked for"),
        ({"Content-Range": "bytes 0-299999/300000"}, b"x" * 9, "from byte 9 on with Content-Range 'bytes 0-299999/300000'; delete the"),
        ({"Content-Range": "bytes 9-400000/300000"}, b"x" * 9, "from byte 9 on with Content-Range 'bytes 9-400000/300000'"),
        ({"Content-Range": "bytes 9-299999/*"}, b"x" * 9, "from byte 9 on with Content-Range"),
        ({"Content-Range": ""}, b"x" * 9, "from byte 9 on with Content-Range ''"),
    ],
)  # fmt: skip
def test_what_is_not_the_file_never_gets_its_name(server, tmp_path, headers, part, message):
    server.headers = headers
    path = start_part(tmp_path / "file", part) if part else tmp_path / "file"
    with pytest.raises(DataError, match=f"^{server.url}/file: .*{message}"):
        fetch(f"{server.url}/file", path, md5="f" * 32, command="get it")
    assert not path.exists()
    if "it is deleted" in message:
        assert list(tmp_path.iterdir()) == []


def test_a_server_that_sends_less_than_it_says_is_noticed_without_a_checksum(server, tmp_path):
    server.headers, server.ranges = {"Content-Length": "400000"}, False
    with pytest.raises(DataError, match=r"IncompleteRead\(300000 bytes read, 100000 more expected\), and nothing new came in 6 tries"):
        fetch(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file.part").read_bytes() == BODY and not (tmp_path / "file").exists()


def test_another_length_than_expected_is_refused_before_a_byte_is_written(server, tmp_path):
    with pytest.raises(DataError, match="has 300000 bytes there, expected 299999; another file has taken its place"):
        fetch(f"{server.url}/file", tmp_path / "file", size=299_999)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_and_is_another_is_not_overwritten(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"file: has the md5 \w+, expected \w+; delete it to have it fetched from"):
        fetch(f"{server.url}/file", tmp_path / "file", md5=MD5)
    with pytest.raises(DataError, match="file: has 4 bytes, expected 300000"):
        fetch(f"{server.url}/file", tmp_path / "file", size=len(BODY))
    assert (tmp_path / "file").read_bytes() == b"mine" and server.requests == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/file", "http://example.org/file: only https is fetched from"),
        ("ftp://127.0.0.1/file", "only https is fetched from"),
        ("file:///etc/passwd", "only https is fetched from"),
        ("https:///file", "only https is fetched from"),
        ("http://127.0.0.1.example.org/file", "only https is fetched from"),
        ("SERVER/foreign", "SERVER/foreign leads to http://example.org/file: only https is fetched from"),
        ("SERVER/ftp", "leads to ftp://example.org/file: only https"),
        ("SERVER/round", "SERVER/round: leads on more than 10 times"),
        ("SERVER/missing", "SERVER/missing: answered with status 404; check the address"),
        ("SERVER/nowhere", "SERVER/nowhere: answered with status 302"),
    ],
)  # fmt: skip
def test_only_https_is_fetched_from_also_after_redirects(server, tmp_path, url, message):
    server.leads_to = {"/foreign": "http://example.org/file", "/ftp": "ftp://example.org/file", "/round": "/round", "/nowhere": ""}
    with pytest.raises(DataError) as caught:
        fetch(url.replace("SERVER", server.url), tmp_path / "file")
    assert message.replace("SERVER", server.url) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_from_elsewhere_to_this_machine_is_refused(tmp_path, monkeypatch):
    def redirect(session: requests.Session, url: str, **_: object) -> requests.Response:
        answer = requests.Response()
        answer.status_code, answer.url, answer.raw = 302, url, io.BytesIO()
        answer.headers["Location"] = "http://127.0.0.1:1/file"
        return answer

    monkeypatch.setattr(requests.Session, "get", redirect)
    with pytest.raises(DataError, match=r"https://example\.org/file leads to http://127\.0\.0\.1:1/file: only https is fetched from"):
        fetch("https://example.org/file", tmp_path / "file")


def test_redirects_on_this_machine_are_followed_and_the_rest_is_asked_for_there(server, tmp_path):
    server.leads_to = {"/old": "/newer", "/newer": f"http://localhost:{server.server_port}/file?signature=1"}
    path = start_part(tmp_path / "file", BODY[:1000])
    assert fetch(f"{server.url}/old?download=1", path, md5=MD5).read_bytes() == BODY
    assert server.requests == [("/old", "bytes=1000-"), ("/newer", "bytes=1000-"), ("/file", "bytes=1000-")]


def test_the_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    server.files = {"http://localhost:1/file": BODY}  # a proxy is asked for the whole address
    assert fetch("http://localhost:1/file", tmp_path / "file", md5=MD5).read_bytes() == BODY


@pytest.mark.parametrize("fault", ["closed", "missing", "wrong", "busy", "foreign", "cut"])
def test_no_message_repeats_what_is_secret_in_an_address(server, tmp_path, capfd, fault):
    server.leads_to = {"/old": "/file?token=Secret"}
    if fault == "closed":
        server.shutdown(), server.server_close()
    server.files = {} if fault == "missing" else server.files
    server.statuses = [503] * 9 if fault == "busy" else []
    server.cuts = [10] + [0] * 9 if fault == "cut" else []
    server.leads_to |= {"/file": "http://u:Secret@example.org/?x=Secret"} if fault == "foreign" else {}
    with pytest.raises(DataError) as caught:
        fetch(f"http://name:Secret@127.0.0.1:{server.server_port}/old?token=Secret", tmp_path / "file", md5="0" * 32)
    said = "".join(capfd.readouterr())
    assert "Secret" not in str(caught.value) + said and "/old" in str(caught.value) + said
    assert caught.value.__suppress_context__ | (caught.value.__context__ is None)


def test_a_download_that_is_killed_is_continued(server, tmp_path):
    server.pace = threading.Event()
    program = "import sys; from crfm_core.data.transfers import fetch; fetch(sys.argv[1], sys.argv[2])"
    killed = subprocess.Popen([sys.executable, "-c", program, f"{server.url}/file", str(tmp_path / "file")], cwd=ROOT)
    part, deadline = tmp_path / "file.part", time.monotonic() + 300
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    server.pace.set()
    begin = part.stat().st_size
    assert 0 < begin <= len(BODY) // 2 and not (tmp_path / "file").exists()
    assert fetch(f"{server.url}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY
    assert server.requests[-1] == ("/file", f"bytes={begin}-")


def test_a_disk_that_fills_while_downloading_is_named_and_the_download_continued_when_there_is_room(server, tmp_path):
    program = """
import subprocess
from crfm_core.data.transfers import fetch
for size in ("100k", "1m"):
    subprocess.run(["mount", "-o", f"remount,size={size}", sys.argv[1]], check=True)
    try:
        print("whole", len(fetch(sys.argv[2], sys.argv[1] + "/file", sha256=sys.argv[3], command="get it").read_bytes()))
    except CrfmError as error:
        print(type(error).__name__, error)
"""
    server.headers = {"Content-Length": ""}  # the room that it takes cannot be known before
    said = in_small_disk(tmp_path / "disk", "size=100k", program, f"{server.url}/file", SHA256)
    assert re.search(
        r"ResourceError \S+file: .*No space left on device; free some space there or set source\.root to .*`get it` again", said
    )
    assert "whole 300000" in said and re.fullmatch(r"bytes=\d{5,}-", server.requests[-1][1])
    server.headers, server.requests = {}, []
    said = in_small_disk(tmp_path / "other", "size=100k", program.replace('("100k", "1m")', '("100k",)'), f"{server.url}/file", SHA256)
    assert "GB needed" in said and "whole" not in said and len(server.requests) == 1, "where it is known, it is said at once"


# --------------------------------------------------------------------------------------------------------------- archives


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
    with pytest.raises(DataError, match=rf"x\{suffix}: unpacks to more than 1\.0 GB, which no honest archive of its size does"):
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
        (".zip", lambda path: os.truncate(path, path.stat().st_size - 30), r"is damaged, cut off or no such archive \(File is not a zip"),
        (".zip", lambda path: os.truncate(path, 1000), "is damaged, cut off"),
        (".zip", lambda path: path.write_bytes(path.read_bytes()[500:]), "is damaged"),
        (".zip", lambda path: flip(path, 0.5), r"is damaged, .*Bad CRC-32 for file '4.bin'"),
        (".zip", lambda path: path.write_bytes(b"<html>"), "is damaged, cut off or no such archive"),
        (".zip", lambda path: path.write_bytes(b""), "is damaged, cut off or no such archive"),
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
    with pytest.raises(DataError, match=r"out: is there already; delete it to have \S+x\.zip unpacked to it"):
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


# --------------------------------------------------------------------------------------------------------------- datasets


LOVEDA = {
    f"{part}/{area}/{kind}/{number}.png": png(number, value)
    for part, area, number in (("Train", "Urban", 1), ("Train", "Rural", 2), ("Val", "Urban", 3), ("Val", "Rural", 4))
    for kind, value in (("images_png", 200), ("masks_png", 1))
}
SPLIT = {f"{split}/{kind}/{value}_1.png": png(value, len(kind)) for value, split in enumerate(("train", "val", "test"))
         for kind in ("im1", "label1", "im2", "label2")}  # fmt: skip
TEXTS = {"README.md": b"Read me.", "LICENSE": b"Ask us."}
NOT_NEEDED = {"Times/6_1_A_8.tif": b"?", "A/8/6_1_A_8.png": b"?", "view.png": b"?", ".gitattributes": b"?"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def state_of(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.rglob("*"))}


def data_of(folder: Path) -> dict[str, bytes]:
    return {name: body for name, body in contents(folder).items() if name != "fetched.json"}


def note_of(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def zenodo(server, monkeypatch) -> Server:
    """A record of two archives, and what the package knows of them."""
    monkeypatch.setenv("CRFM_ZENODO", f"{server.url}/")
    server.files = {}
    for part in ("Train", "Val"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, body in LOVEDA.items():
                if name.startswith(part):
                    archive.writestr(name, body)
        server.files[f"/records/5706578/files/{part}.zip"] = buffer.getvalue()
        monkeypatch.setitem(downloads.LOVEDA_ARCHIVES, f"{part}.zip", hashlib.md5(buffer.getvalue()).hexdigest())
    return server


def test_the_checksums_of_loveda_are_those_that_zenodo_lists():
    known = {"Train.zip": "de2b196043ed9b4af1690b3f9a7d558f", "Val.zip": "84cae2577468ff0b5386758bb386d31d"}
    assert known == downloads.LOVEDA_ARCHIVES


def test_loveda_is_fetched_checked_unpacked_and_listed(zenodo, tmp_path, capsys):
    note = tmp_path / "results" / "source.json"
    fetch_dataset(dataset("loveda"), tmp_path, note)
    folder = tmp_path / "data" / "loveda"
    assert data_of(folder) == LOVEDA, "and neither archives nor anything else"
    said = capsys.readouterr().out
    assert said.startswith("loveda: licence: CC BY-NC-SA 4.0\n")
    archives = {name.rsplit("/", 1)[-1]: body for name, body in zenodo.files.items()}
    files = {name: {"size": len(body), "md5": hashlib.md5(body).hexdigest()} for name, body in archives.items()}
    assert note_of(note) == {
        "source": "loveda", "folder": str(folder), "repo": "https://zenodo.org/records/5706578", "revision": None, "files": files,
        "licence": "CC BY-NC-SA 4.0",
    }  # fmt: skip
    list_scenes(dataset("loveda"), tmp_path, tmp_path / "scenes.parquet", note)
    assert read_scenes(tmp_path / "scenes.parquet").split.tolist() == ["train", "train", "val", "val"]
    before = state_of(folder)
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "again.json")
    assert note_of(tmp_path / "again.json") == note_of(note) and len(zenodo.requests) == 2 and state_of(folder) == before


def test_a_copy_that_the_user_has_is_used_as_it_is(zenodo, tmp_path):
    folder = write(tmp_path / "data" / "loveda", LOVEDA | {"Test/Urban/images_png/9.png": b"?"})
    before = state_of(folder)
    fetch_dataset(dataset("loveda", download=False), tmp_path, tmp_path / "source.json")
    assert note_of(tmp_path / "source.json")["files"] == {} and note_of(tmp_path / "source.json")["repo"] is None
    assert state_of(folder) == before and zenodo.requests == []


def test_only_what_is_missing_of_loveda_is_fetched_and_the_users_own_archive_is_taken(zenodo, tmp_path):
    folder = write(tmp_path / "data" / "loveda", {name: body for name, body in LOVEDA.items() if name.startswith("Train")})
    body = zenodo.files["/records/5706578/files/Val.zip"]
    (folder / "Val.zip").write_bytes(body)
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == LOVEDA | {"Val.zip": body} and zenodo.requests == []
    shutil.rmtree(folder / "Val"), (folder / "Val.zip").write_bytes(b"half")
    with pytest.raises(DataError, match=r"Val\.zip: has the md5 \w+, expected \w+; delete it to have it fetched from"):
        fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    (folder / "Val.zip").unlink()
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == LOVEDA and [path for path, _ in zenodo.requests] == ["/records/5706578/files/Val.zip"]


def test_a_broken_off_fetch_of_loveda_continues_and_writes_its_note_last(zenodo, tmp_path):
    whole = zenodo.files["/records/5706578/files/Val.zip"]
    zenodo.files["/records/5706578/files/Val.zip"] = whole[:-1] + b"?"
    with pytest.raises(DataError, match=r"/records/5706578/files/Val\.zip: what came has the md5"):
        fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert not (tmp_path / "source.json").exists() and (tmp_path / "data" / "loveda" / "Train").is_dir()
    assert [path.name for path in (tmp_path / "data" / "loveda" / ".fetching").iterdir()] == [".lock"], (
        "an archive goes once it is unpacked"
    )
    zenodo.files["/records/5706578/files/Val.zip"], zenodo.requests = whole, []
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(tmp_path / "data" / "loveda") == LOVEDA and len(zenodo.requests) == 1
    assert set(note_of(tmp_path / "source.json")["files"]) == {"Train.zip", "Val.zip"}


def test_two_jobs_at_once_fetch_each_archive_once(zenodo, tmp_path):
    jobs = [threading.Thread(target=fetch_dataset, args=(dataset("loveda"), tmp_path, tmp_path / f"{n}.json")) for n in range(2)]
    [job.start() for job in jobs], [job.join() for job in jobs]
    assert note_of(tmp_path / "0.json") == note_of(tmp_path / "1.json") and len(zenodo.requests) == 2
    assert data_of(tmp_path / "data" / "loveda") == LOVEDA


def lose(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name)


@pytest.mark.parametrize(
    ("files", "source", "damage", "message"),
    [
        ({}, {"kind": "loveda", "download": False}, None, "source.root: FOLDER lacks Train/Urban/images_png, Train/Urban/masks_png"),
        ({}, {"kind": "loveda", "download": False}, None, "set source.download to true to have the dataset fetched, or"),
        (LOVEDA, {"kind": "loveda"}, ["Val/Rural"], "FOLDER has Val but lacks Val/Rural/images_png, Val/Rural/masks_png; complete"),
        ({}, {"kind": "fusu", "download": False}, None, "FOLDER lacks images (.png) in im1/ with labels in im1_label/ or label1/"),
        (FLAT, {"kind": "fusu", "download": False}, ["im1_label"], "FOLDER lacks images (.png) in im1/"),
        (FLAT, {"kind": "fusu"}, ["im1_label"], "FOLDER has im1, im2, im2_label but lacks images (.png) in im1/ with labels in im1_label/"),
        (SPLIT, {"kind": "fusu", "date": 2}, [f"{split}/label2" for split in ("train", "val", "test")], "has train, val, test but lacks"),
        ({f"{a}/{n}": b for a in "xy" for n, b in FLAT.items()}, {"kind": "fusu"}, None, "FOLDER/x, FOLDER/y each hold a layout of FUSU;"),
    ],
)  # fmt: skip
def test_what_is_lacking_of_a_dataset_is_named_with_the_remedy_and_nothing_is_changed(
    tmp_path, server, monkeypatch, files, source, damage, message
):
    monkeypatch.setenv("CRFM_ZENODO", server.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    wanted = dataset(**source)
    folder = write(tmp_path / "data" / source["kind"], files)
    lose(folder, *(damage or []))
    before = data_of(folder) if folder.exists() else None
    with pytest.raises(DataError) as caught:
        fetch_dataset(wanted, tmp_path, tmp_path / "source.json")
    assert message.replace("FOLDER", str(folder)) in str(caught.value)
    after = {name: body for name, body in data_of(folder).items() if not name.startswith(".fetching/")} if folder.exists() else None
    assert after == before and server.requests == [] and not (tmp_path / "source.json").exists()


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": body for name, body in files.items()}


def of(folder: str, files: dict[str, bytes], keep: bool) -> dict[str, bytes]:
    """The files of one folder, with or without its name."""
    return {name if keep else name.removeprefix(f"{folder}/"): body for name, body in files.items() if name.startswith(f"{folder}/")}


HOLDINGS = {
    "single images": (FLAT, {}),
    "single images in splits": (SPLIT, {}),
    "one archive": ({}, {"FUSU.zip": FLAT}),
    "one archive with a folder": ({}, {"FUSU.zip": below("FUSU", SPLIT)}),
    "one archive with another folder": ({}, {"data/all.tar.gz": FLAT}),
    "an archive per folder": ({}, {f"{name}.zip": of(name, FLAT, False) for name in ("im1", "im1_label", "im2", "im2_label")}),
    "an archive per split": ({}, {f"{name}.tar.gz": of(name, SPLIT, True) for name in ("train", "val", "test")}),
}


@pytest.fixture
def fusu_hub(request, tmp_path, monkeypatch) -> Iterator[Hub]:
    files, archives = HOLDINGS[request.param]
    packed = {name: archive_bytes(tmp_path / Path(name).name, content) for name, content in archives.items()}
    hub = Hub(files | packed | TEXTS | NOT_NEEDED, REPO, "dataset")
    hub.wanted = files | packed | TEXTS
    hub.layout = SPLIT if any("/label1/" in name for name in (*files, *(n for content in archives.values() for n in content))) else FLAT
    with serve_hub(hub, monkeypatch) as hub:
        yield hub


def fusu(hub: Hub, **changes: object) -> Dataset:
    splits = {"splits": ["train", "val", "test"]} if hub.layout is SPLIT else {}
    return dataset("fusu", repo=REPO, **splits | changes)


@pytest.mark.parametrize("fusu_hub", HOLDINGS, indirect=True)
def test_fusu_is_fetched_from_the_hub_in_both_layouts_and_however_it_is_packed(fusu_hub, tmp_path, capsys):
    note, folder = tmp_path / "results" / "source.json", tmp_path / "data" / "fusu"
    fetch_dataset(fusu(fusu_hub), tmp_path, note)
    assert data_of(folder) == fusu_hub.layout | TEXTS, "and neither archives nor what the hub holds beside"
    assert {name for name, _ in fusu_hub.downloads()} == set(fusu_hub.wanted)
    assert capsys.readouterr().out.startswith("fusu: licence: CC BY-NC-SA 4.0\n")
    files = {name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in sorted(fusu_hub.wanted.items())}
    assert note_of(note) == {
        "source": "fusu", "folder": str(folder), "repo": REPO, "revision": REVISION, "files": files,
        "licence": "CC BY-NC-SA 4.0",
    }  # fmt: skip
    for date in (1, 2):
        list_scenes(fusu(fusu_hub, date=date), tmp_path, tmp_path / "scenes.parquet", note)
        assert len(read_scenes(tmp_path / "scenes.parquet")) == (3 if fusu_hub.layout is SPLIT else 4)
    before = state_of(folder)
    stop(fusu_hub)
    fetch_dataset(fusu(fusu_hub, date=2), tmp_path, tmp_path / "again.json")
    assert note_of(tmp_path / "again.json") == note_of(note) and state_of(folder) == before


@pytest.mark.parametrize("files", [FLAT, SPLIT], ids=["flat", "splits"])
@pytest.mark.parametrize("where", ["", "FUSU/"], ids=["there", "one folder down"])
def test_a_copy_of_fusu_that_the_user_has_is_found_and_used_as_it_is(tmp_path, files, where):
    folder = write(tmp_path / "data" / "fusu", {f"{where}{name}": body for name, body in files.items()})
    before = state_of(folder)
    fetch_dataset(dataset("fusu", download=False), tmp_path, tmp_path / "source.json")
    note = note_of(tmp_path / "source.json")
    assert Path(note["folder"]) == folder / where and (note["repo"], note["files"]) == (None, {}) and state_of(folder) == before


@pytest.mark.parametrize("fusu_hub", ["an archive per folder"], indirect=True)
def test_a_broken_off_fetch_of_fusu_keeps_the_commit_it_began_with(fusu_hub, tmp_path):
    name = "im2_label.zip"
    fusu_hub.broken.add(name)
    with pytest.raises(DataError, match=r"source\.repo: .*status 500; wait, then run `get it` again"):
        fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json", "get it")
    fusu_hub.branches["main"], fusu_hub.revisions[NEXT_REVISION] = NEXT_REVISION, {"README.md": b"All is otherwise now."}
    fusu_hub.broken.clear(), fusu_hub.requests.clear()
    fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json")
    assert note_of(tmp_path / "source.json")["revision"] == REVISION and data_of(tmp_path / "data" / "fusu") == FLAT | TEXTS
    assert [name for name, _ in fusu_hub.downloads()] == [name]
    with pytest.raises(DataError, match=rf"source\.revision: \S+fusu holds {REPO} at {REVISION}, not {REPO} at {NEXT_REVISION}; set"):
        fetch_dataset(fusu(fusu_hub, revision=NEXT_REVISION), tmp_path, tmp_path / "source.json")


@pytest.mark.parametrize("fusu_hub", ["one archive with a folder", "single images"], indirect=True)
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_fetch_of_fusu_that_is_killed_while_it_moves_the_data_is_finished(fusu_hub, tmp_path, monkeypatch, moved):
    folder, rename = tmp_path / "data" / "fusu", Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target).parent == folder and len(list(folder.glob("[!.]*/"))) == moved:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json")
    monkeypatch.undo()
    assert len([path for path in folder.iterdir() if path.is_dir() and path.name != ".fetching"]) == moved
    os.truncate(folder / "fetched.json", 40)
    fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == fusu_hub.layout | TEXTS and note_of(tmp_path / "source.json")["revision"] == REVISION


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (TEXTS, "source.repo: someone/fusu holds neither images in im1, im2, im1_label, im2_label, label1, label2 nor"),
        ({"x.rar": b"?"}, "nor archives"),
        ({"im1.zip": {"1.png": b"1"}}, "what someone/fusu holds (im1.zip) lacks images (.png) in im1/ with labels in im1_label/"),
        ({"im1.zip": {"1.png": b"1"}, "im1/2.png": b"2"}, "someone/fusu has im1.zip and files in a folder of that name or two such"),
        ({"im1.zip": {"1.png": b"1"}, "im1.tar.gz": {"1.png": b"1"}}, "or two such archives; put the dataset into FOLDER by hand"),
        ({"im1.zip": {"../../evil.png": b"1"}}, "im1.zip: member '../../evil.png' is refused: its name leads upwards"),
        ({"im1.zip": b"<html>"}, "im1.zip: is damaged, cut off or no such archive"),
        ({"../im1/evil.png": b"1"}, "source.repo: someone/fusu lists a file '../im1/evil.png', whose name leads upwards"),
    ],
)  # fmt: skip
def test_a_repository_that_does_not_hold_fusu_is_named(tmp_path, monkeypatch, held, message):
    files = {name: archive_bytes(tmp_path / name, body) if isinstance(body, dict) else body for name, body in held.items()}
    with serve_hub(Hub(files, REPO, "dataset"), monkeypatch), pytest.raises(DataError) as caught:
        fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
    assert message.replace("FOLDER", str(tmp_path / "data" / "fusu")) in str(caught.value)
    assert list(tmp_path.rglob("evil.png")) == []


@pytest.mark.parametrize("fusu_hub", ["one archive"], indirect=True)
def test_two_jobs_at_once_fetch_fusu_once_and_leave_what_the_user_has_beside_it(fusu_hub, tmp_path):
    folder = write(tmp_path / "data" / "fusu", {"README.md": b"Mine.", "notes/1.txt": b"Mine."})
    jobs = [threading.Thread(target=fetch_dataset, args=(fusu(fusu_hub), tmp_path, tmp_path / f"{n}.json")) for n in range(2)]
    [job.start() for job in jobs], [job.join() for job in jobs]
    assert note_of(tmp_path / "0.json") == note_of(tmp_path / "1.json") and len(fusu_hub.downloads()) == 3
    assert data_of(folder) == FLAT | {"LICENSE": TEXTS["LICENSE"], "README.md": b"Mine.", "notes/1.txt": b"Mine."}


def test_what_was_unpacked_of_one_revision_is_no_part_of_another(tmp_path, monkeypatch):
    images, labels = of("im1", FLAT, False), of("im1_label", FLAT, False)
    first = {"im1.zip": archive_bytes(tmp_path / "im1.zip", images | {"old.png": b"?"})}
    hub = Hub(first, REPO, "dataset")
    second = {"im1.zip": archive_bytes(tmp_path / "im1.zip", images), "im1_label.zip": archive_bytes(tmp_path / "l.zip", labels)}
    hub.revisions[NEXT_REVISION] = second
    with serve_hub(hub, monkeypatch):
        for _ in range(2):
            with pytest.raises(DataError, match=r"what someone/fusu holds \(im1\.zip\) lacks images .*; it lies unpacked in"):
                fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
        assert [name for name, _ in hub.downloads()] == ["im1.zip"]
        fetch_dataset(dataset("fusu", repo=REPO, revision=NEXT_REVISION), tmp_path, tmp_path / "source.json")
    assert data_of(tmp_path / "data" / "fusu") == below("im1", images) | below("im1_label", labels)


def test_a_folder_of_the_user_is_not_mixed_with_one_of_the_dataset(tmp_path, monkeypatch):
    folder = write(tmp_path / "data" / "fusu", {"more/mine.txt": b"Mine."})
    hub = Hub({"all.zip": archive_bytes(tmp_path / "all.zip", FLAT | {"more/theirs.txt": b"Theirs."})}, REPO, "dataset")
    with serve_hub(hub, monkeypatch):
        with pytest.raises(DataError, match=r"source\.root: \S+more is there already; move it away to have the dataset's put there"):
            fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
        assert (folder / "more" / "mine.txt").is_file()
        (folder / "more").rename(folder / "mine")
        fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == FLAT | {"mine/mine.txt": b"Mine.", "more/theirs.txt": b"Theirs."} and len(hub.downloads()) == 1


def test_of_very_many_files_the_note_names_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MANY", 3)
    with serve_hub(Hub(FLAT, REPO, "dataset"), monkeypatch):
        fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
    record = (tmp_path / "data" / "fusu" / "fetched.json").read_bytes()
    files = {"fetched.json": {"size": len(record), "sha256": hashlib.sha256(record).hexdigest()}}
    assert note_of(tmp_path / "source.json")["files"] == files and set(json.loads(record)["files"]) == set(FLAT)


def test_a_disk_that_cannot_be_written_serves_what_is_whole_and_says_so_for_the_rest(tmp_path):
    program = """
import os, shutil
from crfm_core.data.downloads import fetch_dataset
from crfm_core.settings import Dataset
shutil.copytree(sys.argv[2], sys.argv[1] + "/whole")
shutil.copytree(sys.argv[2] + "/Val", sys.argv[1] + "/half/Val")
os.system(f"mount -o remount,ro '{sys.argv[1]}'")
for part in ("whole", "half"):
    fields = {"source": {"kind": "loveda", "root": part}, "test": "val", "tile": {"size": 4}}
    try:
        fetch_dataset(Dataset(name="d", classes=["a", "b"], palette=["#000000"] * 2, **fields), sys.argv[1], sys.argv[3])
        print("used", os.path.exists(sys.argv[3]))
    except CrfmError as error:
        print(type(error).__name__, error)
"""
    write(tmp_path / "copy", LOVEDA)
    said = in_small_disk(tmp_path / "disk", "size=1m", program, str(tmp_path / "copy"), str(tmp_path / "source.json"))
    assert said.splitlines()[0] == "d: licence: not stated; ask those who publish it" and "used True" in said
    assert re.search(r"ResourceError source\.root: .*Read-only file system.*; set it to a folder that can be written", said)


@pytest.mark.parametrize("fusu_hub", ["one archive"], indirect=True)
def test_the_rule_fetches_shows_the_licence_and_its_scenes_are_listed_from_there(fusu_hub, tmp_path):
    for file in (CONFIGS).iterdir():
        shutil.copy(file, tmp_path)
    config = yaml.safe_load((tmp_path / "smallest.yaml").read_text())
    config["recipes"]["reference"] = {"split": "val"}
    wanted = fusu(fusu_hub).model_dump(mode="json", exclude_defaults=True)
    wanted["split"] = {"by": "group", "group": "scene", "shares": {"train": 2, "val": 1, "test": 1}}
    (tmp_path / "fusu.yaml").write_text(yaml.safe_dump(wanted))
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(config | {"datasets": ["small_world.yaml", "fusu.yaml"]} | {"recipes": config["recipes"]})
    )
    embedded = yaml.safe_load((tmp_path / "small_world.yaml").read_text())
    embedded["source"]["scenes"]["val"] = 1
    (tmp_path / "small_world.yaml").write_text(yaml.safe_dump(embedded))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--cores", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_VerySecretToken"}

    def run(*targets: str) -> str:
        done = subprocess.run([*command, *targets], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = run("results/fusu/scenes.parquet", "results/small/scenes.parquet")
    assert said.count("fusu is there, or fetching it; its licence: CC BY-NC-SA 4.0") == 1 and "Listing the scenes of fusu" in said
    assert len(read_scenes(tmp_path / "results" / "fusu" / "scenes.parquet")) == 4
    assert note_of(tmp_path / "results" / "fusu" / "source.json")["revision"] == REVISION
    assert "Secret" not in said and not [name for name, body in contents(tmp_path).items() if b"VerySecret" in body]
    (tmp_path / "fusu.yaml").write_text(yaml.safe_dump(wanted | {"about": "Otherwise said."}))
    said = run("results/fusu/source.json", "results/fusu/scenes.parquet")
    assert "Nothing to be done" in said, "words about a dataset make no scenes anew"
