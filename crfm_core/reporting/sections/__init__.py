"""The sections of the report: a module each, and an entry in :data:`SECTIONS`.

A module has a ``TITLE`` ("" for none) and either ``show(report)`` or, for a section that shows one dataset after the other,
``show_dataset(report, results)``. They return the variables of the section's template, or None where there is nothing to show; its template
is ``NAME.html`` beside the module, or the module's ``TEMPLATE``, and also sees ``report``, ``settings`` and ``results``.
Nothing is imported here that takes time, because the workflow reads the entries whenever it starts.
"""

from __future__ import annotations

from collections.abc import Callable

from crfm_core.experiment import Experiment


def results_of(*kinds: str) -> Callable[[Experiment], list[str]]:
    """The results of these kinds of all datasets of the tables."""
    return lambda experiment: [
        path for name in experiment.used_datasets for kind in kinds for path in experiment.report_files(name)[kind].values()
    ]


def tables(experiment: Experiment) -> list[str]:
    return [experiment.results.table(name) for name in experiment.tables]


#: The sections in the order of the page, each with the result files that it is made from.
SECTIONS: dict[str, Callable[[Experiment], list[str]]] = {
    "answer": results_of("agreement"),
    "run": results_of("synthetic", "data_sheet"),
    "scores": tables,
    "agreement": results_of("agreement", "generation", "reconstruction", "validation", "synthetic"),
    "forms": results_of("comparison"),
    "samples": results_of("tiles", "synthetic", "filtered"),
    "failures": results_of("agreement", "synthetic"),
    "corrections": results_of("synthetic"),
    "curation": results_of("tiles", "synthetic", "filtered", "resampled", "pseudo_labels", "mixes"),
    "data": results_of("data_sheet"),
    "others": results_of(),
    "provenance": results_of("synthetic"),
}


def report_files(experiment: Experiment) -> list[str]:
    """The result files that the report is made from, each once."""
    return list(dict.fromkeys(path for needs in SECTIONS.values() for path in needs(experiment)))
