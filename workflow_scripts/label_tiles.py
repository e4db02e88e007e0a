"""Label the unlabelled tiles by the critic: its checkpoint and their manifest in, rasters in the tiles' places and a manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.pseudo_labels import label_tiles
    from crfm_core.devices import resolve, use_threads
    from crfm_core.layout import Layout
    from crfm_core.settings import Evaluation, PseudoLabels

    use_threads(snakemake.threads)
    out = Path(snakemake.output.manifest)
    label_tiles(
        snakemake.input.critic,
        snakemake.input.tiles,
        root=Layout.pseudo_labels.root(out),
        out=out,
        work=out.with_name(f".{out.stem}.unfinished"),
        keep=PseudoLabels(**snakemake.params.pseudo_labels).keep,
        classes=snakemake.params.classes,
        evaluation=Evaluation(**snakemake.params.evaluation, **snakemake.params.performance),
        device=resolve(snakemake.params.device),
    )
