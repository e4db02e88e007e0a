"""What several test modules read and none changes; and which tests may be left out in CI."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from paths import CONFIGS

#: Reasons of the skips that CI accepts, and why each is no loss there. Any other skip fails the run.
ACCEPTED_SKIPS = {
    "needs real imagery in .*": "the imagery is not part of the project; where it lies beside the checkout, these tests run",
    "torch here is built with CUDA": "the test is of the CPU build; CI has it",
    "this machine has a GPU": "the test is of a machine without one; CI has none",
    "the full mmcv is installed": "the test is of mmcv-lite, which the requirements install",
    "the software is there": "the test is of what is said without torchvision, which the requirements leave out",
    "(no file system may be mounted here|this user may not mount a file system)": "full disks need the right to mount; CI runs as root",
}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A :class:`tiny_world.World`, built once: a few seconds, most of them for imports."""
    from tiny_world import build_world

    return build_world(tmp_path_factory.mktemp("world") / "d")


@pytest.fixture
def small(tmp_path):
    """A working folder with the smallest configuration."""
    for file in CONFIGS.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """A :class:`loopback_files.Server` that answers."""
    from loopback_files import serve_files

    with serve_files(monkeypatch) as server:
        yield server


def pytest_terminal_summary(terminalreporter, config):
    """List the skips with their reasons; in CI, fail for one that :data:`ACCEPTED_SKIPS` does not know."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    unknown = []
    for reason, count in sorted(reasons.items()):
        accepted = next((why for pattern, why in ACCEPTED_SKIPS.items() if re.fullmatch(pattern, reason)), None)
        terminalreporter.write_line(f"{count} skipped: {reason} ({accepted or 'not accepted in CI'})")
        unknown += [] if accepted else [reason]
    if unknown and os.environ.get("CI") == "true":
        terminalreporter.write_line(f"error: skipped without an accepted reason in tests/conftest.py: {'; '.join(unknown)}", red=True)
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
