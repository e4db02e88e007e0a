"""Before the first job: one look at everything that is left to be done, and one list of all that stands in its way.

Nothing is made, fetched or read beyond names, sizes and headers, and torch is not imported: it takes about a second.
"""

from __future__ import annotations

from crfm_core.planning.preflight import clashes, given, machine
from crfm_core.planning.preflight.findings import Findings, Work

#: In the order of the list. What given files lack comes first; disk and folders count what is still to be fetched.
CHECKS = (
    given.check_datasets,
    given.check_judges,
    given.check_segmentors,
    given.check_generators,
    given.check_base,
    given.check_models,
    clashes.check_grid,
    clashes.check_captions,
    clashes.check_compiling,
    clashes.check_idle,
    machine.check_gpus,
    machine.check_software,
    machine.check_folders,
    machine.check_disk,
)


def look_ahead(work: Work) -> Findings:
    """All that stands in the way of the jobs that are left, and what is odd about them."""
    found = Findings()
    for check in CHECKS:
        check(work, found)
    for one in found.fetches:
        found.facts.append(f"to be fetched: {one.what} to {one.folder}" + (f", about {one.size / 1e9:.0f} GB" if one.size else ""))
    return found
