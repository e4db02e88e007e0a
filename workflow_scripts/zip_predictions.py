"""Predict LoveDA's official test images: checkpoint and the folder of the dataset in, a zip file for its server out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import read_json
    from crfm_core.segmentor.submission import zip_predictions
    from crfm_core.settings import Dataset, Evaluation

    use_threads(snakemake.threads)
    archive = Path(snakemake.output.archive)
    zip_predictions(
        snakemake.input.checkpoint,
        read_json(snakemake.input.source)["folder"],
        Dataset(**snakemake.params.dataset, **snakemake.params.others),
        out=archive,
        work=archive.with_name(f".{archive.stem}.unfinished"),
        evaluation=Evaluation(**snakemake.params.evaluation, **snakemake.params.performance),
        device=resolve(snakemake.params.device),
    )
