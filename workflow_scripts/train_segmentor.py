"""Train one segmentor on one mix with one seed: the mix manifest in, a checkpoint out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.segmentor.training import train_segmentor
    from crfm_core.settings import Dataset, Segmentor

    use_threads(snakemake.threads)
    dataset = Dataset(**snakemake.params.dataset)
    train_segmentor(
        manifest=Path(snakemake.input.mix),
        root=Path(snakemake.input.mix).parent.parent,
        out=Path(snakemake.output.checkpoint),
        work=Path(snakemake.output.checkpoint).parent / "unfinished",
        segmentor=Segmentor(**snakemake.params.segmentor),
        classes=dataset.classes,
        palette=dataset.palette,
        iterations=snakemake.params.iterations,
        seed=int(snakemake.wildcards.seed),
        device=resolve(snakemake.params.device),
    )
