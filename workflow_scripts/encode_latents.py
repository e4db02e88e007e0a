"""Encode tiles and their masks, where they have any: a tile manifest and the base model in, one file of latents out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.devices import resolve, use_threads
    from crfm_core.generator.latents import encode_tiles
    from crfm_core.layout import Layout
    from crfm_core.settings import UNLABELLED

    use_threads(snakemake.threads)
    out, tiles = Path(snakemake.output.latents), snakemake.wildcards.get("set")
    encode_tiles(
        base=base_folder(snakemake.input.base),
        manifest=Path(snakemake.input.tiles),
        root=(Layout.set_latents if tiles else Layout.latents).root(out),
        num_classes=len(snakemake.params.classes),
        mask_code=snakemake.wildcards.mask_code,
        out=out,
        device=resolve(snakemake.params.device),
        labelled=tiles != UNLABELLED,
    )
