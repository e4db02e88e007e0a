"""Score one segmentor on the test split: checkpoint and tile manifest in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.segmentor.evaluation import evaluate

    use_threads(snakemake.threads)
    tiles = Path(snakemake.input.tiles)
    write_json(
        snakemake.output.scores,
        evaluate(snakemake.input.checkpoint, tiles, root=tiles.parent.parent, device=resolve(snakemake.params.device)),
    )
