"""A configuration with changes, and jobs to plan."""

from __future__ import annotations

from pathlib import Path

import yaml
from paths import ROOT

from crfm_core.planning.jobs import Job
from crfm_core.planning.plan import Plan, make_plan
from crfm_core.planning.rates import Rates, read_rates
from crfm_core.settings import Settings, load_datasets, load_settings

RATES = read_rates(ROOT / "configs" / "rates.yaml")


def without_scheme(scheme: str) -> Rates:
    """The rates without any number of a control scheme."""

    def drop(value: object) -> object:
        return {key: drop(one) for key, one in value.items() if key != scheme} if isinstance(value, dict) else value

    return Rates.model_validate(drop(RATES.model_dump()))


def configuration(name: str, results: Path, changes: dict | None = None) -> tuple[Settings, dict]:
    """The configuration of a file, its results elsewhere, and its datasets."""
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    for path, value in (changes or {}).items():
        *keys, last = path.split(".")
        section = content
        for key in keys:
            section = section[key]
        section[last] = value
    settings = load_settings(content | {"results": str(results)})
    return settings, load_datasets(settings, ROOT)


def planned(
    jobs: list[Job], results: Path, name="config.yaml", changes=None, gpu_rules=(), cores=2, gpus=1, gpu=None, rates: Rates = RATES
) -> Plan:
    """The plan of jobs of a configuration."""
    return make_plan(jobs, *configuration(name, results, changes), rates, gpu_rules, cores, gpus, gpu)


def shard(results: Path, number: int, sampler: str = "crfm", pending: bool = True, seconds: float | None = None) -> Job:
    """A job that samples, and its time if it has run."""
    benchmark = results / "benchmarks" / f"{sampler}-{number}.tsv"
    if seconds is not None:
        benchmark.parent.mkdir(parents=True, exist_ok=True)
        benchmark.write_text(f"s\tmax_rss\n{seconds}\t1\n")
    names = {"dataset": "embedded", "control": "triattention", "sampler": sampler, "shard": str(number), "shards": "2"}
    return Job("synthesise_shard", names, pending, benchmark)
