"""One file from an address: continued, checked, and refused where it is not what it should be."""

from __future__ import annotations

import hashlib
import io
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from loopback_files import BODY, in_small_disk
from paths import ROOT

from crfm_core import DataError
from crfm_core.data import transfers
from crfm_core.data.transfers import fetch

MD5, SHA256 = hashlib.md5(BODY).hexdigest(), hashlib.sha256(BODY).hexdigest()


def start_part(path: Path, bytes_there: bytes) -> Path:
    path.with_name(f"{path.name}.part").write_bytes(bytes_there)
    return path


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
        ({}, b"", "the download has the md5 [0-9a-f]{32}, expected f{32}; it is deleted, run `get it` again"),
        ({"Content-Length": "200000"}, b"", "the download has the md5 .*; it is deleted"),
        ({"Content-Length": "400000"}, b"", "the download has the md5 .*; it is deleted"),
        ({"Transfer-Encoding": "chunked", "Content-Length": ""}, b"", "nothing new came in 6 tries"),
        ({"Content-Length": ""}, b"", "the download has the md5 .*; it is deleted"),
        ({"Content-Encoding": "gzip"}, b"", "is sent with the encoding gzip, which was not requested"),
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
    with pytest.raises(DataError, match="has 300000 bytes there, expected 299999; the file there has been replaced"):
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
        ("http://example.org/file", "http://example.org/file: only https is permitted"),
        ("ftp://127.0.0.1/file", "only https is permitted"),
        ("file:///etc/passwd", "only https is permitted"),
        ("https:///file", "only https is permitted"),
        ("http://127.0.0.1.example.org/file", "only https is permitted"),
        ("SERVER/foreign", "SERVER/foreign leads to http://example.org/file: only https is permitted"),
        ("SERVER/ftp", "leads to ftp://example.org/file: only https"),
        ("SERVER/round", "SERVER/round: redirects more than 10 times"),
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
    with pytest.raises(DataError, match=r"https://example\.org/file leads to http://127\.0\.0\.1:1/file: only https is permitted"):
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
