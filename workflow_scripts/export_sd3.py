"""Export a generator for other programs: its folder in, a StableDiffusion3Pipeline folder of its image and text part out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import use_threads
    from crfm_core.generator.export import export_sd3

    use_threads(snakemake.threads)
    export_sd3(Path(snakemake.input.generator), Path(snakemake.output.folder))
