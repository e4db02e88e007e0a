"""Fetch a model from the hub: its repository and revision in, its folder and a note of where that is out."""

from job import job

with job(snakemake):
    from functools import partial

    from crfm_core.files import write_json
    from crfm_core.hub import fetch_base_model
    from crfm_core.settings import HubBase, Model
    from crfm_core.text.clip import fetch_clip_model
    from crfm_core.text.model_folder import fetch_model
    from crfm_core.text.vision_language import CAPTION_KEY

    name, asked, where = snakemake.wildcards.model, snakemake.params.model, snakemake.output.where
    model = HubBase(kind="hub", **asked) if name == "base_model" else Model(**asked)
    fetch = {"base_model": fetch_base_model, "caption_model": partial(fetch_model, key=CAPTION_KEY), "clip_model": fetch_clip_model}[name]
    folder = fetch(model, command=f"snakemake --cores 1 {where}")
    write_json(where, {"folder": str(folder.resolve()), "repo": model.repo, "revision": model.revision})
