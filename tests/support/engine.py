"""The workflow engine in this process: quick looks at what a configuration would run, without the seconds that starting it takes.

The engine promises nothing about these calls; its version is pinned, and a test that fails after a new pin says what changed.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paths import ROOT
from snakemake.api import SnakemakeApi
from snakemake.dag import DAG
from snakemake.settings.types import (
    ConfigSettings,
    DAGSettings,
    ExecutionSettings,
    OutputSettings,
    Quietness,
    RerunTrigger,
    ResourceSettings,
)

#: As profiles/default has it.
TRIGGERS = frozenset({RerunTrigger.MTIME, RerunTrigger.PARAMS, RerunTrigger.INPUT})


def plan(
    folder: Path,
    config: Path | Sequence[Path],
    targets: Iterable[str] = (),
    executor: str = "dryrun",
    overrides: Mapping[str, Any] | None = None,
    **how: Any,
) -> DAG:
    """The jobs of a run in ``folder``, after a dry run, or after `touch` has recorded all of them as done.

    ``config``: one file, or several, later ones over earlier ones; ``overrides``: keys over those (``--config``); ``how``: DAGSettings.
    """
    shown = OutputSettings(dryrun=executor == "dryrun", quiet={Quietness.ALL}, keep_logger=True)
    silence = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), SnakemakeApi(shown) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=1),
            config_settings=ConfigSettings(
                configfiles=[config] if isinstance(config, Path) else list(config), config=dict(overrides or {})
            ),
            snakefile=ROOT / "Snakefile",
            workdir=folder,
        )
        dag = workflow.dag(DAGSettings(targets=set(targets), rerun_triggers=TRIGGERS, **how))
        dag.execute_workflow(executor=executor, execution_settings=ExecutionSettings(lock=False, no_hooks=True))
        return workflow._workflow_store.dag


def finish(folder: Path, config: Path, targets: Iterable[str] = ()) -> None:
    """Let all that a run makes be there, empty, and recorded as made with this configuration."""
    for job in plan(folder, config, targets).jobs:
        for output in job.output:
            path = folder / str(output)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if output.is_directory else path.touch()
    plan(folder, config, targets, executor="touch", forceall=True)
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1e9, 1e9))  # no file is newer than another, whichever was touched last


def reruns(folder: Path, config: Path, targets: Iterable[str] = ()) -> tuple[set[str], set[str]]:
    """Rules that run again: those for a reason of their own (parameters, names of inputs), and those that follow; not what is new."""
    dag = plan(folder, config, targets)
    own, following = set(), set()
    for job in dag.jobs:
        reason = dag.reason(job)
        if reason.params_changed or reason.input_changed:
            own.add(job.rule.name)
        elif reason.updated_input_run or reason.updated_input:
            following.add(job.rule.name)
    return own, following - own - {"all"}
