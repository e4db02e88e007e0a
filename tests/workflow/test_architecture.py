"""The package's order, its independence of the workflow engine, and the workflow's thin scripts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

from crfm_core import ROOMS
from crfm_core.layout import KINDS

PACKAGE = ROOT / "crfm_core"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
RULES = [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))]
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


#: Names that every module of a registry has; elsewhere a name stands for one thing.
SHARED_NAMES = {
    "models/schemes": {"BLOCK", "NETWORK"},
    "segmentor/critic": {"READS", "recognises", "critic_of"},
    "layouts": {"draw"},
    "curation/filters": {"apply"},
    "curation/resampling": {"REMEDY", "choose"},
    "reporting/sections": {"TITLE", "show", "show_dataset"},
}


def test_no_two_public_things_of_the_package_have_one_name():
    found: dict[str, list[str]] = {}
    for path in MODULES:
        folder = path.relative_to(PACKAGE).parent.as_posix()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names = {target.id for target in targets if isinstance(target, ast.Name)} | {getattr(node, "name", "_")}
            for name in names - SHARED_NAMES.get(folder, set()):
                if not name.startswith("_"):
                    found.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def module_name(path: Path) -> str:
    """The dotted name of a module or package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_two_modules_import_each_other_not_even_inside_functions_or_by_way_of_others():
    names = {module_name(path): path for path in MODULES}
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {member if member in names else node.module for member in members}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        imports[name] = (found & names.keys()) - {name}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_only_one_place_knows_the_libraries_of_mmsegmentation():
    own = PACKAGE / "segmentor" / "mmseg"
    known = re.compile(r"^\s*(from|import) (mmengine|mmcv|mmseg)\b", re.MULTILINE)
    users = [path for path in MODULES if known.search(path.read_text(encoding="utf-8"))]
    assert users and [path for path in users if not path.is_relative_to(own)] == []


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


def code_of(file: Path) -> str:
    """A file's text without comments and, in Python, docstrings, which may say where results lie."""
    text = re.sub(r"^ *#.*", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if file.suffix == ".py":
        said = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        for docstring in [ast.get_source_segment(text, node) for node in said]:
            text = text.replace(docstring, "")
    return text


def test_one_module_alone_knows_where_results_lie():
    """It alone counts the parts of paths and spells the folders of results."""
    folders = "|".join({part for kind in KINDS.values() for part in kind.pattern.split("/")[:-1] if "{" not in part})
    counts = re.compile(r"\.parents\[|\.parts\[|\.parent\.parent")
    for file in [path for path in MODULES if path.name != "layout.py"] + [*SCRIPTS.values(), *RULES]:
        text = code_of(file)
        assert not counts.search(text), f"{file} counts the parts of a path"
        assert not re.search(rf'/ f?"({folders})["/]|/({folders})/', text), f"{file} spells a folder of results"


@pytest.mark.parametrize(("files", "most"), [(MODULES, 450), (RULES, 220)], ids=["package", "rules"])
def test_no_file_is_long(files, most):
    assert [str(path) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > most] == []


def test_no_module_of_tests_imports_from_another():
    modules = sorted((ROOT / "tests").rglob("*.py"))
    assert [path.name for path in modules if re.search(r"^\s*(from|import) test_", path.read_text(encoding="utf-8"), re.MULTILINE)] == []


WITHOUT_NETWORKS = [
    "settings",
    "files",
    "layout",
    "manifest",
    "devices",
    "data.tiling",
    "data.scenes",
    "layouts",
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
