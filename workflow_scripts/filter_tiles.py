"""Filter synthetic tiles by a filter of any kind: their manifest and what the kind needs in, the manifest of what is left out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.filters import filter_tiles
    from crfm_core.devices import resolve, use_threads
    from crfm_core.layout import Layout
    from crfm_core.settings import AnyFilter, read_section

    use_threads(snakemake.threads)
    out = Path(snakemake.output.manifest)
    filter_tiles(
        read_section(AnyFilter, snakemake.params.filter),
        manifest=Path(snakemake.input.synthetic),
        root=Layout.filtered.root(out),
        out=out,
        classes=snakemake.params.classes,
        critic=snakemake.input.critic or None,
        losses=snakemake.input.losses or None,
        clip=snakemake.input.clip or None,
        device=resolve(snakemake.params.device),
    )
