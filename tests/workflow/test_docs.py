"""What README and docs say is true: commands plan, Python runs, links lead somewhere, messages and files are there."""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import shlex
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from engine import plan
from paths import ROOT
from segmentor_tiles import write_tiles
from snakemake.cli import parse_args, parse_config
from tiny_models import tiny_pipeline, tiny_transformer

from crfm_core.segmentor.mmseg.architectures import ARCHITECTURES
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.settings import PRESETS, SCHEMES, AnyFilter, AnyLayouts, AnyResampling, Captions, Section, load_settings, merge_layers

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *PAGES]
CODE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE = "configuration.md"  # generated; a test of the settings holds it in step

#: Commands in ``bash`` blocks that need no look: what they name is looked at elsewhere, or is not of this project.
OTHERS = ("make", "export", ".", "tensorboard", "python")

by_name = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of these languages, in their order."""
    return [(language, body) for language, body in CODE.findall(path.read_text(encoding="utf-8")) if language in languages]


def prose(path: Path) -> str:
    return CODE.sub("", path.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------- text


def test_the_readme_fits_on_a_screen_or_two():
    assert (ROOT / "README.md").stat().st_size <= 6000


def test_every_page_is_in_the_navigation():
    content = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = [name for section in content["nav"] for entries in section.values() for entry in entries for name in entry.values()]
    assert sorted(named) == [page.name for page in PAGES]


@by_name
def test_every_block_says_its_language(path):
    assert {language for language, _ in CODE.findall(path.read_text(encoding="utf-8"))} <= {"bash", "python", "yaml", "text"}


def anchors(path: Path) -> set[str]:
    """Of the headings, as the usual viewers of Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@by_name
def test_links_lead_to_files_and_headings_that_are_there(path):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), target
        assert file.is_relative_to(DOCS) or not path.is_relative_to(DOCS), f"{target}: the built pages do not have it"
        assert not anchor or anchor in anchors(file), target


@by_name
def test_files_that_are_named_are_there(path):
    """Those in code spans and commands that begin with a folder of the project."""
    folders = "crfm_core|configs|docs|benchmarks|rules|workflow_scripts|tests|profiles|envs|report|models/embedded"
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]*)", path.read_text(encoding="utf-8")):
        assert list(ROOT.glob(name.rstrip("./"))) or "NAME" in name, name


@by_name
def test_targets_of_make_are_there(path):
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in commands(path)]
    named = re.findall(r"`make ([\w-]+)`", prose(path)) + [one[1] for one in words if one[0] == "make"]
    assert set(named) <= set(known)


def kinds_of(*models: type[Section]) -> list[str]:
    """The values that ``kind`` of these sections takes."""
    return [kind for model in models for kind in get_args(model.model_fields["kind"].annotation)]


#: Pages with a table of the kinds that the configuration names, and their names.
KINDS_ON_PAGES = {
    "training.md": [*SCHEMES],
    "sampling.md": [*PRESETS, *kinds_of(*get_args(get_args(AnyLayouts)[0]))],
    "method.md": [*PRESETS],
    "segmentors.md": [*ARCHITECTURES],
    "curation.md": kinds_of(*get_args(get_args(AnyFilter)[0]), *get_args(get_args(AnyResampling)[0])),
    "your-data.md": kinds_of(Captions),
}


@pytest.mark.parametrize("page", KINDS_ON_PAGES)
def test_a_table_of_kinds_names_every_kind_there_is(page):
    cells = " ".join(line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    assert set(KINDS_ON_PAGES[page]) <= set(re.findall(r"`([\w-]+)`", cells))


@functools.cache
def sources() -> str:
    """All texts of the package and the rules, each as it is written, what is filled in left out."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "rules").glob("*.smk")]
    for path in (ROOT / "crfm_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("\0".join(str(part.value) if isinstance(part, ast.Constant) else "" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """The first column; … stands for what is filled in."""
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 30
    for message in rows:
        for part in re.split(r"\s*…\s*", message):
            assert part in sources() or len(part) < 4, f"{part!r} of {message!r}"


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass
class Runs:
    """Commands of the engine that read the same configuration: what they want is planned at once."""

    targets: set[str] = field(default_factory=set)
    forced: set[str] = field(default_factory=set)


def commands(path: Path) -> list[str]:
    """The lines of the page's ``bash`` blocks, continued ones as one, comments left out."""
    lines = [line for _, body in blocks(path, "bash") for line in body.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def write_files(path: Path, folder: Path) -> None:
    """Do what the page does to files, in its order: blocks of YAML that begin with a name, ``cp`` and ``printf``."""
    for language, body in blocks(path, "bash", "yaml"):
        if language == "yaml" and (name := re.match(r"# ([\w.-]+\.yaml)\n", body)):
            (folder / name[1]).write_text(body)
        for line in body.replace("\\\n", " ").splitlines() if language == "bash" else ():
            if shlex.split(line, comments=True)[:1] in (["cp"], ["printf"]):
                subprocess.run(["bash", "-c", line], cwd=folder, check=True)


@by_name
def test_commands_are_of_a_kind_that_is_looked_at(path):
    for line in commands(path):
        words = shlex.split(line, comments=True)
        assert words[0] in ("snakemake", "cp", "printf", *OTHERS) or re.match(r"\w+=\w* python ", line), line


def test_every_command_of_the_engine_plans_what_it_names(tmp_path):
    """In-process, without running anything: its options, its configuration and its targets are known."""
    runs: dict[tuple, Runs] = defaultdict(Runs)
    for path in TEXTS:
        folder = tmp_path / path.relative_to(ROOT).as_posix().replace("/", "-")
        folder.mkdir()
        for name in ("config.yaml", "configs", "profiles"):
            (folder / name).symlink_to(ROOT / name)
        write_files(path, folder)
        for line in [*commands(path), *re.findall(r"`(snakemake [^`]+)`", prose(path))]:
            words = shlex.split(os.path.expandvars(line), comments=True)
            if words[0] != "snakemake" or "--lint" in words:
                continue
            with contextlib.chdir(folder):
                _, options = parse_args(words[1:])
            files = [Path(file) for file in options.configfile or ["config.yaml"]]
            own = any(file.parent == Path() and file.name != "config.yaml" for file in files)
            key = (folder if own else tmp_path / "README.md", tuple(files), tuple(options.config or ()))
            runs[key].targets |= set(options.targets or ["all"])
            for target in options.targets or ():  # of a training that goes on
                if state := re.fullmatch(r"(results/\w+)/validation/(\w+)/step-(\d+)\.png", target):
                    checkpoint = key[0] / state[1] / "generators" / f"{state[2]}.unfinished" / f"checkpoint-{state[3]}.pt"
                    checkpoint.parent.mkdir(parents=True)
                    checkpoint.touch()
            runs[key].forced |= set(options.forcerun or ())
    assert len(runs) > 5
    for (folder, files, overrides), wanted in runs.items():
        dag = plan(folder, files, wanted.targets, overrides=parse_config(list(overrides)), forcerun=wanted.forced)
        made = {str(output) for job in dag.jobs for output in job.output} | {job.rule.name for job in dag.jobs}
        assert wanted.targets <= made, wanted.targets - made


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks(path, "yaml")], ids=lambda path: path.name)
def test_pieces_of_configuration_go_over_the_default(path):
    """Blocks without a file's name; those with one are read by the commands that name them."""
    default = yaml.safe_load((ROOT / "config.yaml").read_text())
    for _, body in blocks(path, "yaml"):
        content = yaml.safe_load(body)
        if body.startswith("# ") or not set(content) <= set(default):
            continue
        default, _ = merge_layers([default, content])
    load_settings(default)


# --------------------------------------------------------------------------------------------------------------- python


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what the examples read: a generator, a segmentor, tiles."""
    folder = tmp_path_factory.mktemp("python")
    embedded = folder / "results" / "embedded"
    tiny_pipeline(text=True, transformer=tiny_transformer(pos_embed_max_size=32)).save_pretrained(embedded / "generators" / "triattention")
    network = build_model("segformer_tiny", 7)
    checkpoint = embedded / "segmentors" / "real" / "segformer_tiny" / "seed0" / "checkpoint.pth"
    checkpoint.parent.mkdir(parents=True)
    classes = [f"class {index}" for index in range(7)]
    meta = {"segmentor": {"architecture": "segformer_tiny"}, "classes": classes}
    torch.save({"state_dict": network.state_dict(), "meta": meta}, checkpoint)
    write_tiles(embedded / "tiles" / "train.parquet", count=2)
    return folder


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks(path, "python")], ids=lambda path: path.name)
def test_examples_in_python_run(path, results, monkeypatch):
    monkeypatch.chdir(results)
    names: dict[str, object] = {}
    for number, (_, body) in enumerate(blocks(path, "python"), 1):
        exec(compile(body, f"{path.name}, block {number}", "exec"), names)
