"""Write the report: tables, manifests and what was measured of samples in, one HTML page and a folder of figures out."""

from job import job

with job(snakemake):
    import json
    import os
    import shlex
    from pathlib import Path

    from crfm_core.experiment import Experiment
    from crfm_core.layout import Layout
    from crfm_core.reporting.page import make_report
    from crfm_core.settings import Dataset, Settings

    configfiles = [os.path.relpath(path) for path in snakemake.params.configfiles]
    values = {key: "" if value is None else value for key, value in snakemake.params.overrides.items()}
    overrides = [f"{key}={json.dumps(value) if isinstance(value, (list, dict)) else value}" for key, value in values.items()]
    snakefile = os.path.relpath(snakemake.params.snakefile)
    command = ["snakemake --cores all {target}"]
    command += ["--snakefile", shlex.quote(snakefile)] if snakefile != "Snakefile" else []  # run from another folder
    command += ["--configfile", *map(shlex.quote, configfiles)] if configfiles else []
    command += ["--config", *map(shlex.quote, overrides)] if overrides else []
    make_report(
        experiment=Experiment(
            Settings(**snakemake.params.settings | {"results": str(Layout.report.parse(snakemake.output.page).results)}),
            {dataset["name"]: Dataset(**dataset) for dataset in snakemake.params.datasets},
        ),
        paper=Path(snakemake.input.paper),
        configuration=snakemake.params.configuration,
        command=" ".join(command),
        gpu_stages=list(snakemake.params.gpu_stages),
        page=Path(snakemake.output.page),
        figures=Path(snakemake.output.figures),
    )
