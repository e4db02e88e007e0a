"""Refuse splits that share ground: tile manifests in, a note that they were compared out."""

from job import job

with job(snakemake):
    from crfm_core.data.splits import check_disjoint
    from crfm_core.files import write_json

    check_disjoint(list(snakemake.input.manifests), snakemake.params.train)
    write_json(snakemake.output.report, {"disjoint": [str(path) for path in snakemake.input.manifests]})
