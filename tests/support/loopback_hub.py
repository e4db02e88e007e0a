"""A model hub on the loopback: what its library asks for, of one repository, with the faults that tests wish for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

REVISION, NEXT_REVISION = "a" * 40, "b" * 40
LARGE = (".safetensors", ".png", ".zip", ".gz")  # listed with their SHA-256 and served by another host


class Hub(ThreadingHTTPServer):
    """Speaks the hub's protocol for one repository: commits, trees in pages, files in ranges; large files lie on another host."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], repo: str, repo_type: str = "model") -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repo, self.repo_type = repo, repo_type
        self.url = f"datasets/{repo}" if repo_type == "dataset" else repo
        self.revisions = {REVISION: files}
        self.branches = {"main": REVISION}
        self.page = 7  # files that one page of a listing holds
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # another host to a client
        self.wanted_token: str | None = None
        self.refusal: tuple[int, str, str] | None = None  # status, error code and message of every download
        self.listing: bytes | None = None  # what is answered in place of a commit
        self.spoilt: dict[str, bytes] = {}  # served in place of what is listed
        self.cut: dict[str, int] = {}  # bytes after which the connection breaks, once; then the file cannot be had
        self.broken: set[str] = set()
        self.gathering: threading.Barrier | None = None  # downloads are answered when so many wait
        self.requests: list[tuple[str, str, str | None, str | None]] = []  # host, path, range, authorization

    def downloads(self) -> list[tuple[str, str | None]]:
        """Names of the files that were asked for, and the ranges."""
        start = re.compile(rf"/{self.url}/resolve/\w+/")
        return [(start.sub("", path), ranges) for _, path, ranges, _ in self.requests if start.match(path)]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = cut is not None

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.requests.append((self.headers["Host"].split(":")[0], path, self.headers["Range"], self.headers["Authorization"]))
        if hub.wanted_token and not path.startswith("/cdn/") and self.headers["Authorization"] != f"Bearer {hub.wanted_token}":
            return self.reply(401, b'{"error": "Invalid username or password."}')
        if asked := re.fullmatch(r"/api/(model|dataset)s/(.+)/(revision|tree)/([\w.-]+)", path):
            if (asked[1], asked[2]) != (hub.repo_type, hub.repo):
                return self.reply(404, X_Error_Code="RepoNotFound")
            commit = hub.branches.get(asked[4], asked[4])
            if commit not in hub.revisions:
                return self.reply(404, X_Error_Code="RevisionNotFound")
            return self.commit(commit) if asked[3] == "revision" else self.tree(commit)
        resolve = re.fullmatch(rf"/{hub.url}/resolve/(\w+)/(.+)", path)
        if resolve and hub.gathering:
            hub.gathering.wait(240)
        if resolve and hub.refusal:
            return self.reply(hub.refusal[0], X_Error_Code=hub.refusal[1], X_Error_Message=hub.refusal[2])
        if resolve and resolve[2].endswith(LARGE):
            where = self.path.split("/resolve/", 1)[1]
            return self.reply(302, Location=f"{hub.elsewhere}/cdn/{where}", X_Repo_Commit=resolve[1])
        revision, name = (resolve[1], resolve[2]) if resolve else path.removeprefix("/cdn/").split("/", 1)
        return self.serve(name, hub.spoilt.get(name, hub.revisions[revision][name]), revision)

    def commit(self, commit: str) -> None:
        self.reply(200, self.server.listing or json.dumps({"id": self.server.repo, "sha": commit, "siblings": []}).encode())

    def tree(self, commit: str) -> None:
        """One page of the files and folders of a commit, with the address of the next page."""
        asked = parse_qs(urlsplit(self.path).query)
        assert asked["recursive"] == ["true"], "all files are asked for"
        files = self.server.revisions[commit]
        folders = sorted({name.rsplit("/", 1)[0] for name in files if "/" in name})
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders]
        entries += [self.describe(name, body) for name, body in files.items()]
        begin = int(asked.get("cursor", ["0"])[0])
        end = begin + self.server.page
        onward = f"{self.server.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={end}"
        link = {"Link": f'<{onward}>; rel="next"'} if end < len(entries) else {}
        self.reply(200, json.dumps(entries[begin:end]).encode(), **link)

    def serve(self, name: str, body: bytes, revision: str) -> None:
        if name in self.server.broken:
            return self.reply(500)
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": revision}
        begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        if begin:
            headers["Content_Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        cut = self.server.cut.pop(name, None)
        if cut is not None:
            self.server.broken.add(name)
        return self.reply(206 if begin else 200, body[begin:], cut, **headers)

    @staticmethod
    def describe(name: str, body: bytes) -> dict:
        large = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130} if name.endswith(LARGE) else None
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        return {"type": "file", "path": name, "size": len(body), "oid": blob} | ({"lfs": large} if large else {})


@contextmanager
def serve_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let ``hub`` answer in a thread, and send the library there."""
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "CRFM_TOKEN_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN_PATH", "HF_HUB_CACHE"):  # no login and no cache of whoever runs the tests
        monkeypatch.setenv(name, os.devnull)
        monkeypatch.setattr(constants, name, os.devnull)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    close_session()
    yield hub
    stop(hub)


def stop(hub: Hub) -> None:
    close_session()  # connections that are open would still be answered
    hub.shutdown()
    hub.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fetched(folder: Path) -> dict[str, bytes]:
    """What a fetched folder holds beside lock and record."""
    return {name: body for name, body in contents(folder).items() if name not in (".lock", "fetched.json")}
