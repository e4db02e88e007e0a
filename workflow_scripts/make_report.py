"""Write the report: tables, manifests and what was measured of samples in, one HTML page and a folder of figures out."""

from job import job

with job(snakemake):
    import json
    import os
    import shlex
    from pathlib import Path

    from crfm_core.layout import Layout
    from crfm_core.reporting.page import KINDS, make_report
    from crfm_core.settings import Dataset, Settings

    configfiles = [os.path.relpath(path) for path in snakemake.params.configfiles]
    said = {key: "" if value is None else value for key, value in snakemake.params.overrides.items()}
    overrides = [f"{key}={json.dumps(value) if isinstance(value, (list, dict)) else value}" for key, value in said.items()]
    snakefile = os.path.relpath(snakemake.params.snakefile)
    command = ["snakemake --cores all {target}"]
    command += ["--snakefile", shlex.quote(snakefile)] if snakefile != "Snakefile" else []  # run from another folder
    command += ["--configfile", *map(shlex.quote, configfiles)] if configfiles else []
    command += ["--config", *map(shlex.quote, overrides)] if overrides else []
    make_report(
        inputs={kind: [Path(path) for path in snakemake.input.get(kind, [])] for kind in KINDS},
        paper=Path(snakemake.input.paper),
        settings=Settings(**snakemake.params.settings),
        datasets=[Dataset(**dataset) for dataset in snakemake.params.datasets],
        own=list(snakemake.params.own),
        configuration=snakemake.params.configuration,
        command=" ".join(command),
        gpu_stages=list(snakemake.params.gpu_stages),
        results=Layout.report.parse(snakemake.output.page).results,
        page=Path(snakemake.output.page),
        figures=Path(snakemake.output.figures),
    )
