"""Compare the recipes of one table: the segmentors' scores in, the table as CSV and as plain text out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.reporting.tables import make_table
    from crfm_core.settings import Table

    csv = Path(snakemake.output.csv)
    make_table(
        scores=[Path(path) for path in snakemake.input.scores],
        table=Table(**snakemake.params.table),
        datasets=list(snakemake.params.datasets),
        seeds=list(snakemake.params.seeds),
        scale=snakemake.params.scale,
        configuration=snakemake.params.configuration,
        results_root=csv.parent.parent,
        csv=csv,
        text=Path(snakemake.output.text),
    )
