"""Estimate what a run still takes: the engine's list of files, configuration and rates in, the plan for the terminal out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import gpu_names, visible_gpus
    from crfm_core.planning.jobs import list_outputs, read_jobs
    from crfm_core.planning.plan import make_plan
    from crfm_core.planning.rates import read_rates
    from crfm_core.settings import Dataset, Settings

    params = snakemake.params
    plan = make_plan(
        jobs=read_jobs(list_outputs(params.listing, Path(".snakemake/incomplete")), params.rules),
        settings=Settings(**params.settings),
        datasets={dataset["name"]: Dataset(**dataset) for dataset in params.datasets},
        rates=read_rates(Path(params.rates)),
        gpu_rules=list(params.gpu_rules),
        cores=params.cores,
        gpus=params.gpus or len(visible_gpus()),
        gpu=next(iter(gpu_names()), None),
    )
    print(plan.text(), end="")
