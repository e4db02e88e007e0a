"""Check what a run needs, before it: the engine's list of files and the configuration in, a list of problems with remedies out."""

from job import job

with job(snakemake):
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from crfm_core.planning.jobs import list_outputs, read_jobs

    params = snakemake.params
    listing = ThreadPoolExecutor().submit(list_outputs, params.listing, Path(".snakemake/incomplete"))

    # imported while the engine lists its files
    from crfm_core import PreflightError
    from crfm_core.planning.preflight import PendingRun, check_run
    from crfm_core.planning.rates import read_rates
    from crfm_core.settings import Dataset, Settings

    found = check_run(
        PendingRun(
            settings=Settings(**params.settings),
            datasets={dataset["name"]: Dataset(**dataset) for dataset in params.datasets},
            jobs=[job for job in read_jobs(listing.result(), params.rules) if job.pending],
            rates=read_rates(Path(params.rates)),
            gpu_rules=frozenset(params.gpu_rules),
            gpu_limit=params.gpu_limit,
            local=params.local,
            software={name: Path(file) for name, file in params.software.items()},
        )
    )
    if found.problems:
        raise PreflightError(found.text())
    print(found.text())
