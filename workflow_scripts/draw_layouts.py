"""Draw new layouts: the training tiles and perhaps the critic's labels of unlabelled ones in, masks and their manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.layouts import draw_layouts
    from crfm_core.settings import AnyLayouts, read_section

    draw_layouts(
        read_section(AnyLayouts, snakemake.params.layouts),
        Path(snakemake.input.tiles),
        snakemake.params.copies,
        snakemake.params.classes,
        Path(snakemake.output.manifest),
        pseudo_labels=Path(snakemake.input.pseudo_labels) if snakemake.input.pseudo_labels else None,
    )
