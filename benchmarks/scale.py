"""The workflow at the scale of FUSU whole with ten synthetic tiles for each real one, by stub jobs: what engine and manifests cost.

    python benchmarks/scale.py [--share 0.05] [--shards 256] [--gpus 64] [--folder DIR]

The Snakefile and its rules are the real ones, in a copy whose scripts are stubs (stub_jobs.py), but for those that handle manifests alone
(:data:`REAL`). ``--share`` is that of the 62,752 tiles, all taken as training tiles; shards and jobs stay as many. Seconds and memory of
the real scripts are those of their processes, with start and imports; those of the engine are its own, without its jobs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from pyarrow.parquet import read_metadata

ROOT = Path(__file__).resolve().parents[1]
TILES, COPIES = 62_752, 10
PAPER = str(ROOT / "configs" / "paper.yaml")
REAL = ("check_splits", "gather_shards", "resample_tiles", "mix_tiles")
STUB = """import sys
sys.path.insert(0, {benchmarks!r})
from stub_jobs import run
run({rule!r}, snakemake)
"""
PEAK = """
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
with open(snakemake.log[0] + ".peak", "w") as target:
    target.write(peak)
"""


@dataclass
class Engine:
    """What a call of the engine took: seconds by the clock and of its own processor time, peak memory in MB; and what it said."""

    seconds: float
    processor: float
    memory: float
    said: str


def call(folder: Path, environment: dict[str, str], snakefile: Path, *arguments: str) -> Engine:
    """Run Snakemake in ``folder``, looking at its process until it ends. Raises SystemExit with what it said when it fails."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), *arguments]
    begun, ticks, memory = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
        proc = Path("/proc") / str(process.pid)
        while process.poll() is None:
            try:
                fields = (proc / "stat").read_text().rpartition(")")[2].split()
                peak = re.search(r"VmHWM:\s+(\d+)", (proc / "status").read_text())
            except OSError:
                break
            ticks, memory = int(fields[11]) + int(fields[12]), max(memory, int(peak[1]) if peak else 0)
            time.sleep(0.1)
        status = process.wait()
        said.seek(0)
        text = said.read()
    if status:
        sys.exit(text[-5000:])
    return Engine(time.perf_counter() - begun, ticks / os.sysconf("SC_CLK_TCK"), memory / 1000, text)


def make_workflow(folder: Path) -> Path:
    """A copy of the workflow with stubs in place of scripts; its Snakefile."""
    for name in ("rules", "configs", "envs", "report", "profiles", "workflow_scripts"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, folder)
    for script in (folder / "workflow_scripts").glob("*.py"):
        if script.stem in REAL:
            script.write_text(script.read_text() + PEAK)
        elif script.stem != "job":
            script.write_text(STUB.format(benchmarks=str(Path(__file__).parent), rule=script.stem))
    return folder / "Snakefile"


def overlay(shards: int) -> dict:
    """What the large run differs in from configs/paper.yaml."""
    many = ("triattention", "crfm", "hardness", "rare")
    return {
        "datasets": ["fusu"],
        "shards": shards,
        "recipes": {name: {"synthetic_per_real": COPIES} for name in many},
        "experiments": {"main": {"recipes": ["real", "real-equal", *many]}},
    }


def jobs_in(said: str) -> int:
    return int(re.findall(r"^total +(\d+)$", said, re.MULTILINE)[-1])


def print_dry_run(name: str, engine: Engine) -> None:
    print(f"{name}: {jobs_in(engine.said)} jobs planned in {engine.seconds:.1f} s, {engine.processor:.1f} s of processor, "
          f"{engine.memory:.0f} MB", flush=True)  # fmt: skip


def print_manifests(results: Path) -> None:
    print("\nmanifest                                                           rows        MB   bytes a row")
    data = results / "fusu"
    first = next(iter(sorted(data.glob("synthetic/*/*/shard-1-of-*.parquet"))))
    paths = [first, *(path for path in sorted(data.rglob("*.parquet")) if not path.name.startswith(("shard-", "scenes")))]
    for path in paths:
        rows, size = read_metadata(path).num_rows, path.stat().st_size
        print(f"{path.relative_to(data)!s:60} {rows:10} {size / 1e6:9.1f} {size / rows:13.0f}")


def print_jobs(results: Path) -> None:
    print("\nreal script, process                                              seconds   peak MB")
    for peak in sorted(results.glob("logs/fusu/*.log.peak")):
        name = peak.name.removesuffix(".log.peak")
        seconds = pd.read_csv(results / "benchmarks" / "fusu" / f"{name}.tsv", sep="\t").s.iloc[0]
        print(f"{name:60} {seconds:12.1f} {int(peak.read_text()) / 1000:9.0f}")


def print_folders(results: Path, most: int = 8) -> None:
    """The folders with the most files."""
    counts = Counter({folder: len(files) for folder, _, files in os.walk(results)})
    print("\nfiles in one folder, the most")
    for path, count in counts.most_common(most):
        print(f"{count:10} {Path(path).relative_to(results)}")


def prepare(folder: Path, tiles: int, shards: int) -> tuple[Path, Path, dict[str, str]]:
    """The Snakefile of the copy, the folder to run it in, which holds the overlay large.yaml, and the environment to run it with."""
    snakefile, work = make_workflow(folder / "workflow"), folder / "work"
    work.mkdir()
    (work / "large.yaml").write_text(yaml.safe_dump(overlay(shards)))
    return snakefile, work, os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SCALE_TILES": str(tiles)}


def main(share: float, shards: int, gpus: int, folder: Path) -> None:
    snakefile, work, environment = prepare(folder, max(64, round(share * TILES)), shards)
    slots = ["--cores", str(8 * gpus), "--resources", f"gpu={gpus}", "--no-hooks"]
    large = [PAPER, "large.yaml"]

    quiet = ["--dry-run", "--quiet", "reason"]
    print_dry_run("paper.yaml", call(work, environment, snakefile, "--cores", "1", "--configfile", PAPER, *quiet))
    tables = ["--config", "tables=all"]
    print_dry_run("paper.yaml, all tables", call(work, environment, snakefile, "--cores", "1", "--configfile", PAPER, *tables, *quiet))
    print_dry_run("large", call(work, environment, snakefile, *slots, "--configfile", *large, *quiet))

    began = time.time()
    done = call(work, environment, snakefile, *slots, "--configfile", *large)
    jobs, results = jobs_in(done.said), work / "results" / "paper"
    each = 1000 * done.processor / jobs
    print(f"large, run: {jobs} jobs in {done.seconds:.0f} s; engine {done.processor:.1f} s, {each:.0f} ms a job, {done.memory:.0f} MB")
    for gathered in sorted(results.glob("fusu/synthetic/*/*/all.parquet")):
        last = max(path.stat().st_ctime for path in gathered.parent.glob("shard-*.parquet"))  # of being handed over
        after = gathered.stat().st_mtime - last
        print(f"  {gathered.parent.name}: {last - began:.0f} s to the last shard, gathered {after:.1f} s after it")
    print_manifests(results)
    print_jobs(results)
    print_folders(results)
    again = call(work, environment, snakefile, *slots, "--configfile", *large, "--dry-run")
    assert "Nothing to be done" in again.said, again.said[-2000:]
    summary = call(work, environment, snakefile, *slots, "--configfile", *large, "--summary")
    print(f"\nnothing left to be done, found in {again.seconds:.1f} s, {again.processor:.1f} s of processor, {again.memory:.0f} MB")
    print(f"--summary, which plan asks: {summary.seconds:.1f} s, {summary.processor:.1f} s of processor")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the tiles")
    parser.add_argument("--shards", type=int, default=256)
    parser.add_argument("--gpus", type=int, default=64, help="as the engine is told; none is used")
    parser.add_argument("--folder", type=Path, help="kept afterwards; by default a temporary one")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(chosen.share, chosen.shards, chosen.gpus, (chosen.folder or Path(temporary)).resolve())
