"""Fetch a file of weights: its address and checksum in, the file and a note that says where it is out."""

from job import job

with job(snakemake):
    from crfm_core.files import write_json
    from crfm_core.segmentor.pretrained import fetch_weights
    from crfm_core.settings import Download

    where, optional = snakemake.output.where, snakemake.params.optional
    command = f"snakemake --cores 1 {'--force ' if optional else ''}{where}"  # a note of what is missing counts as made
    write_json(where, fetch_weights(Download(**snakemake.params.weights), command, optional))
