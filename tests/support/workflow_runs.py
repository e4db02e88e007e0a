"""The workflow run as a user runs it, and configurations rewritten for a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from paths import ROOT
from PIL import Image

COMMAND = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the workflow in ``folder``: exit status and everything it said."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def succeed(folder: Path, *arguments: str) -> str:
    status, said = run(folder, *arguments)
    assert status == 0, said[-5000:]
    return said


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Run the workflow beside the test, in a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )


def kill(process: subprocess.Popen) -> None:
    """kill -9 for the workflow and all its jobs, as when a machine goes down."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode} before it was interrupted"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.02)


def planned(said: str) -> dict[str, int]:
    """Rules and numbers of jobs of the (last) table "Job stats"."""
    table = said[said.rindex("Job stats:") :]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE) if name != "total"}


def rules() -> set[str]:
    files = [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]
    return {name for file in files for name in re.findall(r"^\s*rule (\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)}


def rewrite(file: Path, original: Path | None = None, /, **changes: object) -> Path:
    """Set top-level keys of a YAML file, or write it as ``original`` with those keys set."""
    content = yaml.safe_load((original or file).read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(content | changes, sort_keys=False), encoding="utf-8")
    return file


def folder_dataset(small: Path) -> None:
    splits = {name: {"images": f"{name}/images/*.png", "labels": f"{name}/labels/*.png"} for name in ("train", "test", "reference")}
    rewrite(small / "small_world.yaml", source={"kind": "folder", "root": "scenes", "splits": splits}, held_out=None)


def write_scene(path: Path, seed: int, size: int, channels: tuple[int, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 7, (size, size, *channels)).astype(np.uint8)).save(path)
