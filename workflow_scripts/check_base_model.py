"""Check the given base model: its folder in, a file that says where it is out."""

from job import job

with job(snakemake):
    from crfm_core.checkpoints import check_base_model
    from crfm_core.files import write_json

    write_json(snakemake.output.where, {"folder": str(check_base_model(snakemake.params.path).resolve())})
