"""Predict the labels of one split's tiles: checkpoint and tile manifest in, rasters in the tiles' places and their manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.layout import Layout
    from crfm_core.segmentor.prediction import predict_tiles
    from crfm_core.settings import Evaluation

    use_threads(snakemake.threads)
    tiles = Path(snakemake.input.tiles)
    predict_tiles(
        snakemake.input.checkpoint,
        tiles,
        root=Layout.tiles.root(tiles),
        out=Path(snakemake.output.manifest),
        evaluation=Evaluation(**snakemake.params.evaluation, **snakemake.params.performance),
        device=resolve(snakemake.params.device),
        classes=snakemake.params.classes,
    )
