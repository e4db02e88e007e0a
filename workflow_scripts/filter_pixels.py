"""Ignore the synthetic pixels that the critic finds too hard: synthetic manifest, class losses and critic in, filtered manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.filters import filter_manifest
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import read_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic

    use_threads(snakemake.threads)
    filter_manifest(
        manifest=Path(snakemake.input.synthetic),
        root=Layout.filtered.root(snakemake.output.manifest),
        critic=load_critic(snakemake.input.critic, resolve(snakemake.params.device), snakemake.params.classes),
        class_losses=read_json(snakemake.input.losses)["losses"],
        margin=snakemake.params.filter["margin"],
        out=Path(snakemake.output.manifest),
    )
