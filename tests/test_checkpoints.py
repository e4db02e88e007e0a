"""Base model folders: what is missing from one, and fetching one from a hub that this file serves on the loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from tiny_models import tiny_sd3, tiny_text_parts, tiny_vae

from crfm_core import ResourceError, WeightsError
from crfm_core.checkpoints import base_folder, check_base_model
from crfm_core.files import sha256_of, write_json
from crfm_core.hub import fetch_base_model
from crfm_core.settings import HubBase

ROOT = Path(__file__).parents[1]
REPO, REVISION, NEXT_REVISION, TOKEN = "someone/tiny-sd3", "a" * 40, "b" * 40, "hf_VerySecretToken"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NOT_NEEDED = (
    "README.md", ".gitattributes", "tiny_sd3.safetensors", "pipeline.py", "text_encoders/clip_l.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin", "vae/model.ckpt",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder_3/model.safetensors.index.fp16.json",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion 3 pipeline folder, the weights of its T5 in shards."""
    folder = tmp_path_factory.mktemp("model")
    parts = tiny_text_parts()
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3(num_layers=1, dual_attention_layers=(0,)),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )
    pipeline.save_pretrained(folder)
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    parts["text_encoder_3"].save_pretrained(folder / "text_encoder_3", max_shard_size="20KB")
    (folder / "LICENSE.md").write_text("Be kind.\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub(ThreadingHTTPServer):
    """Speaks the hub's protocol for one repository: listing, resolving, ranges; large files lie on another host."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        decoys = dict.fromkeys(NOT_NEEDED, b"not wanted")
        self.revisions = {REVISION: files | decoys}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # another host to a client
        self.wanted_token: str | None = None
        self.refusal: tuple[int, str] | None = None  # status and error code of every download
        self.spoilt: dict[str, bytes] = {}  # served in place of what is listed
        self.cut: dict[str, int] = {}  # bytes after which the connection breaks, once; then the file cannot be had
        self.broken: set[str] = set()
        self.requests: list[tuple[str, str, str | None, str | None]] = []  # host, path, range, authorization

    def downloads(self) -> list[tuple[str, str | None]]:
        """Names of the files that were asked for, and the ranges."""
        return [(path.split("/", 5)[-1], ranges) for _, path, ranges, _ in self.requests if path.startswith(f"/{REPO}/resolve/")]


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
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append((self.headers["Host"].split(":")[0], path, self.headers["Range"], self.headers["Authorization"]))
        if hub.wanted_token and not path.startswith("/cdn/") and self.headers["Authorization"] != f"Bearer {hub.wanted_token}":
            return self.reply(401, b'{"error": "Invalid username or password."}')
        listing = re.fullmatch(r"/api/models/(.+)/revision/(\w+)", path)
        resolve = re.fullmatch(r"/(.+?)/resolve/(\w+)/(.+)", path)
        if listing and listing[1] == REPO and listing[2] in hub.revisions:
            assert self.path.endswith("?blobs=true"), "sizes and hashes are asked for"
            siblings = [self.describe(name, body) for name, body in hub.revisions[listing[2]].items()]
            return self.reply(200, json.dumps({"id": REPO, "sha": listing[2], "siblings": siblings}).encode())
        if listing:
            return self.reply(404, X_Error_Code="RevisionNotFound" if listing[1] == REPO else "RepoNotFound")
        if resolve and hub.refusal:
            return self.reply(hub.refusal[0], X_Error_Code=hub.refusal[1])
        if resolve and resolve[3].endswith(".safetensors"):
            return self.reply(302, Location=f"{hub.elsewhere}/cdn/{resolve[2]}/{resolve[3]}", X_Repo_Commit=resolve[2])
        revision, name = (resolve[2], resolve[3]) if resolve else path.removeprefix("/cdn/").split("/", 1)
        return self.serve(name, hub.spoilt.get(name, hub.revisions[revision][name]), revision)

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
        large = (
            {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130} if name.endswith(".safetensors") else None
        )
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        return {"rfilename": name, "size": len(body), "blobId": blob} | ({"lfs": large} if large else {})


@pytest.fixture
def hub(model, monkeypatch) -> Iterator[Hub]:
    server = Hub(contents(model))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()


def stop(hub: Hub) -> None:
    close_session()  # connections that are open would still be answered
    hub.shutdown()
    hub.server_close()


def base(folder: Path, **changes: str) -> HubBase:
    return HubBase(**({"kind": "hub", "repo": REPO, "revision": REVISION, "path": str(folder / "sd3")} | changes))


def fetched(folder: Path) -> dict[str, bytes]:
    return {name: body for name, body in contents(folder).items() if name not in (".lock", "fetched.json")}


# ----------------------------------------------------------------------------------------------------------------- fetching


def test_only_what_the_pipeline_needs_is_fetched_whole_and_recorded(hub, model, tmp_path):
    folder = fetch_base_model(base(tmp_path))
    assert fetched(folder) == contents(model), "all of the pipeline, and none of what else the hub holds"
    record = json.loads((folder / "fetched.json").read_text())
    assert (record["repo"], record["revision"]) == (REPO, REVISION)
    assert record["files"] == {
        name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in sorted(contents(model).items())
    }
    assert check_base_model(folder) == folder
    assert len(StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True).components) == 11


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    hub.wanted_token = TOKEN
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    fetch_base_model(base(tmp_path))
    senders = {(host, authorization) for host, _, _, authorization in hub.requests}
    assert senders == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}, "the host of the large files gets no token"
    said = "".join(capfd.readouterr())
    assert "transformer/config.json" in said and TOKEN not in said and TOKEN not in caplog.text
    assert not [name for name, body in contents(tmp_path).items() if TOKEN.encode() in body]


def test_a_fetched_folder_needs_no_network(hub, tmp_path):
    folder = fetch_base_model(base(tmp_path))
    stop(hub)
    asked = len(hub.requests)
    assert fetch_base_model(base(tmp_path)) == folder and len(hub.requests) == asked
    with pytest.raises(WeightsError, match="cannot reach"):
        fetch_base_model(base(tmp_path, revision=NEXT_REVISION))


def test_a_broken_connection_is_continued_by_the_next_call(hub, model, tmp_path):
    hub.cut[WEIGHTS] = 50_000
    with pytest.raises(WeightsError, match=r"answered with status 500; wait, then run `fetch_it` again .* continues where it stopped"):
        fetch_base_model(base(tmp_path), command="fetch_it")
    (part,) = (part for part in (tmp_path / "sd3" / ".partial").iterdir() if part.stat().st_size)
    begin, body = part.stat().st_size, contents(model)[WEIGHTS]
    assert 40_000 < begin <= 50_000 and part.read_bytes() == body[:begin]
    with pytest.raises(WeightsError, match="lacks"):
        check_base_model(tmp_path / "sd3")
    done = {name for name, _ in hub.downloads()} - {WEIGHTS}
    hub.broken.clear(), hub.requests.clear()
    assert fetched(fetch_base_model(base(tmp_path))) == contents(model)
    assert (WEIGHTS, f"bytes={begin}-") in hub.downloads() and not done & {name for name, _ in hub.downloads()}


@pytest.mark.parametrize("spoil", [lambda body: body[:-9], lambda body: body[:-1] + b"?"], ids=["cut off", "altered"])
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer/tokenizer.json"])
def test_wrong_content_is_named_and_fetched_again(hub, model, tmp_path, name, spoil):
    body = contents(model)[name]
    hub.spoilt[name] = spoil(body)
    with pytest.raises(
        WeightsError, match=f"{re.escape(name)} came with {len(spoil(body))} bytes that are not the {len(body)} bytes of its"
    ):
        fetch_base_model(base(tmp_path))
    assert not (tmp_path / "sd3" / name).exists()
    hub.spoilt.clear()
    assert fetched(fetch_base_model(base(tmp_path))) == contents(model)


def test_another_revision_replaces_what_differs_and_leaves_nothing_of_the_old(hub, model, tmp_path):
    files = contents(model)
    whole = {name: body for name, body in files.items() if not re.match(r"text_encoder_3/model.*safetensors", name)}
    other = whole | {"text_encoder_3/model.safetensors": files["vae/diffusion_pytorch_model.safetensors"], "LICENSE.md": b"Be kinder."}
    hub.revisions[NEXT_REVISION] = other
    folder = fetch_base_model(base(tmp_path))
    hub.requests.clear()
    hub.broken.add("text_encoder_3/model.safetensors")
    with pytest.raises(WeightsError, match="status 500"):
        fetch_base_model(base(tmp_path, revision=NEXT_REVISION))
    assert json.loads((folder / "fetched.json").read_text())["revision"] is None, "half of each revision is neither"
    hub.broken.clear()
    fetch_base_model(base(tmp_path, revision=NEXT_REVISION))
    assert fetched(folder) == other
    assert {name for name, _ in hub.downloads()} == {"LICENSE.md", "text_encoder_3/model.safetensors"}


def test_a_fetched_file_that_is_no_longer_whole_is_fetched_again(hub, model, tmp_path):
    folder = fetch_base_model(base(tmp_path))
    write_json(tmp_path / "base_model.json", {"folder": str(folder), "repo": REPO, "revision": REVISION})
    os.truncate(folder / WEIGHTS, 100_000)
    with pytest.raises(WeightsError, match=rf"has 100000 bytes .*; delete \S*base_model\.json to have {REPO} fetched again"):
        base_folder(tmp_path / "base_model.json")
    hub.requests.clear()
    fetch_base_model(base(tmp_path))
    assert fetched(folder) == contents(model) and [name for name, _ in hub.downloads()] == [WEIGHTS]
    assert base_folder(tmp_path / "base_model.json") == folder


def test_a_folder_that_was_put_there_otherwise_is_used_if_it_is_the_model_and_never_overwritten(hub, model, tmp_path):
    shutil.copytree(model, tmp_path / "sd3")
    (tmp_path / "sd3" / WEIGHTS).write_bytes(b"three weeks of training")
    with pytest.raises(WeightsError, match=rf"base_model\.path: \S+{WEIGHTS} is there already and is not the file of {REPO}"):
        fetch_base_model(base(tmp_path))
    assert (tmp_path / "sd3" / WEIGHTS).read_bytes() == b"three weeks of training" and not hub.downloads()
    shutil.copy(model / WEIGHTS, tmp_path / "sd3" / WEIGHTS)
    fetch_base_model(base(tmp_path))
    assert not hub.downloads()


def test_two_jobs_at_once_fetch_each_file_once(hub, model, tmp_path):
    jobs = [threading.Thread(target=fetch_base_model, args=(base(tmp_path),)) for _ in range(2)]
    [job.start() for job in jobs], [job.join() for job in jobs]
    assert fetched(tmp_path / "sd3") == contents(model)
    assert len(hub.downloads()) == len(contents(model))


@pytest.mark.parametrize(
    ("token", "served", "changes", "message"),
    [
        (
            None,
            {"refusal": (401, "GatedRepo")},
            {},
            f"{REPO} is gated and HF_TOKEN is not set; accept its licence at ENDPOINT/{REPO} and set",
        ),
        (
            TOKEN,
            {"refusal": (403, "GatedRepo")},
            {},
            f"the token in HF_TOKEN does not open it; accept its licence at ENDPOINT/{REPO} and set",
        ),
        (TOKEN, {"refusal": (403, "")}, {}, "does not open it; accept its licence"),
        (
            None,
            {"wanted_token": "hf_other"},
            {},
            f"ENDPOINT wants a token for {REPO}, or has no such model; set HF_TOKEN, and check the name",
        ),
        (TOKEN, {"wanted_token": "hf_other"}, {}, "ENDPOINT refuses the token in HF_TOKEN; set it to a valid one"),
        (TOKEN, {}, {"repo": "someone/nothing"}, "base_model.repo: ENDPOINT has no someone/nothing that may be read with this HF_TOKEN"),
        (
            TOKEN,
            {},
            {"revision": "c" * 40},
            f"base_model.revision: {REPO} has no revision {'c' * 40}; take one of ENDPOINT/{REPO}/commits/main",
        ),
        (f"{TOKEN} \n{TOKEN}", {}, {}, "HF_TOKEN holds characters that no token has"),
    ],
)
def test_a_refusal_says_what_to_accept_or_set_and_does_not_repeat_the_token(hub, tmp_path, monkeypatch, token, served, changes, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for name, value in served.items():
        setattr(hub, name, value)
    with pytest.raises(WeightsError) as caught:
        fetch_base_model(base(tmp_path, **changes))
    assert message.replace("ENDPOINT", hub.endpoint) in str(caught.value)
    assert "Secret" not in str(caught.value) and caught.value.__suppress_context__ | (caught.value.__context__ is None)


@pytest.mark.parametrize("offline", [False, True], ids=["no answer", "HF_HUB_OFFLINE"])
def test_without_a_network_the_message_says_where_to_run_what(hub, tmp_path, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    stop(hub)
    cause = "HF_HUB_OFFLINE is set" if offline else "ConnectError"
    with pytest.raises(
        WeightsError, match=rf"cannot reach {hub.endpoint} \({cause}.*login node of a cluster, run `make it` .*`kind: folder`"
    ):
        fetch_base_model(base(tmp_path), command="make it")


def test_an_endpoint_that_is_no_hub_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda _: "<html>Please log in to the guest network</html>")
    with pytest.raises(WeightsError, match=f"{hub.endpoint} does not answer as a model hub .* check HF_ENDPOINT and the network"):
        fetch_base_model(base(tmp_path))


def test_a_repository_of_another_kind_and_a_full_disk_are_refused_before_a_download(hub, model, tmp_path, monkeypatch):
    hub.revisions[NEXT_REVISION] = {name.replace("safetensors", "bin"): body for name, body in contents(model).items()}
    with pytest.raises(WeightsError, match=rf"base_model\.repo: {REPO} lacks transformer/\*\.safetensors, vae/\*\.safetensors, text_"):
        fetch_base_model(base(tmp_path, revision=NEXT_REVISION))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match=r"sd3: .* GB needed, 0\.0 GB free; free some space or set base_model\.path to a folder"):
        fetch_base_model(base(tmp_path))
    assert not hub.downloads()


def test_the_rule_fetches_alone_also_where_no_gpu_is_and_says_how_when_there_is_no_network(hub, model, tmp_path):
    for file in (ROOT / "tests" / "configs").iterdir():
        shutil.copy(file, tmp_path)
    config = yaml.safe_load((tmp_path / "smallest.yaml").read_text())
    section = {"kind": "hub", "repo": REPO, "revision": REVISION, "path": "models/sd3"}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(config | {"base_model": section, "device": "cuda"}))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "hub.yaml", "--cores", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN}

    def run(**changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, "results/base_model.json"], cwd=tmp_path, env=environment | changes, capture_output=True, text=True, check=False
        )

    done = run(HF_HUB_OFFLINE="1")
    log = (tmp_path / "results" / "logs" / "fetch_base_model.log").read_text()
    assert done.returncode != 0 and "run `snakemake --cores 1 results/base_model.json` again" in log and "Traceback" not in log
    done = run()
    assert done.returncode == 0, done.stderr
    where = json.loads((tmp_path / "results" / "base_model.json").read_text())
    assert where == {"folder": str(tmp_path / "models" / "sd3"), "repo": REPO, "revision": REVISION}
    assert fetched(base_folder(tmp_path / "results" / "base_model.json")) == contents(model)
    assert TOKEN not in done.stdout + done.stderr
    assert not [name for name, body in contents(tmp_path).items() if TOKEN.encode() in body]


# ----------------------------------------------------------------------------------------------------------------- checking


def rewrite_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pointer(path: Path) -> None:
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_of(path)}\nsize {path.stat().st_size}\n")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (WEIGHTS, lambda path: os.truncate(path, path.stat().st_size - 1), r"model\.safetensors has \d+ bytes and its header needs \d+;"),
        (WEIGHTS, lambda path: os.truncate(path, 1000), r"model\.safetensors has 1000 bytes and its header needs \d+; fetch"),
        (WEIGHTS, lambda path: os.truncate(path, 0), r"model\.safetensors has 0 bytes"),
        (WEIGHTS, lambda path: path.write_bytes(bytes(8)), r"the header of \S+model\.safetensors is damaged"),
        (WEIGHTS, lambda path: path.write_bytes(b"\x08" + bytes(7) + b"scramble"), r"the header of \S+model\.safetensors is damaged"),
        (WEIGHTS, pointer, r"model\.safetensors is no safetensors file \(a Git LFS pointer\?\)"),
        (WEIGHTS, lambda path: path.rename(path.with_suffix(".bin")), r"lacks transformer/\*\.safetensors; .* \(others can run code\)"),
        (WEIGHTS, lambda path: path.rename(path.with_suffix(".fp16.safetensors")), r"lacks transformer/\*\.safetensors"),
        ("text_encoder_3/model-00002-of-00003.safetensors", Path.unlink, r"lacks text_encoder_3/\S+2-of-\S+, named in text_encoder_3/mod"),
        ("vae/config.json", Path.unlink, r"lacks vae/config\.json; it must be a diffusers folder"),
        ("vae/config.json", lambda path: os.truncate(path, 50), r"vae/config\.json cannot be read as JSON"),
        ("vae/config.json", lambda path: path.write_text("[]"), r"vae/config\.json holds no JSON object"),
        ("tokenizer_2", shutil.rmtree, r"lacks tokenizer_2; it must"),
        ("model_index.json", lambda path: rewrite_json(path, transformer=["diffusers", "FluxTransformer2DModel"]), r"not SD3Trans"),
        ("transformer/config.json", lambda path: rewrite_json(path, _class_name="UNet"), r"names the transformer UNet, not SD3"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named_with_the_remedy(model, tmp_path, name, damage, message):
    shutil.copytree(model, tmp_path / "sd3")
    assert check_base_model(tmp_path / "sd3") == tmp_path / "sd3"
    damage(tmp_path / "sd3" / name)
    with pytest.raises(WeightsError, match=rf"^base_model\.path: .*{message}"):
        check_base_model(tmp_path / "sd3")
