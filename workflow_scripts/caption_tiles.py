"""Caption one split's tiles: the tile manifest and perhaps a captioning model in, the same with captions out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.settings import Captions, Dataset
    from crfm_core.text.captions import caption_tiles
    from crfm_core.text.vision_language import model_folder

    use_threads(snakemake.threads)
    caption_tiles(
        Path(snakemake.input.tiles),
        Dataset(**snakemake.params.dataset, **snakemake.params.others),
        Captions(**snakemake.params.captions),
        Path(snakemake.output.manifest),
        model=model_folder(snakemake.input.model) if snakemake.input.model else None,
        device=resolve(snakemake.params.device),
    )
