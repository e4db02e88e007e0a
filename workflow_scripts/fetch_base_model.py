"""Fetch the base model: a repository and revision of the hub in, its folder and a file that says where it is out."""

from job import job

with job(snakemake):
    from crfm_core.files import write_json
    from crfm_core.hub import fetch_base_model
    from crfm_core.settings import HubBase

    hub = HubBase(**snakemake.params.base)
    folder = fetch_base_model(hub, command=f"snakemake --cores 1 {snakemake.output.where}")
    write_json(snakemake.output.where, {"folder": str(folder.resolve()), "repo": hub.repo, "revision": hub.revision})
