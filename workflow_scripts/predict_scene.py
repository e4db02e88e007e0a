"""Predict the labels of one whole scene: checkpoint and scene manifest in, a raster in the scene's place out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.segmentor.prediction import predict_scene
    from crfm_core.settings import Dataset, Evaluation

    use_threads(snakemake.threads)
    predict_scene(
        snakemake.input.checkpoint,
        snakemake.input.scenes,
        snakemake.wildcards.scene,
        Dataset(**snakemake.params.dataset, **snakemake.params.others),
        out=Path(snakemake.output.raster),
        evaluation=Evaluation(**snakemake.params.evaluation, **snakemake.params.performance),
        device=resolve(snakemake.params.device),
    )
