"""Train the mask-conditioned transformer: latents, prompts and the base model in, a MaskToImagePipeline folder out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.devices import resolve, use_threads
    from crfm_core.generator.training import train_generator
    from crfm_core.settings import Control

    use_threads(snakemake.threads)
    train_generator(
        base=base_folder(snakemake.input.base),
        latents=Path(snakemake.input.latents),
        prompts=Path(snakemake.input.prompts),
        captions=Path(snakemake.input.captions),
        num_classes=len(snakemake.params.dataset["classes"]),
        control=Control(**snakemake.params.control),
        out=Path(snakemake.output.folder),
        work=Path(f"{snakemake.output.folder}.unfinished"),
        device=resolve(snakemake.params.device),
    )
