"""Predict the test images of a dataset's own server: checkpoint and the note of where they lie in, a zip file for the server out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.data.sources import open_source
    from crfm_core.devices import resolve, use_threads
    from crfm_core.segmentor.prediction import zip_predictions
    from crfm_core.settings import Dataset, Evaluation

    use_threads(snakemake.threads)
    archive = Path(snakemake.output.archive)
    zip_predictions(
        snakemake.input.checkpoint,
        open_source(Dataset(**snakemake.params.dataset, **snakemake.params.others), note=snakemake.input.images),
        out=archive,
        work=archive.with_name(f".{archive.stem}.unfinished"),
        evaluation=Evaluation(**snakemake.params.evaluation, **snakemake.params.performance),
        device=resolve(snakemake.params.device),
    )
