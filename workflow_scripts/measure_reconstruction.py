"""Measure what the autoencoder keeps of the training tiles: tiles, base model, critic and judge in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.checkpoints import base_folder
    from crfm_core.curation.agreement import held_out_scores, reconstruction_agreement
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic

    use_threads(snakemake.threads)
    device, tiles = resolve(snakemake.params.device), Path(snakemake.input.tiles)
    checkpoints = {who: Path(snakemake.input[who]) for who in ("critic", "judge")}
    critics = {who: load_critic(path, device, snakemake.params.classes) for who, path in checkpoints.items()}
    scores = reconstruction_agreement(base_folder(snakemake.input.base), critics, tiles, Layout.tiles.root(tiles), device)
    if snakemake.input.held_out:
        held_out = Path(snakemake.input.held_out)
        scores["held_out"] = held_out_scores(critics, checkpoints, held_out, Layout.tiles.root(held_out))
    write_json(snakemake.output.scores, scores)
