"""Compare the recipes of one table: the segmentors' scores and what they trained on in, the table as CSV and as plain text out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.layout import Layout
    from crfm_core.reporting.tables import make_table
    from crfm_core.settings import Recipe, Table

    csv = Path(snakemake.output.csv)
    make_table(
        **{kind: [Path(path) for path in snakemake.input.get(kind, [])] for kind in ("scores", "mixes", "generation")},
        table=Table(**snakemake.params.table),
        recipes={name: Recipe(**recipe) for name, recipe in snakemake.params.recipes.items()},
        datasets=list(snakemake.params.datasets),
        seeds=list(snakemake.params.seeds),
        scale=snakemake.params.scale,
        configuration=snakemake.params.configuration,
        results_root=Layout.table.parse(csv).results,
        csv=csv,
        text=Path(snakemake.output.text),
    )
