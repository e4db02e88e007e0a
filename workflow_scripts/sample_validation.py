"""Sample held-out masks: a generator or a checkpoint of its training and captioned tiles in, a picture and losses out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.devices import resolve, use_threads
    from crfm_core.generator.validation import open_checkpoint, sample_validation
    from crfm_core.layout import Layout
    from crfm_core.sampling.sampler import open_generator
    from crfm_core.settings import Control

    use_threads(snakemake.threads)
    weights, captions = Path(snakemake.input.weights), Path(snakemake.input.captions)
    if weights.suffix == ".pt":
        control = Control(**snakemake.params.control, **snakemake.params.performance)
        pipeline = open_checkpoint(weights, base_folder(snakemake.input.base), control, len(snakemake.params.classes))
    else:
        pipeline = open_generator(weights)
    sample_validation(
        pipeline,
        captions=captions,
        prompts=Path(snakemake.input.prompts),
        root=Layout.captions.root(captions),
        palette=snakemake.params.palette,
        picture=Path(snakemake.output.picture),
        losses=Path(snakemake.output.losses),
        device=resolve(snakemake.params.device),
    )
