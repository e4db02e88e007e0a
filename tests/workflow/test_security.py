"""What an attacker may put into what the workflow reads, as one table: it is refused with a message, or it stays without effect.

More rows stand beside what they are about, and are not repeated here:

- archives (.., absolute names, links, devices, bombs, more bytes than declared), downloads and redirects: test_downloads
- listings of the hub, the token on its way to another host: test_checkpoints
- checkpoints of segmentors in four formats: test_critic, test_mmseg_checkpoint
- model folders of transformers with code: test_transformers_folder, test_clip, test_captions
- resumed trainings of segmentors: test_segmentor_training, test_critic; weights of FID: test_generation
- configuration files of mmsegmentation with code: test_mmseg_descriptions; paths in manifests (.., absolute, links): test_files
- markup in the report and the data sheet: test_report, test_data_sheet; no pickle anywhere in the code: test_architecture
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from data_sheets import build as build_sheet
from data_sheets import dataset_of
from hostile import Program, would_run
from loopback_files import FLAT
from loopback_hub import REVISION, Hub, contents, serve_hub
from paths import CONFIGS, ROOT
from snakemake.common.configfile import load_configfile
from tiny_models import tiny_pipeline, tiny_transformer
from tiny_world import tiny_base_settings

from crfm_core import ConfigError, CrfmError, DataError, WeightsError
from crfm_core.checkpoints import check_base_model, first_readable
from crfm_core.data.rasters import read_rgb, write_raster
from crfm_core.data.sources.geotiff import _Polygons
from crfm_core.files import inside
from crfm_core.generator.resuming import checkpoints_in
from crfm_core.generator.weights import start_from
from crfm_core.manifest import paths_of
from crfm_core.models.base import train_autoencoder
from crfm_core.reporting.data_sheet import draw_data_sheet
from crfm_core.sampling.sampler import open_generator
from crfm_core.settings import Captions, Dataset, load_dataset, load_settings
from crfm_core.text.captions import caption_of
from crfm_core.text.encoders import TextEncoders

SMALLEST = yaml.safe_load((CONFIGS / "smallest.yaml").read_text())
WORLD = yaml.safe_load((CONFIGS / "small_world.yaml").read_text())


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ------------------------------------------------------------------------------------------------------ weights and models


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "generator"
    tiny_pipeline(text=True).save_pretrained(folder)
    return folder


def pickled(part: str, name: str = "diffusion_pytorch_model.bin", beside: bool = False) -> Callable:
    """Weights that are a program, in place of those in safetensors or beside them."""

    def spoil(folder: Path, mark: Path) -> None:
        for path in [] if beside else (folder / part).glob("*.safetensors"):
            path.unlink()
        torch.save({"weight": Program(Path.touch, mark)}, folder / part / name)

    return spoil


def with_code(**index: object) -> Callable:
    """Python files in every folder, which every configuration names, and an index changed."""

    def spoil(folder: Path, mark: Path) -> None:
        for config in [*folder.glob("*/*config.json"), folder / "model_index.json"]:
            own = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil"), "custom_pipeline": "evil"}
            change(config, **own)
            config.with_name("evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    pass\n")
        change(folder / "model_index.json", **index)

    return spoil


def start(folder: Path) -> None:
    start_from(tiny_transformer(), folder, 7, "grey")


MODELS = [
    # what reads it, what is wrong with the folder, the message (None: it is opened, and the program is not run)
    (open_generator, pickled("vae"), r"vae: holds no diffusion_pytorch_model\*\.safetensors"),
    (open_generator, pickled("transformer"), r"transformer: holds no diffusion_pytorch_model\*\.safetensors"),
    (open_generator, pickled("vae", beside=True), None),
    (open_generator, with_code(), None),
    (open_generator, with_code(more=["evil", "Evil"]), None),
    (open_generator, with_code(_class_name=["evil", "Evil"]), "cannot be opened as a generator .*contains custom code in evil.py"),
    (open_generator, with_code(vae=["evil", "Evil"]), "cannot be opened as a generator .*contains custom code in evil.py"),
    (open_generator, with_code(vae=["subprocess", "Popen"]), "cannot be opened as a generator .*does not seem to have"),
    (open_generator, with_code(scheduler=["antigravity", "fly"]), "cannot be opened as a generator .*antigravity is not one of"),
    (check_base_model, pickled("text_encoder", "pytorch_model.bin"), r"lacks text_encoder/\*\.safetensors.*\(others can run code\)"),
    (TextEncoders.from_folder, pickled("text_encoder", "pytorch_model.bin"), "text_encoder cannot be loaded .*no file named model.safet"),
    (TextEncoders.from_folder, with_code(), None),
    (start, pickled("transformer"), r"transformer: holds no diffusion_pytorch_model\*\.safetensors"),
    (start, with_code(), None),
]


@pytest.mark.parametrize(("read", "spoil", "message"), MODELS)
def test_a_model_folder_runs_nothing_it_holds(generator, tmp_path, monkeypatch, read, spoil, message):
    folder, mark = tmp_path / "folder", tmp_path / "ran"
    shutil.copytree(generator, folder)
    spoil(folder, mark)
    monkeypatch.chdir(folder)  # where an import would find the code
    if message:
        with pytest.raises(WeightsError, match=message):
            read(folder)
    else:
        read(folder)
    assert not mark.exists()


def test_a_file_to_start_from_and_states_to_resume_from_run_nothing(tmp_path, capsys):
    mark = tmp_path / "ran"
    for name in ("released.pt", "checkpoint-5.pt", "autoencoder.pt"):
        torch.save({"step": 5, "model": Program(Path.touch, mark)}, tmp_path / name)
    foreign = r"holds more than weights \(\S+\) and is not loaded"
    with pytest.raises(WeightsError, match=rf"start_from: \S+released\.pt: {foreign}"):
        start_from(tiny_transformer(), tmp_path / "released.pt", 7, "grey")
    assert first_readable(checkpoints_in(tmp_path), "it is passed over") is None and re.search(
        rf"checkpoint-5\.pt: {foreign}", capsys.readouterr().out
    )
    images, labels = np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 32, 32), np.uint8)
    train_autoencoder(images, labels, 3, tiny_base_settings().vae, 0, tmp_path)
    assert re.search(rf"autoencoder\.pt: {foreign}; training begins anew", capsys.readouterr().out)
    assert would_run(tmp_path / "released.pt", mark)


# ------------------------------------------------------------------------------------------------------- images and labels


@pytest.fixture
def server():
    """A server on the loopback that nothing should ask; its requests."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        found.asked, found.url = asked, f"http://127.0.0.1:{found.server_port}/x.png"
        yield found
        found.shutdown()


BAND = """<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"{kind}>{more}
<SimpleSource><SourceFilename relativeToVRT="0">{source}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"""
PYTHON = "<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode>"
TILES = """<GDAL_WMS><Service name="TMS"><ServerUrl>{url}?${{x}}</ServerUrl></Service><DataWindow><UpperLeftX>0</UpperLeftX>
<UpperLeftY>8</UpperLeftY><LowerRightX>8</LowerRightX><LowerRightY>0</LowerRightY><SizeX>8</SizeX><SizeY>8</SizeY></DataWindow>
<BandsCount>3</BandsCount></GDAL_WMS>"""
LAYER = """<OGRVRTDataSource><OGRVRTLayer name="x"><SrcDataSource>/vsicurl/{url}</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>"""
GML = """<wfs:FeatureCollection xmlns:wfs="http://www.opengis.net/wfs" xmlns:gml="http://www.opengis.net/gml"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="http://a {url}?REQUEST=DescribeFeatureType">
<gml:featureMember><x fid="1"><a>1</a></x></gml:featureMember></wfs:FeatureCollection>"""


def test_an_image_that_points_elsewhere_is_refused_and_nothing_is_read_or_asked_for(tmp_path, server):
    secret, mark = tmp_path / "secret.png", tmp_path / "ran"
    write_raster(secret, np.full((8, 8, 3), 77, np.uint8))
    code = f"{PYTHON}<![CDATA[def f(*a, **k): open({str(mark)!r}, 'w')]]></PixelFunctionCode>"
    for name, text in {
        "another file.png": BAND.format(kind="", more="", source=secret),
        "a server.tif": BAND.format(kind="", more="", source=f"/vsicurl/{server.url}"),
        "tiles of a server.jpg": TILES.format(url=server.url),
        "code.tif": BAND.format(kind=' subClass="VRTDerivedRasterBand"', more=code, source=secret),
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name}: not a readable raster \(.*not recognized as being in a supported file format"):
            read_rgb(tmp_path / name)
    assert server.asked == [] and not mark.exists()
    (tmp_path / "own.vrt").write_text(BAND.format(kind="", more="", source=secret))
    assert (read_rgb(tmp_path / "own.vrt") == 77).all(), "a user's own mosaic, by its name"


@pytest.mark.parametrize(
    ("text", "message"),
    [(LAYER, "x.geojson: has no features but points to"), (GML, "x.geojson"), ('{{"type":"gdal_streamed_alg"}}', "points to other")],
)
def test_labels_that_point_elsewhere_are_refused_and_nothing_is_asked_for(tmp_path, server, text, message):
    (tmp_path / "x.geojson").write_text(text.format(url=server.url))
    source = {"kind": "geotiff", "root": ".", "splits": {"train": "*", "test": "*"}, "labels": "*", "attribute": "a"}
    with pytest.raises(DataError, match=message):
        _Polygons.read(tmp_path / "x.geojson", dataset_of(source=source, label_map={"1": 0}))
    assert server.asked == []


def test_a_null_character_in_a_manifest_is_refused_with_its_row(tmp_path):
    table = pd.DataFrame({"tile_id": ["t"], "image": ["a\0b.png"]})
    with pytest.raises(DataError, match=r"m\.parquet: row t: path 'a\\x00b\.png' holds a null character"):
        paths_of(tmp_path / "m.parquet", table, "image", tmp_path)
    with pytest.raises(DataError, match="holds a null character"):
        inside(tmp_path, "a\0b")


# ----------------------------------------------------------------------------------------------------------- configuration

SHELL = ["x; touch ran", "$(touch ran)", "`touch ran`", "a'b", 'a"b', "a|b", "a&b", "a\nb", "{input}", "{params.licence}", "-x", "a>b"]
PATHS = [
    ("results",), ("base_model", "path"), ("critic", "path"), ("controls", "triattention", "start_from"),
    ("samplers", "crfm", "critic_decoder"),
    ("segmentors", "unet_tiny", "pretrained"), ("segmentors", "unet_tiny", "config"), ("clip", "path"), ("generation", "weights"),
]  # fmt: skip


def set_key(config: dict, keys: tuple[str, ...], value: object) -> dict:
    """A configuration with one key set, and what stood beside ``path`` left out."""
    head, *rest = keys
    inner = config.get(head, {}) if keys[-1] != "path" else {"kind": "folder"} if head == "base_model" else {}
    return config | {head: set_key(inner, tuple(rest), value) if rest else value}


@pytest.mark.parametrize("keys", PATHS, ids=".".join)
def test_paths_hold_nothing_that_a_shell_or_the_engine_would_read_otherwise(keys):
    load_settings(set_key(SMALLEST | {"captions": {}}, keys, "a folder/ä (1)/b.c")) if keys != PATHS[6] else None
    for value in SHELL:
        with pytest.raises(ConfigError, match=rf"{re.escape('.'.join(keys))}: a path may not (contain|begin with)"):
            load_settings(set_key(SMALLEST, keys, value))


@pytest.mark.parametrize("name", [*SHELL, "..", "../up", "/tmp/x", "a/b", "a b", "", "a\0"])
def test_names_that_become_folders_are_letters_digits_and_dashes(name):
    for key in ("controls", "samplers", "segmentors", "filters", "recipes", "experiments"):
        with pytest.raises(ConfigError, match="should match pattern"):
            load_settings(SMALLEST | {key: SMALLEST[key] | {name: next(iter(SMALLEST[key].values()))}})
    with pytest.raises(ConfigError, match="should match pattern"):
        load_settings(SMALLEST | {"layouts": {name: {"kind": "augmented"}}})
    with pytest.raises(ConfigError, match=r"should match pattern|control characters"):
        load_settings(SMALLEST | {"tables": ["main", name]})
    for changes in ({"name": name}, {"source": WORLD["source"] | {"scenes": {"train": 1, "test": 1, name: 1}}}):
        with pytest.raises(ValueError, match=r"should match pattern|control characters"):
            Dataset(**WORLD | changes)


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "a\0b", "a\x9bb"])
def test_texts_write_nothing_to_a_terminal_but_themselves(text):
    for changes in ({"licence": text}, {"about": text}, {"classes": [*WORLD["classes"][:6], text]}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}: contains control characters"):
            Dataset(**WORLD | changes)
    experiments = {"main": SMALLEST["experiments"]["main"] | {"title": text}}
    for changes in ({"scale": text}, {"experiments": experiments}, {"captions": {"template": text + "{classes}"}}):
        with pytest.raises(ConfigError, match="contains control characters"):
            load_settings(SMALLEST | changes)


@pytest.mark.parametrize("text", ["=cmd|'/c calc'!A1", "+1", "-1", "@SUM(1)"])
def test_what_stands_in_cells_of_tables_is_no_formula(text):
    with pytest.raises(ConfigError, match="scale: String should match"):
        load_settings(SMALLEST | {"scale": text})
    with pytest.raises(ValueError, match="String should match"):
        Dataset(**WORLD | {"classes": [*WORLD["classes"][:6], text]})


def test_yaml_makes_nothing_but_plain_values(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "x.yaml"
    path.write_text(f'name: !!python/object/apply:os.system ["touch {mark}"]')
    with pytest.raises(ConfigError, match=r"x\.yaml: not valid YAML"):
        load_dataset(path)
    with pytest.raises(Exception, match="not valid JSON or YAML"):
        load_configfile(path)
    path.write_text(yaml.safe_dump(WORLD | {"__use_yte__": True, "about": f"?__import__('os').system('touch {mark}')"}))
    with pytest.raises(ConfigError, match="__use_yte__: unknown key"):
        load_dataset(path)
    assert not mark.exists()


TEMPLATES = [
    "{{ 7*7 }}{% raw %}",
    "{classes.__class__}",
    "${7*7}",
    r"$\frac{",
    "<script>alert(1)</script>",
    "a--></svg><img src=x onerror=y>",
]


@pytest.mark.parametrize("template", ["{classes.__class__}", "{classes!r}", "{0}", "{{ 7*7 }} {classes}", "{classes} {input}"])
def test_a_template_of_captions_has_three_words_and_no_other_braces(template):
    with pytest.raises(ValueError, match=r"must hold \{classes\}, \{shares\} or \{words\}, each at most once, and no other braces"):
        Captions(template=template)


@pytest.mark.parametrize("text", TEMPLATES)
def test_names_of_classes_are_no_templates(tmp_path, text):
    assert caption_of([1, 1], [text, "{classes}"], Captions(template="of {classes}")) == f"of {text}, {{classes}}"
    sheet = build_sheet(tmp_path)
    draw_data_sheet(**sheet | {"dataset": dataset_of(classes=["soil", "water", text], licence=text, about=text)})
    page = (sheet["out"] / "index.html").read_text()
    told = text.replace("<", "&lt;").replace(">", "&gt;")
    assert page.count(told) >= 3 and "<script" not in page and "onerror=y>" not in page and (text == told or text not in page)


# ----------------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "url", ["https://me:{}@host/x.pth", "https://host/x.pth?a=1&access_token={}", "https://host/x.pth?X-Amz-Signature={}"]
)
def test_an_address_with_a_password_is_refused_and_not_repeated(url):
    download = {"url": url.format("canary"), "sha256": "0" * 64}
    with pytest.raises(ConfigError, match=r"segmentors\.unet_tiny\.pretrained\.url: holds a password or token") as caught:
        load_settings(set_key(SMALLEST, ("segmentors", "unet_tiny", "pretrained"), download))
    assert "canary" not in str(caught.value)


def test_a_run_tells_no_secret_and_runs_no_text(tmp_path, monkeypatch):
    """A download that is refused, then one that succeeds by way of another host, scenes, tiles and their sheet."""
    token, password, mark = "hf_CanaryOfTheToken", "CanaryOfTheProxy", "ran"
    text = "MIT; touch ran $(touch ran) `touch ran` ' \" {input} {params.licence} {{ 7*7 }} <script>alert(1)</script>"
    dataset = {"name": "fusu", "licence": text, "about": text, "classes": ["a", "b"], "palette": ["#000000", "#ffffff"]}
    dataset |= {"label_map": {key: key % 2 for key in range(256)}, "tile": {"size": 4}}
    dataset |= {"source": {"kind": "fusu", "root": "data/fusu", "repo": "someone/fusu"}}
    dataset |= {"split": {"by": "group", "group": "scene", "shares": {"train": 2, "reference": 1, "test": 1}}}
    (tmp_path / "fusu.yaml").write_text(yaml.safe_dump(dataset))
    title = {"main": SMALLEST["experiments"]["main"] | {"title": text}}
    config = SMALLEST | {"datasets": ["fusu.yaml"], "scale": "small", "experiments": title, "results": "a folder"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--cores", "1"]
    command += ["--no-hooks"]  # by the published numbers of scenes, tiles of this size would fill any disk
    said = ""
    with serve_hub(Hub(dict(FLAT), "someone/fusu", "dataset"), monkeypatch) as hub:
        secrets = {"HF_TOKEN": token, "HTTPS_PROXY": f"http://me:{password}@127.0.0.1:9", "CLOUD_SECRET_ACCESS_KEY": password}
        secrets["CRFM_TOKEN_HOST"] = "127.0.0.1"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"} | secrets
        for wanted, status in (("another", 1), (token, 0)):
            hub.wanted_token = wanted
            done = subprocess.run(
                [*command, "a folder/fusu/data_sheet"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            said += done.stdout + done.stderr
            assert done.returncode == status and "fetch_dataset" in done.stderr, done.stderr[-3000:]
            log = (tmp_path / "a folder" / "logs" / "fusu" / "fetch_dataset-source.log").read_text()
            assert status == 0 or "refuses the token" in log
    senders = {(host, authorization) for host, _, _, authorization in hub.requests}
    assert senders == {("127.0.0.1", f"Bearer {token}"), ("localhost", None)}, "the host of the large files gets no token"
    written = contents(tmp_path)
    assert json.loads(written["a folder/fusu/source.json"])["revision"] == REVISION and text in said
    assert any(name.startswith(".snakemake/log/") for name in written) and any(name.startswith("a folder/benchmarks/") for name in written)
    assert not [name for name, body in written.items() if b"Canary" in body] and "Canary" not in said
    assert not list(tmp_path.rglob(mark)) and b"<script>alert" not in written["a folder/fusu/data_sheet/index.html"]


def test_the_address_of_the_hub_holds_no_password(tmp_path, monkeypatch):
    from crfm_core.hub import Repository

    monkeypatch.setenv("HF_ENDPOINT", "https://me:canary@hub")
    with pytest.raises(CrfmError, match="HF_ENDPOINT holds a name or password") as caught:
        Repository("someone/data", "main", tmp_path / "data").fetch()
    assert "canary" not in str(caught.value)
