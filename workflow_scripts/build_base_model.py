"""Build the embedded base model from the training tiles: the tile manifest in, a diffusers pipeline folder out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import use_threads
    from crfm_core.models.base import build_base_model
    from crfm_core.settings import Captions, Dataset, EmbeddedBase
    from crfm_core.text.captions import caption_of

    use_threads(snakemake.threads)
    dataset = Dataset(**snakemake.params.dataset)
    longest = caption_of(range(len(dataset.classes)), dataset.classes, Captions(**snakemake.params.captions))
    build_base_model(
        manifest=Path(snakemake.input.tiles),
        root=Path(snakemake.output.folder).parent,
        num_classes=len(dataset.classes),
        captions=[longest],
        settings=EmbeddedBase(**snakemake.params.base),
        out=Path(snakemake.output.folder),
        work=Path(f"{snakemake.output.folder}.unfinished"),
    )
