"""Fetch a published dataset unless it is there: its section of the configuration in, its folder and a note of what it is out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.data.sources import fetch_dataset
    from crfm_core.settings import Dataset

    command = f"snakemake --cores 1 {snakemake.output.note}"
    dataset = Dataset(**snakemake.params.dataset, **snakemake.params.others)
    submission = snakemake.wildcards.files == "test_images"
    fetch_dataset(dataset, Path.cwd(), Path(snakemake.output.note), command, submission=submission)
