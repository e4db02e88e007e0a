"""Sample the held-out masks with one preset of the correction: generator, captions, prompts, critic and judge in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.sampling.comparison import compare_corrections
    from crfm_core.sampling.sampler import SamplerSpec
    from crfm_core.segmentor.critic import load_critic
    from crfm_core.settings import Comparison, Sampler

    use_threads(snakemake.threads)
    device, classes = resolve(snakemake.params.device), snakemake.params.classes
    generator, critic = Path(snakemake.input.generator), Path(snakemake.input.critic)
    compare_corrections(
        SamplerSpec("comparison", Sampler(preset="default"), generator, classes, critic, device).open(),
        judge=load_critic(snakemake.input.judge, device, classes),
        captions=Path(snakemake.input.captions),
        prompts=Path(snakemake.input.prompts),
        comparison=Comparison(**snakemake.params.comparison),
        preset=snakemake.wildcards.preset,
        out=Path(snakemake.output.scores),
    )
