"""The workflow's own list of its files, asked for from outside. Imports little, so that what reads the list can be imported meanwhile."""

from __future__ import annotations

import subprocess
from base64 import urlsafe_b64decode
from collections.abc import Sequence
from pathlib import Path

from crfm_core import ConfigError


def list_outputs(command: Sequence[str], marks: Path) -> str:
    """What a command prints that lists the workflow's files, see :func:`crfm_core.planning.plan.read_jobs`.

    Files that jobs were at work on when they were stopped count as finished there, though the next run makes them again: where the folder
    ``marks`` names any (in URL-safe base64, long names in folders that begin with @), the command is asked again with ``--forcerun``.
    Raises ConfigError with what it said when it fails.
    """
    listing = _answer(command)
    stopped = {_name_of(mark.relative_to(marks)) for mark in marks.rglob("*") if mark.is_file()}
    again = [line.split("\t")[0] for line in listing.splitlines() if line.split("\t")[0] in stopped]
    return _answer([*command, "--forcerun", *again]) if again else listing


def _answer(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the workflow's files cannot be listed: {done.stderr.strip()[-2000:] or 'it did not say why'}")
    return done.stdout


def _name_of(mark: Path) -> str:
    """The file that a mark stands for; "" for what is no mark."""
    try:
        return urlsafe_b64decode("".join(part.removeprefix("@") for part in mark.parts)).decode()
    except ValueError:
        return ""
