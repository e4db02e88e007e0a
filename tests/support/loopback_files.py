"""A file server on the loopback with one fault after the other, published datasets in small, and small disks."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from crfm_core.data import transfers
from crfm_core.settings import Dataset

BODY = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves files by path, with one fault after the other."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {"/file": BODY}
        self.ranges = True
        self.statuses: list[int] = []  # answered first, one per request
        self.cuts: list[int] = []  # bytes after which the connection breaks, one per request
        self.chunked = False
        self.pace: threading.Event | None = None  # half of the body is sent, the other half once this is set
        self.headers: dict[str, str] = {}  # sent in place of the right ones; "" for none at all
        self.leads_to: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and range


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        server.requests.append((path, self.headers["Range"]))
        assert self.headers["Accept-Encoding"] == "identity", "bytes are asked for as they are"
        status, headers, body = 200, {}, b""
        if server.statuses:
            status, headers = server.statuses.pop(0), {"Retry-After": "0"}
        elif path in server.leads_to:
            status, headers = 302, {"Location": server.leads_to[path]}
        elif path not in server.files:
            status = 404
        else:
            body = server.files[path]
            if server.ranges and self.headers["Range"]:
                begin, size = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]), len(body)
                status, headers = (206, {"Content-Range": f"bytes {begin}-{size - 1}/{size}"}) if begin < size else (416, {})
                headers = headers or {"Content-Range": f"bytes */{size}"}
                body = body[begin:]
            headers = {"Content-Length": str(len(body))} | headers | server.headers
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | headers
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts and body else len(body)
        self.close_connection = cut < len(body) or not headers["Content-Length"] or server.headers != {}
        if server.chunked and body:
            for begin in range(0, len(body), 7000):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(body[begin : begin + 7000]), body[begin : begin + 7000]))
            body, cut = b"0\r\n\r\n", 5
        if server.pace and body:
            self.wfile.write(body[: len(body) // 2])
            server.pace.wait(300)
            body, cut = body[len(body) // 2 :], cut - len(body) // 2
        self.wfile.write(body[:cut])


@contextmanager
def serve_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that answers in a thread."""
    monkeypatch.setattr(transfers, "PAUSE", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_small_disk(folder: Path, options: str, program: str, *arguments: str) -> str:
    """Run a program with ``folder`` as a disk of its own, and return what it said; skip where no disk may be mounted."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs '{folder}'"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    program = f"import sys\nfrom crfm_core import CrfmError\n{program}"
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", program, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that occur twice
        for name, body in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, body)
    return path


def tarred(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as archive:
        for member in members:
            info = tarfile.TarInfo(member[0]) if isinstance(member, tuple) else member
            body = member[1] if isinstance(member, tuple) else b""
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def png(*values: int) -> bytes:
    """A grey image of 4x4 pixels, as PNG."""
    out = io.BytesIO()
    Image.fromarray(np.resize(np.array(values, np.uint8), (4, 4))).save(out, "PNG")
    return out.getvalue()


def dataset(kind: str, **source: object) -> Dataset:
    fields = {"classes": ["a", "b"], "palette": ["#000000", "#FFFFFF"], "tile": {"size": 4}, "licence": "CC BY-NC-SA 4.0", "about": "Tiny."}
    if kind == "loveda":
        fields["test"] = "val"
    elif "splits" not in source:
        fields["split"] = {"by": "group", "shares": {"train": 1, "test": 1}}
    else:
        fields["test"] = "val"
    return Dataset(name=kind, source={"kind": kind, "root": f"data/{kind}"} | source, **fields)


REPO = "someone/fusu"


FLAT = {f"{kind}/{place}_{number}.png": png(number, place, len(kind)) for kind in ("im1", "im1_label", "im2", "im2_label")
        for place in (6, 7) for number in (1, 2)}  # fmt: skip


def archive_bytes(path: Path, files: dict[str, bytes]) -> bytes:
    return (zipped if path.suffix == ".zip" else lambda path, files: tarred(path, list(files.items())))(path, files).read_bytes()
