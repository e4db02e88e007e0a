"""Fetching base models and other repositories from a hub on the loopback: whole, checked, and with the token kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import constants
from loopback_hub import NEXT_REVISION, REVISION, Hub, contents, fetched, serve_hub, stop
from paths import CONFIGS, ROOT
from tiny_models import save_tiny_pipeline

import crfm_core.hub
from crfm_core import DataError, ResourceError, WeightsError
from crfm_core.checkpoints import base_folder, check_base_model
from crfm_core.files import write_json
from crfm_core.hub import Repository, fetch_base_model, require_token
from crfm_core.settings import HubBase

REPO, TOKEN = "someone/tiny-sd3", "hf_VerySecretToken"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NOT_NEEDED = (
    "README.md", ".gitattributes", "tiny_sd3.safetensors", "pipeline.py", "text_encoders/clip_l.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin", "vae/model.ckpt",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder_3/model.safetensors.index.fp16.json",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(model, monkeypatch) -> Iterator[Hub]:
    with serve_hub(Hub(contents(model) | dict.fromkeys(NOT_NEEDED, b"not wanted"), REPO), monkeypatch) as hub:
        yield hub


def base(folder: Path, **changes: str) -> HubBase:
    return HubBase(**({"kind": "hub", "repo": REPO, "revision": REVISION, "path": str(folder / "sd3")} | changes))


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
    monkeypatch.setenv("CRFM_TOKEN_HOST", "127.0.0.1")
    fetch_base_model(base(tmp_path))
    senders = {(host, authorization) for host, _, _, authorization in hub.requests}
    assert senders == {("127.0.0.1", f"Bearer {TOKEN}"), ("localhost", None)}, "the host of the large files gets no token"
    said = "".join(capfd.readouterr())
    assert "transformer/config.json" in said and TOKEN not in said and TOKEN not in caplog.text
    assert not [name for name, body in contents(tmp_path).items() if TOKEN.encode() in body]


@pytest.mark.parametrize("host", [None, "localhost", "huggingface.co"])
def test_a_mirror_gets_no_token_unless_the_user_names_its_host(hub, tmp_path, monkeypatch, capfd, host):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if host:
        monkeypatch.setenv("CRFM_TOKEN_HOST", host)
    fetch_base_model(base(tmp_path))
    assert {authorization for _, _, _, authorization in hub.requests} == {None}
    hub.wanted_token = TOKEN
    with pytest.raises(WeightsError, match=rf"the token is not sent to {hub.endpoint}, .*; check the name, or set CRFM_TOKEN_HOST=127\.0"):
        fetch_base_model(base(tmp_path, revision=NEXT_REVISION))
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("endpoint", "sent"),
    [
        ("https://huggingface.co", True),
        ("https://hub-ci.huggingface.co/", True),
        ("http://huggingface.co", False),
        ("https://huggingface.co.example.org", False),
        ("https://nothuggingface.co", False),
        ("https://example.org/huggingface.co", False),
    ],
)
def test_the_hubs_own_address_is_told_from_others(monkeypatch, endpoint, sent):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("CRFM_TOKEN_HOST", raising=False)
    gated = HubBase(kind="hub", repo="stabilityai/stable-diffusion-3.5-medium")
    with contextlib.nullcontext() if sent else pytest.raises(WeightsError, match="is gated and the token is not sent to") as caught:
        require_token(gated)
    assert sent or "Secret" not in str(caught.value)


def test_the_login_that_the_hubs_own_tool_stored_is_used_and_the_environment_goes_before_it(hub, tmp_path, monkeypatch):
    (tmp_path / "login").write_text(f"{TOKEN}\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.setenv("CRFM_TOKEN_HOST", "127.0.0.1")
    hub.wanted_token = TOKEN
    fetch_base_model(base(tmp_path))
    require_token(HubBase(kind="hub", repo="stabilityai/stable-diffusion-3.5-medium"))
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(WeightsError, match="refuses the token; set HF_TOKEN to a valid one"):
        fetch_base_model(base(tmp_path, revision=NEXT_REVISION))
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "login").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightsError, match=r"the stored login of the hub cannot be read \(UnicodeDecodeError\); log in again"):
        require_token(base(tmp_path))


def test_what_the_librarys_cache_holds_is_copied_and_what_is_damaged_there_is_downloaded(hub, model, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION
    shutil.copytree(model, snapshot)
    (snapshot / "LICENSE.md").write_text("Be vile.\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert fetched(fetch_base_model(base(tmp_path))) == contents(model)
    assert [name for name, _ in hub.downloads()] == ["LICENSE.md"]


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


def test_a_record_that_is_damaged_is_written_again_without_a_download(hub, model, tmp_path):
    folder = fetch_base_model(base(tmp_path))
    record = (folder / "fetched.json").read_bytes()
    os.truncate(folder / "fetched.json", len(record) // 2)
    hub.requests.clear()
    fetch_base_model(base(tmp_path))
    assert (folder / "fetched.json").read_bytes() == record and not hub.downloads()


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
        (None, {"refusal": (401, "GatedRepo", "")}, {}, f"{REPO} is gated and there is no token; accept its licence at ENDPOINT/{REPO}"),
        (None, {"refusal": (401, "GatedRepo", "")}, {}, "and `export HF_TOKEN=...` or log in with `hf auth login`"),
        (TOKEN, {"refusal": (403, "GatedRepo", "Your request awaits a review.")}, {},
         f"is gated and the token's account has no access to it (Your request awaits a review.); accept its licence at ENDPOINT/{REPO}"),
        (TOKEN, {"refusal": (403, "", "Please enable access to public gated repositories in your fine-grained token settings.")}, {},
         "the token lacks the right to read someone/tiny-sd3 (Please enable access to public gated repositories in your fine-grained"),
        (TOKEN, {"refusal": (403, "", "")}, {}, f"base_model.repo: ENDPOINT/{REPO} is forbidden; check whether this account, network and"),
        (None, {"refusal": (403, "", "Blocked by the proxy.")}, {}, f"ENDPOINT/{REPO} is forbidden (Blocked by the proxy.); check whether"),
        (TOKEN, {"refusal": (403, "", f"No token {TOKEN} here")}, {}, f"ENDPOINT/{REPO} is forbidden; check whether"),
        (TOKEN, {"refusal": (403, "", "Access to this resource is disabled.")}, {}, f"ENDPOINT has disabled {REPO}; give another"),
        (None, {"wanted_token": "hf_other"}, {}, f"ENDPOINT has no model {REPO}, or wants a token for it, and there is no token; check"),
        (TOKEN, {"wanted_token": "hf_other"}, {}, "ENDPOINT refuses the token; set HF_TOKEN to a valid one"),
        (TOKEN, {}, {"repo": "someone/nothing"}, "base_model.repo: ENDPOINT has no someone/nothing that may be read with this token"),
        (TOKEN, {}, {"revision": "c" * 40},
         f"base_model.revision: {REPO} has no revision {'c' * 40}; take one of ENDPOINT/{REPO}/commits/main"),
        (f"{TOKEN} \n{TOKEN}", {}, {}, "HF_TOKEN, or the stored login, holds characters that no token has"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_accept_or_set_and_does_not_repeat_the_token(hub, tmp_path, monkeypatch, token, served, changes, message):
    monkeypatch.setenv("CRFM_TOKEN_HOST", "127.0.0.1")
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


@pytest.mark.parametrize("answer", [b"<html>Please log in to the guest network</html>", b"{}", b"[1]", b'{"id": "a/b", "sha": "main"}'])
def test_an_endpoint_that_is_no_hub_is_named(hub, tmp_path, answer):
    hub.listing = answer
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
    for file in (CONFIGS).iterdir():
        shutil.copy(file, tmp_path)
    config = yaml.safe_load((tmp_path / "smallest.yaml").read_text())
    section = {"kind": "hub", "repo": REPO, "revision": REVISION, "path": "models/sd3"}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(config | {"base_model": section, "device": "cuda"}))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "hub.yaml", "--cores", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN, "CRFM_TOKEN_HOST": "127.0.0.1"}

    def run(**changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, "results/base_model.json"], cwd=tmp_path, env=environment | changes, capture_output=True, text=True, check=False
        )

    done = run(HF_HUB_OFFLINE="1")
    log = (tmp_path / "results" / "logs" / "fetch_model-base_model.log").read_text()
    assert done.returncode != 0 and "run `snakemake --cores 1 results/base_model.json` again" in log and "Traceback" not in log
    done = run()
    assert done.returncode == 0, done.stderr
    where = json.loads((tmp_path / "results" / "base_model.json").read_text())
    assert where == {"folder": str(tmp_path / "models" / "sd3"), "repo": REPO, "revision": REVISION}
    assert fetched(base_folder(tmp_path / "results" / "base_model.json")) == contents(model)
    assert TOKEN not in done.stdout + done.stderr
    assert not [name for name, body in contents(tmp_path).items() if TOKEN.encode() in body]


# ------------------------------------------------------------------------------------------------------ other repositories


DATA, FILES = "someone/data", {"a/b c/1.png": b"one", "a/2.png": b"two", "README.md": b"Read me.", "code.py": b"not wanted"}
WANTED = {name: body for name, body in FILES.items() if name != "code.py"}


@pytest.fixture
def data_hub(monkeypatch) -> Iterator[Hub]:
    with serve_hub(Hub(dict(FILES), DATA, "dataset"), monkeypatch) as hub:
        hub.page = 2
        yield hub


def fetch_data(folder: Path, revision: str = "main", **changes: object) -> Path:
    options = {"repo_type": "dataset", "needed": lambda name: not name.endswith(".py"), "key": "source", "place": "root"}
    return Repository(DATA, revision, folder / "data", **options | changes).fetch()


def test_a_dataset_is_fetched_from_its_branch_and_stays_at_the_commit_that_it_had_then(data_hub, tmp_path):
    folder = fetch_data(tmp_path)
    assert fetched(folder) == WANTED
    record = json.loads((folder / "fetched.json").read_text())
    assert (record["repo"], record["asked"], record["revision"]) == (DATA, "main", REVISION) and set(record["files"]) == set(WANTED)
    data_hub.branches["main"], data_hub.revisions[NEXT_REVISION] = NEXT_REVISION, FILES | {"README.md": b"Read it anew."}
    data_hub.requests.clear()
    fetch_data(tmp_path), fetch_data(tmp_path, REVISION)
    assert data_hub.requests == [], "neither by the branch's name nor by the commit's is there anything to ask"
    (folder / "a/2.png").unlink()
    fetch_data(tmp_path)
    assert fetched(folder) == WANTED and json.loads((folder / "fetched.json").read_text()) == record
    fetch_data(tmp_path, NEXT_REVISION)
    assert fetched(folder) == WANTED | {"README.md": b"Read it anew."}


def test_a_commit_that_a_branch_was_fixed_to_and_that_is_gone_is_named_with_the_record_to_delete(data_hub, tmp_path):
    data_hub.broken.add("README.md")
    with pytest.raises(DataError, match="status 500"):
        fetch_data(tmp_path)
    data_hub.broken.clear()
    data_hub.branches["main"], data_hub.revisions = NEXT_REVISION, {NEXT_REVISION: dict(FILES)}
    with pytest.raises(DataError) as caught:
        fetch_data(tmp_path)
    record = tmp_path / "data" / "fetched.json"
    assert str(caught.value) == (
        f"source.revision: {DATA} has no revision main; take one of {data_hub.endpoint}/datasets/{DATA}/commits/main, or delete {record}, "
        f"which fixed it to {REVISION}"
    )
    shutil.rmtree(tmp_path / "data")
    assert fetched(fetch_data(tmp_path)) == WANTED


def test_small_files_are_fetched_several_at_a_time_and_large_ones_one_after_the_other(data_hub, tmp_path, monkeypatch):
    data_hub.gathering = threading.Barrier(3)  # none is answered before all three were asked for
    assert fetched(fetch_data(tmp_path)) == WANTED
    asked = []

    def wait(_: float) -> None:
        time.sleep(0.05)  # long enough for another to ask
        asked.append(len(data_hub.downloads()))

    monkeypatch.setattr(crfm_core.hub, "SMALL_FILE", 0)
    data_hub.gathering = SimpleNamespace(wait=wait)
    data_hub.requests.clear()
    assert fetched(fetch_data(tmp_path / "other")) == WANTED and asked == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil.png", "leads upwards"),
        ("a/../../evil.png", "leads upwards"),
        ("/tmp/evil.png", "is absolute"),
        ("a\\evil.png", "holds a backslash"),
        ("C:evil.png", "begins with a drive letter"),
        ("a\nevil.png", "holds control characters"),
        ("fetched.json", "is one of ours"),
        (".partial/evil.png", "is one of ours"),
    ],
)
def test_a_file_whose_name_leads_out_of_the_folder_is_refused_before_anything_is_fetched(data_hub, tmp_path, name, why):
    data_hub.revisions[REVISION][name] = b"?"
    with pytest.raises(DataError) as caught:
        fetch_data(tmp_path)
    assert str(caught.value) == f"source.repo: {DATA} lists a file {name!r}, whose name {why}; nothing of it is fetched"
    assert not data_hub.downloads() and fetched(tmp_path) == {"data/.lock": b""}
    fetch_data(tmp_path, needed=lambda other: other != name)


@pytest.mark.parametrize(
    ("changes", "served", "message"),
    [
        ({"needed": lambda name: False}, {}, f"source.repo: {DATA} at {REVISION} holds none of the files that are needed; give another"),
        ({"revision": "other"}, {}, f"source.revision: {DATA} has no revision other; take one of ENDPOINT/datasets/{DATA}/commits/main"),
        ({"repo_type": "model"}, {}, f"source.repo: ENDPOINT has no {DATA} that may be read and there is no token"),
        ({}, {"refusal": (403, "GatedRepo", "")}, f"source.repo: {DATA} is gated and there is no token; accept its licence at"),
        ({}, {"wanted_token": "hf_other"}, f"ENDPOINT has no dataset {DATA}, or wants a token for it, and"),
        ({"key": "captions.model"}, {"refusal": (503, "", "")}, "captions.model.repo: ENDPOINT/datasets/someone/data answered with status"),
    ],
)  # fmt: skip
def test_messages_name_the_key_and_the_kind_of_repository(data_hub, tmp_path, changes, served, message):
    for name, value in served.items():
        setattr(data_hub, name, value)
    with pytest.raises((DataError, WeightsError)) as caught:
        fetch_data(tmp_path, **changes)
    assert message.replace("ENDPOINT", data_hub.endpoint) in str(caught.value)
    assert isinstance(caught.value, WeightsError if changes.get("repo_type") == "model" else DataError)


def test_a_folder_that_cannot_be_written_and_a_file_that_is_another_are_named_by_their_key(data_hub, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ResourceError, match=r"^source\.root: .*Not a directory.*; free some space there or set it to another folder, then run"
    ):
        fetch_data(tmp_path / "file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_bytes(b"Mine.")
    with pytest.raises(DataError, match=r"^source\.root: \S+README\.md is there already .*; delete it, set another path, or do without$"):
        fetch_data(tmp_path, instead="do without")
