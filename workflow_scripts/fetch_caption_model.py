"""Fetch the captioning model: a repository and revision of the hub in, its folder and a file that says where it is out."""

from job import job

with job(snakemake):
    from crfm_core.files import write_json
    from crfm_core.settings import CaptionModel
    from crfm_core.text.model_folder import fetch_model
    from crfm_core.text.vision_language import CAPTION_KEY

    model = CaptionModel(**snakemake.params.model)
    folder = fetch_model(model, CAPTION_KEY, command=f"snakemake --cores 1 {snakemake.output.where}")
    write_json(snakemake.output.where, {"folder": str(folder.resolve()), "repo": model.repo, "revision": model.revision})
