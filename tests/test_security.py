"""What somebody else's file or text may try, and what becomes of it: refused, or inert.

Here is what several readers have in common and what only a run of the workflow shows. What one reader refuses is tested with it: archives
(`test_downloads.py`: links, devices, names that lead outside or collide), repositories of the hub (`test_checkpoints.py`: what can run
code is not fetched, the token goes to no other host), paths in manifests (`test_files.py`), configuration files of mmsegmentation
(`test_critics.py`, `test_segmentor_configs.py`), Inception's weights (`test_generation.py`), HTML (`test_report.py`, `test_data_sheet.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crfm_core import ConfigError, CrfmError, DataError, WeightsError
from crfm_core.checkpoints import check_base_model
from crfm_core.data.adapters.geotiff import _Polygons
from crfm_core.data.rasters import read_rgb
from crfm_core.generator.resuming import newest_readable
from crfm_core.generator.starting import _read_file
from crfm_core.segmentor.critic import load_critic
from crfm_core.segmentor.openmmlab import load_backbone
from crfm_core.segmentor.training import newest_checkpoint
from crfm_core.settings import Dataset, load_datasets, load_settings

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).parent / "configs"


def config(**changes: object) -> dict:
    return yaml.safe_load((CONFIGS / "smallest.yaml").read_text()) | changes


def world(**changes: object) -> dict:
    return yaml.safe_load((CONFIGS / "small_world.yaml").read_text()) | changes


# -------------------------------------------------------------------------------------------------------------- checkpoints


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


READERS = {
    "critic": (lambda folder: load_critic(folder / "iter_1.pth"), "holds more than weights"),
    "start_from of a control": (lambda folder: _read_file(folder / "iter_1.pth"), "holds more than weights"),
    "pretrained of a segmentor": (lambda folder: load_backbone(torch.nn.Linear(1, 1), folder / "iter_1.pth"), "holds more than weights"),
    "a segmentor's training that continues": (lambda folder: newest_checkpoint(folder), None),
    "a generator's training that continues": (lambda folder: newest_readable(folder), None),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_that_would_run_code_is_refused_or_passed_over_unrun(tmp_path, reader, capsys):
    content = {"state_dict": {"weight": torch.zeros(1)}, "meta": {}, "harm": Bomb(tmp_path / "harmed")}
    torch.save(content, tmp_path / "iter_1.pth")
    torch.save(content, tmp_path / "checkpoint-1.pt")
    read, message = READERS[reader]
    if message:
        with pytest.raises(WeightsError, match=message):
            read(tmp_path)
    else:
        assert read(tmp_path) is None and "holds more than weights" in capsys.readouterr().out
    assert not (tmp_path / "harmed").exists()


def test_a_base_model_whose_weights_could_run_code_is_refused(tmp_path):
    parts = (
        "transformer",
        "scheduler",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    (tmp_path / "model_index.json").write_text("{}")
    for part in parts:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        torch.save({"harm": Bomb(tmp_path / "harmed")}, tmp_path / part / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"weights in safetensors \(others can run code\)"):
        check_base_model(tmp_path)
    assert not (tmp_path / "harmed").exists()


# ------------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("results", "out; touch harmed"),
        ("results", "$(touch harmed)"),
        ("results", "`touch harmed`"),
        ("results", "out\ntouch harmed"),
        ("results", "{input}"),
        ("results", "--forceall"),
        ("scale", '=HYPERLINK("http://127.0.0.1")'),
        ("scale", "\x1b]0;title\x07"),
        ("critic", {"path": "critic.pth'; touch harmed"}),
        ("samplers", {"../../up": {"num_steps": 2}}),
        ("samplers", {"a b": {"num_steps": 2}}),
        ("recipes", {"$(touch harmed)": {}}),
        ("captions", {"template": "{classes.__class__.__mro__}"}),
        ("captions", {"template": "{classes} {{ 7 * 7 }}"}),
        ("captions", {"template": "{classes!r}"}),
        ("segmentors", {"net": {"architecture": "unet_tiny", "iterations": 1, "batch_size": 2, "learning_rate": 1, "pretrained": "a|b"}}),
    ],
)
def test_values_that_shell_engine_terminal_or_spreadsheet_could_take_for_something_else_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=rf"\b{key}\b"):
        load_settings(config(**{key: value}))


@pytest.mark.parametrize(
    "changes",
    [{"name": "../up"}, {"classes": ["=1+1", "b", "c", "d", "e", "f", "g"]}, {"licence": "\x1b[2J"}, {"select": {"train": {"ids": "a;b"}}}],
)
def test_such_values_of_a_dataset_are_refused_too(tmp_path, changes):
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(world(**changes)))
    with pytest.raises(ConfigError, match=next(iter(changes))):
        load_datasets(load_settings(config(datasets=[str(tmp_path / "world.yaml")])), tmp_path)


@pytest.mark.parametrize("secret", ["http://user:word@127.0.0.1/w.pth", "https://127.0.0.1/w.pth?X-Amz-Signature=word"])
def test_a_secret_in_an_address_is_refused_without_being_shown(secret):
    net = {"architecture": "unet_tiny", "iterations": 1, "batch_size": 2, "learning_rate": 1}
    with pytest.raises(ConfigError) as refusal:
        load_settings(config(segmentors=config()["segmentors"] | {"net": net | {"pretrained": {"url": secret, "sha256": "0" * 64}}}))
    assert "holds a password or token" in str(refusal.value) and "word@" not in str(refusal.value) and "=word" not in str(refusal.value)


def test_yaml_that_would_make_objects_is_refused_unmade(tmp_path):
    tag = f"!!python/object/apply:os.mkdir ['{tmp_path / 'harmed'}']"
    (tmp_path / "world.yaml").write_text((CONFIGS / "small_world.yaml").read_text() + f"\nabout: {tag}\n")
    with pytest.raises(CrfmError, match="world"):
        load_datasets(load_settings(config(datasets=[str(tmp_path / "world.yaml")])), tmp_path)
    (tmp_path / "smallest.yaml").write_text((CONFIGS / "smallest.yaml").read_text() + f"\nscale: {tag}\n")
    done = run(tmp_path, "--dry-run")
    assert done.returncode and not (tmp_path / "harmed").exists()


# --------------------------------------------------------------------------------------------------------------- scene files


def test_a_raster_that_only_says_where_to_read_others_is_refused(tmp_path):
    """GDAL tells formats by content, and would read a file of the machine, or ask a server, for a scene that is named like an image."""
    (tmp_path / "scene.tif").write_text('<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:9/</ServerUrl></Service></GDAL_WMS>')
    with pytest.raises(DataError, match=r"scene\.tif"):
        read_rgb(tmp_path / "scene.tif")


def test_features_that_only_say_where_to_read_others_are_refused(tmp_path):
    source = {"kind": "geotiff", "root": ".", "labels": "*.json", "attribute": "kind", "splits": dict.fromkeys(("train", "test"), "*.tif")}
    names = {name: index for index, name in enumerate(world()["classes"])}
    dataset = Dataset(**world(source=source, label_map=names))
    (tmp_path / "labels.json").write_text('<OGRVRTDataSource><OGRVRTLayer name="a"><SrcDataSource>/etc</SrcDataSource></OGRVRTLayer>')
    with pytest.raises(DataError, match="it says where to read others"):
        _Polygons.read(tmp_path / "labels.json", dataset)


# -------------------------------------------------------------------------------------------------------------------- a run

EVIL = "$(touch harmed) `touch harmed` ; touch harmed # {input} {wildcards.dataset} {{ 7 * 7 }} {% raw %} <script>alert(1)</script> \"'"
SECRETS = {"HF_TOKEN": "hf_canaryOfTheHub", "AWS_SECRET_ACCESS_KEY": "canaryOfTheCloud", "CRFM_PASSWORD": "canaryOfNobody"}


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", *arguments]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*command, "--configfile", "smallest.yaml"], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


def test_a_run_takes_texts_for_texts_and_leaves_no_secret_anywhere(tmp_path):
    """From the configuration's words through rules, logs, manifests and the data sheet; with folders whose names need quoting."""
    folder = tmp_path / "a folder & more"
    folder.mkdir()
    (folder / "small_world.yaml").write_text(yaml.safe_dump(world(about=EVIL, licence=EVIL)))
    results = "the results (1)"
    (folder / "smallest.yaml").write_text(yaml.safe_dump(config(results=results)))
    done = run(folder, f"{results}/small/data_sheet", f"{results}/small/captions/train.parquet", "--verbose", **SECRETS)
    assert done.returncode == 0, done.stderr[-5000:]
    failed = run(folder, f"{results}/small/mosaics/train/nowhere-image.tif", **SECRETS)
    assert failed.returncode and "nowhere" in failed.stderr
    assert not list(tmp_path.rglob("harmed"))
    sheet = (folder / results / "small" / "data_sheet" / "index.html").read_text()
    assert "<script>alert" not in sheet and "&lt;script&gt;alert(1)" in sheet and "{{ 7 * 7 }}" in sheet and "{wildcards.dataset}" in sheet
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = "".join((done.stdout, done.stderr, failed.stdout, failed.stderr))
    assert len(written) > 50 and any("log" in str(path) for path in written)
    for secret in SECRETS.values():
        assert secret not in said
        assert not [path for path, content in written.items() if secret.encode() in content]


def test_no_program_is_started_through_a_shell():
    for path in (ROOT / "crfm_core").rglob("*.py"):
        assert not re.search(r"shell=True|os\.system|os\.popen", path.read_text(encoding="utf-8")), path
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        assert not re.search(r"^\s*(shell|run):", path.read_text(encoding="utf-8"), re.MULTILINE), path
