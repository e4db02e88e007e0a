"""Fetch the CLIP-like model: a repository and revision of the hub in, its folder and a file that says where it is out."""

from job import job

with job(snakemake):
    from crfm_core.files import write_json
    from crfm_core.settings import Model
    from crfm_core.text.clip import fetch_clip_model

    model = Model(**snakemake.params.model)
    folder = fetch_clip_model(model, command=f"snakemake --cores 1 {snakemake.output.where}")
    write_json(snakemake.output.where, {"folder": str(folder.resolve()), "repo": model.repo, "revision": model.revision})
