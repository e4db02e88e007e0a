"""Sample one shard of the synthetic tiles: generator, prompts, captioned tiles and critic in, images and their manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.sampling.sampler import SamplerSpec
    from crfm_core.sampling.shards import synthesise_shard
    from crfm_core.settings import Sampler

    use_threads(snakemake.threads)
    sampler = SamplerSpec(
        name=snakemake.wildcards.sampler,
        settings=Sampler(**snakemake.params.sampler, **snakemake.params.performance),
        generator=Path(snakemake.input.generator),
        classes=snakemake.params.classes,
        critic=Path(snakemake.input.critic) if snakemake.input.critic else None,
        device=resolve(snakemake.params.device),
    )
    synthesise_shard(
        sampler,
        captions=Path(snakemake.input.captions),
        prompts=Path(snakemake.input.prompts),
        copies=snakemake.params.copies,
        seed=snakemake.params.seed,
        out=Path(snakemake.output.manifest),
        shard=int(snakemake.wildcards.shard),
        shards=int(snakemake.wildcards.shards),
    )
