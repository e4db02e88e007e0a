"""Measure what the autoencoder keeps of the training tiles: tiles, base model, critic and judge in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.curation.agreement import reconstruction_agreement
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic

    use_threads(snakemake.threads)
    device, tiles = resolve(snakemake.params.device), Path(snakemake.input.tiles)
    critics = {who: load_critic(snakemake.input[who], device, snakemake.params.classes) for who in ("critic", "judge")}
    write_json(
        snakemake.output.scores,
        reconstruction_agreement(base_folder(snakemake.input.base), critics, tiles, Layout.tiles.root(tiles), device),
    )
