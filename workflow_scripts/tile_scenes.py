"""Cut one split's scenes into tiles: the scene manifest in, tiles and their manifest out."""

from job import job

with job(snakemake):
    from crfm_core.data.tiling import tile_split
    from crfm_core.settings import Dataset

    tile_split(
        snakemake.input.scenes,
        Dataset(**snakemake.params.dataset, **snakemake.params.others),
        snakemake.wildcards.split,
        snakemake.output.manifest,
        processes=snakemake.threads,
    )
