"""Before the first job: checks of everything that the remaining jobs need, and one list of all problems.

Nothing is made, fetched or read beyond names, sizes and headers, and torch is not imported: it takes about a second.
"""

from __future__ import annotations

from crfm_core.planning.preflight import conflicts, machine, user_files
from crfm_core.planning.preflight.checks import CheckResults, PendingRun

#: In the order of the list. User files come first; disk and folders include the downloads that they find.
CHECKS = (
    user_files.check_datasets,
    user_files.check_judges,
    user_files.check_segmentors,
    user_files.check_generators,
    user_files.check_base,
    user_files.check_models,
    conflicts.check_tile_size,
    conflicts.check_captions,
    conflicts.check_compilers,
    conflicts.check_unused_settings,
    machine.check_gpus,
    machine.check_software,
    machine.check_folders,
    machine.check_disk,
)


def check_run(run: PendingRun) -> CheckResults:
    """Problems, warnings and facts of the jobs that are still to be run."""
    found = CheckResults()
    for check in CHECKS:
        try:
            check(run, found)
        except Exception as error:  # a fault of the check itself: what it looks at may be fine, so it stops no run
            found.warnings.append(f"{check.__name__} failed ({error!r}), and the run goes on without it")
    for one in found.downloads:
        found.facts.append(f"Fetching {one.what} to {one.folder}" + (f", about {one.size / 1e9:.0f} GB" if one.size else ""))
    return found
