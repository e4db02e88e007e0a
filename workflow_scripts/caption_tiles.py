"""Caption one split's tiles: the tile manifest in, the same with captions out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.settings import Captions, Dataset
    from crfm_core.text.captions import caption_tiles

    caption_tiles(
        Path(snakemake.input.tiles),
        Dataset(**snakemake.params.dataset),
        Captions(**snakemake.params.captions),
        Path(snakemake.output.manifest),
    )
