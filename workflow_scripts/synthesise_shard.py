"""Sample one shard of the synthetic tiles: generator, prompts, captioned tiles and critic in, images and their manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.sampling.shards import synthesise_shard
    from crfm_core.settings import Sampler

    use_threads(snakemake.threads)
    synthesise_shard(
        generator=Path(snakemake.input.generator),
        captions=Path(snakemake.input.captions),
        prompts=Path(snakemake.input.prompts),
        critic=Path(snakemake.input.critic) if snakemake.input.critic else None,
        classes=snakemake.params.classes,
        sampler_name=snakemake.wildcards.sampler,
        sampler=Sampler(**snakemake.params.sampler, **snakemake.params.performance),
        copies=snakemake.params.copies,
        shard=int(snakemake.wildcards.shard),
        shards=int(snakemake.wildcards.shards),
        seed=snakemake.params.seed,
        out=Path(snakemake.output.manifest),
        device=resolve(snakemake.params.device),
    )
