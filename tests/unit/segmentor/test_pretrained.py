"""Pretrained weights that are fetched, from a server that this file starts on the loopback, and the rules around them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from paths import CONFIGS, ROOT
from segmentor_tiles import write_tiles
from segmentors import train_on

from crfm_core import ConfigError, DataError, WeightsError
from crfm_core.files import sha256_of
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.segmentor.mmseg.weights import read_mmseg_checkpoint
from crfm_core.segmentor.pretrained import fetch_weights
from crfm_core.settings import Download, Segmentor


class Server(ThreadingHTTPServer):
    """Serves one file at /weights.pth and counts how often it is asked."""

    daemon_threads = True

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.body, self.asked = body, 0
        self.url = f"http://127.0.0.1:{self.server_port}/weights.pth"
        self.sha256 = hashlib.sha256(body).hexdigest()

    def download(self, folder: Path, **changes: str) -> Download:
        return Download(**{"url": self.url, "sha256": self.sha256[:8], "path": str(folder / "w.pth"), **changes})


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked += 1
        found = self.path == "/weights.pth"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(self.server.body) if found else 0))
        self.end_headers()
        self.wfile.write(self.server.body if found else b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def backbone() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return build_model("segformer_tiny", 3).backbone.state_dict()


@pytest.fixture
def server(backbone) -> Iterator[Server]:
    file = io.BytesIO()
    torch.save({"state_dict": backbone}, file)
    server = Server(file.getvalue())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("digits", [8, 9, 64])
def test_weights_are_fetched_once_and_checked_by_as_many_digits_as_are_known(server, tmp_path, digits):
    download = server.download(tmp_path, sha256=server.sha256[:digits])
    path = tmp_path / "w.pth"
    for _ in range(2):
        assert fetch_weights(download) == {"file": str(path), "url": server.url, "sha256": server.sha256}
    assert server.asked == 1 and sha256_of(path) == server.sha256


def test_weights_of_another_content_are_refused_and_left_out_only_where_that_is_allowed(server, tmp_path, capsys):
    wrong = server.download(tmp_path, sha256="0" * 8)
    with pytest.raises(
        DataError, match=rf"weights\.pth: the download has the sha256 {server.sha256}, expected 00000000; .*run `again` again"
    ):
        fetch_weights(wrong, command="again")
    gone = server.download(tmp_path, url=server.url.replace("weights", "other"))
    found = fetch_weights(gone, optional=True)
    assert list(found) == ["missing"] and "other.pth: answered with status 404" in found["missing"]
    assert "continuing without these weights: " in capsys.readouterr().out
    assert not (tmp_path / "w.pth").exists()
    (tmp_path / "w.pth").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"w\.pth: has the sha256 .*; delete it to have it fetched"):
        fetch_weights(server.download(tmp_path))


def test_weights_that_were_not_fetched_are_asked_for(server, tmp_path):
    segmentor = Segmentor(
        architecture="segformer_tiny", iterations=2, batch_size=2, learning_rate=1e-3, pretrained=server.download(tmp_path)
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"segmentor pretrained: fetch {server.url} first and pass the file as `pretrained`"):
        train_on(tmp_path / "x.parquet", tmp_path / "out.pth", segmentor)


def test_a_training_starts_from_the_file_it_is_given_or_that_its_settings_name(tmp_path, backbone):
    tiles = write_tiles(tmp_path / "train.parquet", 4)
    torch.save({"state_dict": backbone}, tmp_path / "w.pth")
    hardly = {"architecture": "segformer_tiny", "iterations": 1, "batch_size": 2, "learning_rate": 1e-12}

    def started(segmentor: Segmentor, **given: Path) -> bool:
        weights = read_mmseg_checkpoint(train_on(tiles, tmp_path / "out.pth", segmentor, **given))["state_dict"]
        return all(torch.allclose(weights[f"backbone.{name}"], tensor) for name, tensor in backbone.items())

    assert started(Segmentor(**hardly), pretrained=tmp_path / "w.pth")
    assert started(Segmentor(**hardly, pretrained=str(tmp_path / "w.pth")))
    assert not started(Segmentor(**hardly))
    with pytest.raises(WeightsError, match=r"none\.pth: there is no such file of pretrained weights"):
        started(Segmentor(**hardly, pretrained=str(tmp_path / "none.pth")))


# -------------------------------------------------------------------------------------------------------- the workflow


@pytest.fixture
def run(tmp_path):
    """Runs the smallest configuration with other sections of segmentors, and a split that chooses the best weights."""
    for file in (CONFIGS).iterdir():
        shutil.copy(file, tmp_path)
    world = tmp_path / "small_world.yaml"
    world.write_text(world.read_text() + "val: reference\n")
    config = yaml.safe_load((tmp_path / "smallest.yaml").read_text())

    def _run(*arguments: str, **segmentor: object) -> str:
        config["segmentors"]["segformer_tiny"] |= segmentor
        (tmp_path / "smallest.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]
        done = subprocess.run(
            [*command, *arguments, "--configfile", "smallest.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        logs = "".join(path.read_text() for path in tmp_path.glob("results/logs/**/train_segmentor*.log"))
        assert not done.returncode, (done.stdout + done.stderr)[-3000:] + logs
        return done.stdout + done.stderr

    return _run


CHECKPOINT = "results/small/segmentors/real/segformer_tiny/seed0/checkpoint.pth"


def test_weights_are_planned_to_be_fetched_where_a_segmentor_names_an_address_only(server, tmp_path, run):
    said = run("--dry-run", CHECKPOINT, pretrained=server.download(tmp_path).model_dump())
    assert re.search(r"^fetch_weights +1$", said, re.MULTILINE)
    needs = re.search(r"Training segformer_tiny on real.*\nReason: (.*)", said)[1]
    assert "results/weights/segformer_tiny.json" in needs and "results/small/tiles/reference.parquet" in needs
    (tmp_path / "mine.pth").touch()
    assert "fetch_weights" not in run("--dry-run", CHECKPOINT, pretrained="mine.pth")


@pytest.mark.slow
def test_a_described_segmentor_with_fetched_weights_and_a_choice_comes_out_of_the_workflow(server, tmp_path, run, backbone):
    config = "model = dict(type='EncoderDecoder', backbone=dict(type='MixVisionTransformer', embed_dims=16, num_layers=[1, 1, 1, 1], "
    config += "num_heads=[1, 2, 4, 8]), decode_head=dict(type='SegformerHead', in_channels=[16, 32, 64, 128], in_index=[0, 1, 2, 3], "
    config += "channels=32, num_classes=9, norm_cfg=dict(type='BN')))\n"
    (tmp_path / "mine.py").write_text(config)
    settings = {
        "architecture": None,
        "config": "mine.py",
        "class_weights": "median_frequency",
        "precision": "bf16",
        "warmup": 1,
        "validate_every": 2,
    }
    run(CHECKPOINT, pretrained=server.download(tmp_path).model_dump(), learning_rate=1e-12, **settings)
    note = json.loads((tmp_path / "results/weights/segformer_tiny.json").read_text())
    assert note == {"file": str(tmp_path / "w.pth"), "url": server.url, "sha256": server.sha256}
    stored = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert [look[0] for look in stored["meta"]["validation"]] == [2, 4, 6] and len(stored["meta"]["class_weights"]) > 2
    for name, tensor in backbone.items():
        torch.testing.assert_close(stored["state_dict"][f"backbone.{name}"], tensor)
