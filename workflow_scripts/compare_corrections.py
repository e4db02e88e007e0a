"""Sample the test masks with one form of the correction: generator, captions, prompts, critic and judge in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    import torch

    from crfm_core.devices import resolve, use_threads
    from crfm_core.layout import Layout
    from crfm_core.sampling.comparison import compare_corrections
    from crfm_core.sampling.pipeline import open_generator
    from crfm_core.segmentor.critic import load_critic
    from crfm_core.settings import Comparison

    use_threads(snakemake.threads)
    device, classes = resolve(snakemake.params.device), snakemake.params.classes
    compare_corrections(
        pipeline=open_generator(Path(snakemake.input.generator)).to(device, torch.float32 if device == "cpu" else torch.bfloat16),
        critic=load_critic(snakemake.input.critic, device, classes),
        judge=load_critic(snakemake.input.judge, device, classes),
        captions=Path(snakemake.input.captions),
        prompts=Path(snakemake.input.prompts),
        root=Layout.comparison.root(snakemake.output.scores),
        comparison=Comparison(**snakemake.params.comparison),
        preset=snakemake.wildcards.preset,
        out=Path(snakemake.output.scores),
    )
