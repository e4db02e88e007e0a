"""What can befall a run, for every rule: its job killed, its newest file cut short, the disk full, an input gone, a manifest's row broken.

Each cell of the table takes a finished run at the smallest scale, removes what one job of the rule made, lets the fault happen while or
before the job runs, follows what the message asks for if there is one, runs again, and compares every file with the undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from fault_cases import CASES, DATASET, WITHOUT_FILES, Case
from loopback_files import FLAT, REPO, Server, archive_bytes
from loopback_files import dataset as published
from loopback_hub import REVISION, Hub, contents
from paths import CONFIGS, ROOT
from PIL import Image
from workflow_runs import rewrite, rules

#: Files that differ between two undisturbed runs and are not compared: what was said, how long it took, and the engine's own notes.
NOT_COMPARED = ("logs", "benchmarks", ".snakemake")
#: Seconds in which a run has ended, however slow the machine: that of all jobs takes minutes.
PATIENCE = 1800
PAGE = 4096


# --------------------------------------------------------------------------------------------------------- undisturbed runs


class Place:
    """The folder in which all runs happen, the same for all as some files hold its name; what undisturbed runs made there; servers."""

    def __init__(self, base: Path) -> None:
        self.folder, self.finished = base / "work", base / "finished"
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.environment |= {"NO_PROXY": "127.0.0.1,localhost"}
        self.hubs: dict[str, str] = {}

    def command(self, case: Case) -> list[str]:
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", "--latency-wait", "1"]
        return [*command, "--configfile", case.config, "--", *case.targets]

    def start(self, case: Case, prefix: list[str] | None = None) -> subprocess.Popen:
        environment = self.environment | ({"HF_ENDPOINT": self.hubs[case.hub]} if case.hub else {})
        return subprocess.Popen(
            [*(prefix or []), *self.command(case)],
            cwd=self.folder,
            env=environment,
            start_new_session=True,
            stdout=(self.folder.parent / "said").open("wb"),
            stderr=subprocess.STDOUT,
        )

    def run(self, case: Case, prefix: list[str] | None = None) -> tuple[int, str]:
        """Exit status and everything that was said, failed jobs' logs too."""
        status = self.start(case, prefix).wait(PATIENCE)
        return status, self.said()

    def said(self) -> str:
        """What the latest run has said."""
        return (self.folder.parent / "said").read_text(errors="replace")

    def prepare(self, case: Case) -> None:
        """The finished run without what the case's job made."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.finished, self.folder, symlinks=True)
        for path in self.made_by(case, self.folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @staticmethod
    def made_by(case: Case, folder: Path) -> list[Path]:
        return [*case.beside(folder), *(folder / target for target in case.targets)]

    def files(self, folder: Path) -> dict[str, Path]:
        found = {}
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name not in NOT_COMPARED]
            found |= {str((Path(parent) / name).relative_to(folder)): Path(parent) / name for name in names}
        return found

    def differences(self) -> list[str]:
        """Files that the undisturbed run does not have, or has otherwise, and those that are gone."""
        now, then = self.files(self.folder), self.files(self.finished)
        changed = [name for name in now.keys() & then.keys() if content_of(now[name]) != content_of(then[name])]
        other = [f"{'new' if name in now else 'gone'}: {name}" for name in now.keys() ^ then.keys()]
        return sorted([*(f"differs: {name}" for name in changed), *other])

    def seconds(self, case: Case) -> float:
        """How long the job took undisturbed."""
        return max(float(pd.read_csv(path, sep="\t").s.iloc[0]) for path in self.finished.rglob(f"{case.rule}*.tsv"))


#: What a report tells of when it was written and how long its run took.
TIMES = re.compile(
    rb'written [\d: -]+ UTC|[\d.]+ CPU-hours<|<ul><li>\d+ jobs took .*?</ul>|<h3>Time</h3>.*?</section>|"n took">[\d.]+'
    rb'|"seconds_per_image": [^,]+',
    re.DOTALL,
)


def content_of(path: Path) -> bytes:
    """What a file holds, a report or a comparison without the times that it tells."""
    told = path.name == "report.html" or path.parent.name == "comparison"
    return TIMES.sub(b"", path.read_bytes()) if told else path.read_bytes()


def write_loveda(folder: Path) -> None:
    """A copy of the dataset with its official test images, as a user has it."""
    rng = np.random.default_rng(0)
    for number, (part, area) in enumerate(itertools.product(("Train", "Val", "Test"), ("Urban", "Rural"))):
        for kind, shape, top in (("images_png", (64, 64, 3), 256), ("masks_png", (64, 64), 8)):
            if part != "Test" or kind == "images_png":
                path = folder / part / area / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, top, shape).astype(np.uint8)).save(path)


def write_configurations(folder: Path, weights: str) -> None:
    """The smallest run with some more of everything, and the same with models and datasets from elsewhere."""
    for file in CONFIGS.iterdir():
        shutil.copy(file, folder)
    smallest = yaml.safe_load((folder / "smallest.yaml").read_text())
    base = smallest["base_model"] | {"vae": smallest["base_model"]["vae"] | {"steps": 110}}  # there is a checkpoint after 100
    filters = smallest["filters"] | {"best": {"kind": "agreement", "keep": 0.5}}
    common = {"disk_gb": 1e-12}
    more = {"base_model": base, "filters": filters, "resamplings": {"hard": {"kind": "hardness"}}}
    more["layouts"] = {"rich": {"kind": "augmented"}}
    small = yaml.safe_load((folder / "small_world.yaml").read_text())
    rewrite(folder / "faults_world.yaml", folder / "small_world.yaml", source=small["source"] | {"unlabelled": 1})
    more["datasets"] = ["faults_world.yaml"]
    rewrite(folder / "faults.yaml", folder / "smallest.yaml", **more, **common)
    rewrite(folder / "given.yaml", folder / "smallest.yaml", base_model={"kind": "folder", "path": "given"}, **common)
    fixed = {"revision": REVISION}
    pretrained = {"url": f"{weights}/backbone.pth", "sha256": hashlib.sha256(BACKBONE).hexdigest(), "path": "models/backbone.pth"}
    segmentors = smallest["segmentors"] | {"segformer_tiny": smallest["segmentors"]["segformer_tiny"] | {"pretrained": pretrained}}
    rewrite(
        folder / "fetched.yaml",
        folder / "smallest.yaml",
        results="fetched",
        base_model=fixed | {"kind": "hub", "repo": "someone/sd3", "path": "models/sd3"},
        captions={"kind": "vlm", "model": fixed | {"repo": "someone/llava", "path": "models/llava"}},
        clip=fixed | {"repo": "someone/clip", "path": "models/clip"},
        segmentors=segmentors,
        **common,
    )
    reference, unsplit = (smallest["recipes"] | {"reference": {"split": split}} for split in ("val", None))
    fusu = published("fusu", repo=REPO).model_dump(mode="json", exclude_defaults=True)
    fusu["split"] = {"by": "group", "group": "scene", "shares": {"train": 2, "val": 1, "test": 1}}
    (folder / "fusu_data.yaml").write_text(yaml.safe_dump(fusu))
    rewrite(folder / "fusu.yaml", folder / "smallest.yaml", results="fetched", datasets=["fusu_data.yaml"], recipes=reference, **common)
    rewrite(folder / "loveda_data.yaml", ROOT / "configs" / "datasets" / "loveda.yaml", tile={"size": 32})
    rewrite(folder / "loveda.yaml", folder / "smallest.yaml", results="loveda", datasets=["loveda_data.yaml"], recipes=unsplit, **common)


BACKBONE = np.random.default_rng(1).bytes(200_000)


def serve(server: Server | Hub) -> Server | Hub:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def run_undisturbed(base: Path) -> Place:
    """Run every case's job once, with all that it needs."""
    place = Place(base)
    place.folder.mkdir(exist_ok=True)
    files = serve(Server())
    files.files = {"/backbone.pth": BACKBONE}
    write_configurations(place.folder, files.url)
    write_loveda(place.folder / "data" / "LoveDA")
    everything = Case("all", ("all", *(target for case in CASES if case.config == "faults.yaml" for target in case.targets)))
    succeed(place, everything)
    shutil.copytree(
        place.folder / DATASET / "base_model", place.folder / "given", ignore=shutil.ignore_patterns(".snakemake*"), dirs_exist_ok=True
    )
    place.hubs = serve_hubs(place.folder, base)
    for case in CASES:
        if case.config != "faults.yaml":
            succeed(place, case)
    shutil.copytree(place.folder, place.finished, symlinks=True)
    return place


def serve_hubs(folder: Path, base: Path) -> dict[str, str]:
    """Addresses of hubs of one repository each, by the names that cases know them by."""
    from tiny_captioners import write_llava  # slow to import
    from tiny_clip import write_clip

    hubs = {
        "base": Hub(contents(folder / "given"), "someone/sd3"),
        "llava": Hub(contents(write_llava(base / "llava")), "someone/llava"),
        "clip": Hub(contents(write_clip(base / "clip")), "someone/clip"),
        "fusu": Hub({"FUSU.zip": archive_bytes(base / "FUSU.zip", FLAT), "README.md": b"Read me."}, REPO, "dataset"),
    }
    return {name: serve(hub).endpoint for name, hub in hubs.items()}


def succeed(place: Place, case: Case) -> None:
    status, said = place.run(case)
    assert status == 0, said[-5000:]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return run_undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def outcomes(request) -> Iterator[list[tuple[str, str, str]]]:
    """What became of each cell: rule, fault, and how it was survived. At the end they are shown as a table."""
    found: list[tuple[str, str, str]] = []
    yield found
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.ensure_newline()
    for line in table_of(found):
        reporter.write_line(line)


def table_of(outcomes: list[tuple[str, str, str]]) -> list[str]:
    """A table in Markdown, a row per rule and a column per fault, and the counts."""
    cells = {(rule, fault): how for rule, fault, how in outcomes}
    lines = [f"| rule | {' | '.join(FAULTS)} |", "|---" * (len(FAULTS) + 1) + "|"]
    for case in CASES:
        if any((case.rule, fault) in cells for fault in FAULTS):
            lines.append(f"| `{case.rule}` | {' | '.join(cells.get((case.rule, fault), '–') for fault in FAULTS)} |")
    counts = Counter(how for _, _, how in outcomes)
    return [*lines, "", f"{len(outcomes)} faults survived: " + ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))]


# ------------------------------------------------------------------------------------------------------------------ faults


def rng_of(case: Case, fault: str) -> random.Random:
    return random.Random(f"{case.rule} {fault}")


def job_of(process: subprocess.Popen) -> psutil.Process | None:
    """The process of the rule's script, once it runs; None when the run has ended."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                if any(".snakemake/scripts/" in part and part.endswith(".py") for part in child.cmdline()) and "python" in child.name():
                    return child
        time.sleep(0.01)
    return None


def end_of(process: subprocess.Popen) -> int:
    try:
        return process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def killed(place: Place, case: Case) -> str:
    """kill -9 for the job and its children, at a random moment; the workflow lives on."""
    moment = place.seconds(case) * rng_of(case, "killed").uniform(0.05, 0.95)
    while True:
        place.prepare(case)
        process = place.start(case)
        job = job_of(process)
        time.sleep(moment)
        try:
            family = [job, *job.children(recursive=True)]
            for member in family:
                member.kill()
        except (psutil.Error, AttributeError):
            end_of(process)
            moment *= 0.6  # it had ended
            continue
        if end_of(process) == 0:
            return "by itself"
        succeed(place, case)
        return "rerun"


def newest_of(place: Place, since: int) -> Path | None:
    """The newest file with content that was written after ``since``, in nanoseconds."""
    found = []
    for path in place.files(place.folder).values():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if status.st_mtime_ns > since and status.st_size:
                found.append((status.st_mtime_ns, path))
    return max(found)[1] if found else None


def truncated(place: Place, case: Case) -> str:
    """kill -9 for the whole run at a random moment, or at the first one after it at which the job has a file; that is cut to half."""
    moment = place.seconds(case) * rng_of(case, "truncated").uniform(0.05, 0.95)
    while True:
        place.prepare(case)
        since = time.time_ns()
        process = place.start(case)
        job_of(process)
        time.sleep(moment)
        while (newest := newest_of(place, since)) is None and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is not None:
            moment *= 0.6  # it had ended
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        if (newest := newest_of(place, since)) is None:
            continue
        if not any((place.folder / ".snakemake" / "incomplete").iterdir()):
            moment *= 0.6  # it had ended, and only the workflow had not
            continue
        os.truncate(newest, newest.stat().st_size // 2)
        succeed(place, case)
        return "rerun"


class SmallDisk:
    """A file system in memory at a folder, in a namespace of its own that ends with this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = f"mount -t tmpfs -o size=64m tmpfs '{folder}' && echo ready && exec cat"
        self.holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "ready\n":
            pytest.skip("this user may not mount a file system")
        self.prefix = ["nsenter", "--user", "--mount", "--preserve-credentials", f"--target={self.holder.pid}"]
        self.prefix += ["sh", "-c", f'cd "{folder.parent}" && exec "$@"', "sh"]
        self.seen = Path(f"/proc/{self.holder.pid}/root{folder}")

    def leave(self, free: int) -> None:
        """Fill it but for ``free`` bytes."""
        with (self.seen / "filler").open("wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while filler.write(bytes(1 << 20)):
                    pass
            with contextlib.suppress(OSError):
                while filler.write(bytes(PAGE)):
                    pass
            filler.truncate(filler.tell() // PAGE * PAGE - free)

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()


def disk_full(place: Place, case: Case) -> str:
    """The disk fills while the job runs: half of what it writes finds room, or nothing where that is little. Then there is room again."""
    free = pages_of(place, case) // 2
    while not _survives_full_disk(place, case, free * PAGE):
        assert free, "files were written though there was no room"
        free //= 2  # some of its files are links to others
    return "rerun"


def _survives_full_disk(place: Place, case: Case, free: int) -> bool:
    """Whether the job found less than ``free`` bytes of room too little, and the next run, with more of it, made what it should."""
    place.prepare(case)
    root, aside = place.folder / case.disk, place.folder.parent / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(root / "logs", ignore_errors=True)  # room that would be free again
    root.rename(aside)
    root.mkdir()
    disk = SmallDisk(root)
    try:
        shutil.copytree(aside, disk.seen, symlinks=True, dirs_exist_ok=True)
        process = place.start(case, disk.prefix)
        job_of(process)
        disk.leave(free)
        if end_of(process) == 0:
            return False
        said = place.said()
        assert re.search(r"error: (\S+: )?\S*[/.]\S*: .*free some space", said), said[-5000:]
        assert "Traceback" not in said, said[-5000:]
        seen = [disk.seen.parent / target if target.startswith(case.disk) else place.folder / target for target in case.targets]
        assert not any(path.exists() for path in seen), "something was left"
        (disk.seen / "filler").unlink()
        status, said = place.run(case, disk.prefix)
        assert status == 0, said[-5000:]
        shutil.rmtree(aside)
        shutil.copytree(disk.seen, aside, symlinks=True)
    finally:
        disk.close()
        root.rmdir()
        aside.rename(root)
    return True


def pages_of(place: Place, case: Case) -> int:
    """How much room the job's files take on the disk that is filled, as if none were a link."""
    made = Place.made_by(case, place.finished)
    files = {file for path in made for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    return sum(-(-file.stat().st_size // PAGE) for file in files if file.is_relative_to(place.finished / case.disk))


def input_removed(place: Place, case: Case) -> str:
    """One of the job's inputs is gone: made again where a rule makes it, refused by its name where it is the user's."""
    place.prepare(case)
    if case.inputs:
        gone = place.folder / rng_of(case, "input removed").choice(case.inputs)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        succeed(place, case)
        return "by itself"
    kept = (place.folder / case.own).read_bytes()
    (place.folder / case.own).unlink()
    status, said = place.run(case)
    assert status and Path(case.own).name in said and "Traceback" not in said, said[-5000:]
    (place.folder / case.own).write_bytes(kept)
    succeed(place, case)
    return "by the message"


def row_broken(place: Place, case: Case) -> str:
    """A row of a manifest is wrong: refused by file and row, and what the message says to delete is made again."""
    rng = rng_of(case, "row broken")
    place.prepare(case)
    manifest = place.folder / case.manifest
    table, way = pd.read_parquet(manifest), rng.choice(case.ways)
    of_one_scene = [number for number, scene in enumerate(table.scene) if scene in case.targets[0]]
    number = rng.choice(of_one_scene or range(len(table))[: case.rows])
    value = {"outside": "../../../../etc/passwd", "nothing": "images/nothing.tif", "no path": None, "classes": [99]}[way]
    column = {"no path": "label", "classes": "classes"}.get(way, case.column)
    table.at[number, column] = value
    table.to_parquet(manifest, index=False)
    row = table.get("tile_id", table.get("scene"))[number]
    before, refused = place.files(place.folder), 0
    for _ in range(5):  # of a file that is gone each stage on the way back to the one that made it may have something to say
        status, said = place.run(case)
        if status == 0:
            break
        refused += 1
        assert "Traceback" not in said, said[-5000:]
        assert re.search(rf"{re.escape(str(case.manifest))}: row {re.escape(row)}: ", said), said[-5000:]
        assert place.files(place.folder).keys() <= before.keys(), "something was written"
        (remedy,) = set(re.findall(r"delete (\S+) and run the workflow again", said))
        (place.folder / remedy).unlink()
    assert status == 0 and refused and said.count("row") < 50, said[-5000:]
    return f"by the message ({way})"


FAULTS = {"killed": killed, "truncated": truncated, "disk full": disk_full, "input removed": input_removed, "row broken": row_broken}

#: Cells that cannot be, with the reason.
IMPOSSIBLE = {
    **{(case.rule, "row broken"): "it reads no manifest" for case in CASES if not case.manifest},
    **{(case.rule, "input removed"): "it has no input" for case in CASES if not (case.inputs or case.own)},
}
CELLS = [(case, fault) for case in CASES for fault in FAULTS if (case.rule, fault) not in IMPOSSIBLE]


def test_every_rule_that_makes_files_has_its_row_in_the_table():
    assert {case.rule.partition("-")[0] for case in CASES} == rules() - WITHOUT_FILES


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)  # the first waits for the undisturbed runs
@pytest.mark.parametrize(("case", "fault"), CELLS, ids=[f"{case.rule}-{fault.replace(' ', '_')}" for case, fault in CELLS])
def test_a_fault_is_survived_and_nothing_is_lost(place, outcomes, record_property, case, fault):
    how = FAULTS[fault](place, case)
    assert place.differences() == []
    record_property("survived", how)
    outcomes.append((case.rule, fault, how))
