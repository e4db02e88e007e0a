"""The package's order, its independence of the workflow engine, and the workflow's thin scripts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from crfm_core import ROOMS

PACKAGE = ROOT / "crfm_core"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = {path.stem: path for path in (ROOT / "workflow_scripts").glob("*.py") if path.stem != "job"}


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> set[str]:
    """Rooms of the package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide which room is meant"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inner = {name.split(".")[1] for name in found if name.startswith("crfm_core.")}
    return {name for name in inner if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rooms_before_its_own(module):
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    assert imported_rooms(module) <= set(allowed)


def test_every_room_is_there_and_every_module_is_in_one():
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def test_the_package_does_not_know_the_workflow_engine():
    engine = "snake" + "make"
    assert [str(path) for path in PACKAGE.rglob("*") if path.suffix == ".py" and engine in path.read_text(encoding="utf-8").lower()] == []


def test_weights_are_never_read_in_a_way_that_runs_code():
    careless, others = "weights_only=" + "False", ("workflow_scripts", "benchmarks", "tests")
    readers = [path for room in (PACKAGE.name, *others) for path in (PACKAGE.parent / room).rglob("*.py")]
    assert [path.name for path in readers if careless in path.read_text(encoding="utf-8")] == ["hostile.py"]
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*import pickle|\bpickle\.loads?\(", text, re.MULTILINE), path
        assert len(re.findall(r"torch\.load\(", text)) == len(re.findall(r"torch\.load\([^\n]*weights_only=True", text)), path


WITHOUT_NETWORKS = [
    "settings",
    "files",
    "manifest",
    "devices",
    "data.tiling",
    "data.adapters",
    "curation.mixing",
    "curation.resampling",
    "reporting.page",
]


@pytest.mark.parametrize("module", WITHOUT_NETWORKS)
def test_what_needs_no_networks_does_not_import_them(module):
    program = f"import sys, crfm_core.{module}; print([name for name in ('torch', 'diffusers', 'mmseg') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_every_rule_has_its_script_and_every_script_its_rule():
    rules = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "rules").glob("*.smk")))
    pairs = re.findall(r"\brule (\w+):(?:(?!\brule ).)*?\bscript:\s+\"\.\./workflow_scripts/(\w+)\.py\"", rules, re.DOTALL)
    assert len(pairs) == len(re.findall(r"^\s*rule \w+:", rules, re.MULTILINE)) > 15
    assert [rule for rule, script in pairs if rule != script] == []
    assert {script for _, script in pairs} == set(SCRIPTS)


@pytest.mark.parametrize("script", sorted(SCRIPTS.values()), ids=lambda path: path.stem)
def test_a_script_is_short_says_what_goes_in_and_out_and_logs(script):
    text = script.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(tree).endswith(" out.")
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "ImportFrom", "With"] and text.count("with job(snakemake):") == 1
