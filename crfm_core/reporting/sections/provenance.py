"""What the numbers were made with: configuration, versions, generators, and how to make the page again."""

from __future__ import annotations

import platform

import yaml

import crfm_core
from crfm_core.reporting.page import Report
from crfm_core.reporting.tables import VERSIONS

TITLE = "Provenance"


def show(report: Report) -> dict:
    """Versions of the first table, generators by the hash of their weights, and the configuration as YAML."""
    versions = {name: report.tables[0].first[name] for name in VERSIONS}
    generators = {
        f"{one.dataset.name}, {one.name_of(pair)}": sorted(set(table.generator))
        for one in report.datasets
        for pair, table in one.synthetic.items()
    }
    return {
        "versions": {"crfm_core": crfm_core.__version__, "Python": platform.python_version(), **versions},
        "generators": generators,
        "command": report.command.replace("{target}", str(report.page)),
        "dump": yaml.safe_dump(report.settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    }
