"""Write the report: tables, manifests and agreement scores in, one HTML page and a folder of figures out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.reporting.page import make_report
    from crfm_core.settings import Dataset, Settings

    kinds = ("tables", "tiles", "data_sheets", "synthetic", "filtered", "agreement", "reconstruction", "validation", "comparison")
    make_report(
        **{kind: [Path(path) for path in snakemake.input.get(kind, [])] for kind in kinds},
        paper=Path(snakemake.input.paper),
        settings=Settings(**snakemake.params.settings),
        datasets=[Dataset(**dataset) for dataset in snakemake.params.datasets],
        configuration=snakemake.params.configuration,
        results=Path(snakemake.output.page).parent,
        page=Path(snakemake.output.page),
        figures=Path(snakemake.output.figures),
    )
