"""Build the embedded base model from the training tiles: their captioned manifest in, a diffusers pipeline folder out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import use_threads
    from crfm_core.layout import Layout
    from crfm_core.models.base import build_base_model
    from crfm_core.settings import Captions, EmbeddedBase
    from crfm_core.text.captions import vocabulary_of

    use_threads(snakemake.threads)
    classes, captioned = snakemake.params.classes, Path(snakemake.input.captions)
    build_base_model(
        manifest=captioned,
        root=Layout.base_model.root(snakemake.output.folder),
        num_classes=len(classes),
        captions=vocabulary_of(captioned, classes, Captions(**snakemake.params.captions), snakemake.params.unlabelled),
        settings=EmbeddedBase(**snakemake.params.base),
        out=Path(snakemake.output.folder),
        work=Path(f"{snakemake.output.folder}.unfinished"),
    )
