"""Choose which synthetic tiles are used how often: their manifest, that of their masks and class losses in, kept rows out."""

from job import job

with job(snakemake):
    from crfm_core.curation.resampling import resample_tiles
    from crfm_core.files import read_json
    from crfm_core.layout import Layout
    from crfm_core.settings import AnyResampling, read_section

    resample_tiles(
        read_section(AnyResampling, snakemake.params.resampling),
        manifest=snakemake.input.synthetic,
        tiles=snakemake.input.tiles,
        class_losses=read_json(snakemake.input.losses)["losses"],
        classes=snakemake.params.classes,
        out=snakemake.output.manifest,
        root=Layout.resampled.root(snakemake.output.manifest),
    )
