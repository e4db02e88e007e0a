"""List the dataset's scenes (draw them, for the embedded world): the source in, the scene manifest out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.data.scenes import list_scenes
    from crfm_core.settings import Dataset

    fetched = snakemake.input.get("source") or None
    list_scenes(Dataset(**snakemake.params.dataset, **snakemake.params.others), Path.cwd(), Path(snakemake.output.manifest), fetched)
