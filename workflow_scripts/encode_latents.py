"""Encode the training tiles and their masks: the tile manifest and the base model in, one file of latents out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.devices import resolve, use_threads
    from crfm_core.generator.latents import encode_tiles
    from crfm_core.layout import Layout

    use_threads(snakemake.threads)
    encode_tiles(
        base=base_folder(snakemake.input.base),
        manifest=Path(snakemake.input.tiles),
        root=Layout.latents.root(snakemake.output.latents),
        num_classes=len(snakemake.params.classes),
        mask_code=snakemake.wildcards.mask_code,
        out=Path(snakemake.output.latents),
        device=resolve(snakemake.params.device),
    )
