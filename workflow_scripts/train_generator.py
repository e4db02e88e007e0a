"""Train a control scheme's network: latents, prompts and the base model in, a MaskToImagePipeline folder out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.devices import resolve, use_threads
    from crfm_core.distributed import launch
    from crfm_core.generator.tiles import TileFiles
    from crfm_core.generator.training import GeneratorTraining
    from crfm_core.settings import Control

    use_threads(snakemake.threads)
    control = Control(**snakemake.params.control, **snakemake.params.performance)
    sets = {}
    for name in ("unlabelled", "validation"):
        files = {kind: snakemake.input[f"{name}_{kind}"] for kind in ("latents", "captions", "prompts")}
        sets[name] = TileFiles(**files) if files["latents"] else None
    training = GeneratorTraining(
        base=base_folder(snakemake.input.base),
        latents=snakemake.input.latents,
        prompts=snakemake.input.prompts,
        captions=snakemake.input.captions,
        num_classes=len(snakemake.params.classes),
        control=control,
        out=snakemake.output.folder,
        work=f"{snakemake.output.folder}.unfinished",
        curves=Path(snakemake.log[0]).with_suffix(""),
        device=resolve(snakemake.params.device),
        **sets,
    )
    launch(training, snakemake.threads)
