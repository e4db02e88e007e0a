"""Look at a dataset: its scene manifest and the tile manifests of its splits in, a folder with a page, its pictures and numbers out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.layout import Layout
    from crfm_core.reporting.data_sheet import draw_data_sheet
    from crfm_core.settings import Dataset

    out = Path(snakemake.output.sheet)
    draw_data_sheet(
        dataset=Dataset(**snakemake.params.dataset),
        scenes=Path(snakemake.input.scenes),
        tiles={Layout.tiles.names(path)["split"]: Path(path) for path in snakemake.input.tiles},
        root=Layout.data_sheet.root(out),
        out=out,
    )
