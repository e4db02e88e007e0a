"""Score one segmentor on the test split: checkpoint and tile manifest in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.evaluation import evaluate
    from crfm_core.settings import Evaluation

    use_threads(snakemake.threads)
    tiles = Path(snakemake.input.tiles)
    scores = evaluate(
        snakemake.input.checkpoint,
        tiles,
        root=Layout.tiles.root(tiles),
        device=resolve(snakemake.params.device),
        evaluation=Evaluation(**snakemake.params.evaluation, **snakemake.params.performance),
    )
    write_json(snakemake.output.scores, scores)
