"""Gather the shards of one sampler: their manifests in, one manifest of all synthetic tiles out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.sampling.gathering import gather_shards

    gather_shards(
        [Path(path) for path in snakemake.input.shards],
        captions=Path(snakemake.input.captions),
        copies=snakemake.params.copies,
        out=Path(snakemake.output.manifest),
    )
