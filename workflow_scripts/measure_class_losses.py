"""Measure the critic's mean loss per class on the real tiles of a split: tile manifest and critic in, losses out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.class_losses import class_losses
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic

    use_threads(snakemake.threads)
    tiles = Path(snakemake.input.tiles)
    critic = load_critic(snakemake.input.critic, resolve(snakemake.params.device), snakemake.params.classes)
    write_json(snakemake.output.losses, class_losses(critic, tiles, root=Layout.tiles.root(tiles)))
