"""Look for what stands in the way of a run, before it: the engine's list of files and the configuration in, a list with remedies out."""

from job import job

with job(snakemake):
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from crfm_core.planning.jobs import list_outputs, read_jobs

    params = snakemake.params
    listing = ThreadPoolExecutor().submit(list_outputs, params.listing, Path(".snakemake/incomplete"))

    # slow to import, while the engine lists
    from crfm_core import PreflightError
    from crfm_core.planning.preflight import Work, look_ahead
    from crfm_core.planning.rates import read_rates
    from crfm_core.settings import Dataset, Settings

    found = look_ahead(
        Work(
            settings=Settings(**params.settings),
            datasets={dataset["name"]: Dataset(**dataset) for dataset in params.datasets},
            jobs=[job for job in read_jobs(listing.result(), params.rules) if job.pending],
            rates=read_rates(Path(params.rates)),
            gpu_rules=frozenset(params.gpu_rules),
            gpu_limit=params.gpu_limit,
            here=params.here,
            software={name: Path(file) for name, file in params.software.items()},
        )
    )
    if found.problems:
        raise PreflightError(found.text())
    print(found.text())
