"""Caption one split's tiles: the tile manifest and perhaps a captioning model in, the same with captions out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.settings import Captions, Dataset
    from crfm_core.text.captions import caption_tiles
    from crfm_core.text.model_folder import folder_at
    from crfm_core.text.vision_language import CAPTION_KEY

    use_threads(snakemake.threads)
    caption_tiles(
        Path(snakemake.input.tiles),
        Dataset(**snakemake.params.dataset, **snakemake.params.others),
        Captions(**snakemake.params.captions),
        Path(snakemake.output.manifest),
        model=folder_at(snakemake.input.model, CAPTION_KEY) if snakemake.input.model else None,
        device=resolve(snakemake.params.device),
    )
