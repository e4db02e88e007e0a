"""The jobs of a run, from the list of files that the workflow prints. Imports little, so that what follows can be imported meanwhile."""

from __future__ import annotations

import re
import subprocess
from base64 import urlsafe_b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfm_core import ConfigError

if TYPE_CHECKING:
    from crfm_core.settings import Settings


@dataclass(frozen=True)
class Job:
    """One job of the run: its rule, the values of its wildcards, whether it is still to be done, and where its time is noted."""

    rule: str
    names: Mapping[str, str]
    pending: bool = True
    benchmark: Path | None = None

    def processes(self, settings: Settings) -> int:
        """Processes of a training, each on a GPU of its own; 1 of all other jobs."""
        if self.rule == "train_generator":
            return settings.controls[self.names["control"]].processes
        return settings.segmentors[self.names["segmentor"]].processes if self.rule == "train_segmentor" else 1


def list_outputs(command: Sequence[str], marks: Path) -> str:
    """The output of a command that lists the workflow's files, see :func:`read_jobs`.

    Files of jobs that were stopped half-way count as finished there, though the next run makes them again: where the folder ``marks`` names
    any (in URL-safe base64, long names in folders that begin with @), the command is run again with ``--forcerun``. Raises ConfigError with
    its message when it fails.
    """
    listing = _run(command)
    stopped = {_name_of(mark.relative_to(marks)) for mark in marks.rglob("*") if mark.is_file()}
    again = [line.split("\t")[0] for line in listing.splitlines() if line.split("\t")[0] in stopped]
    return _run([*command, "--forcerun", *again]) if again else listing


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"the workflow's files cannot be listed: {done.stderr.strip()[-2000:] or 'it did not say why'}")
    return done.stdout


def _name_of(mark: Path) -> str:
    """The file that a mark stands for; "" for a file that is no mark."""
    try:
        return urlsafe_b64decode("".join(part.removeprefix("@") for part in mark.parts)).decode()
    except ValueError:
        return ""


def read_jobs(listing: str, rules: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """The jobs behind a listing of the workflow's files: lines of fields with tabs between them, under a heading that names at least
    output_file, rule and plan ("update pending" for files still to be made).

    Args:
        rules: for each rule ``outputs``, regular expressions of its files with its wildcards as groups, and ``benchmark``, the path
            where a job's time is noted with the wildcards in braces ("" for none).

    Jobs come in the order of ``rules``. Raises ConfigError for a listing of another form, or a file that is none of its rule's.
    """
    lines = [line.split("\t") for line in listing.splitlines() if line.strip()]
    if not lines or not {"output_file", "rule", "plan"} <= set(lines[0]):
        raise ConfigError(f"the workflow's files are not listed in the form expected; it begins with {listing[:80]!r}")
    found: dict[tuple, Job] = {}
    for values in lines[1:]:
        row = dict(zip(lines[0], values, strict=False))
        rule = rules.get(row.get("rule", ""), {"outputs": []})
        match = next(filter(None, (re.fullmatch(pattern, row["output_file"]) for pattern in rule["outputs"])), None)
        if match is None:
            raise ConfigError(f"the workflow lists {row['output_file']} as a file of rule {row.get('rule')}, which makes no such file")
        names = match.groupdict()
        benchmark = Path(rule["benchmark"].format(**names)) if rule["benchmark"] else None
        pending = row["plan"] == "update pending"
        key = (row["rule"], *sorted(names.items()))
        found[key] = Job(row["rule"], names, pending or (key in found and found[key].pending), benchmark)
    order = list(rules)
    return sorted(found.values(), key=lambda job: order.index(job.rule))
