"""Encode each distinct caption once: the captioned manifest and the base model in, the index of the prompts out."""

from job import job

with job(snakemake):
    from crfm_core.checkpoints import base_folder
    from crfm_core.devices import compute_dtype, resolve, use_threads
    from crfm_core.manifest import read_manifest
    from crfm_core.text.encoders import encode_prompts_file

    use_threads(snakemake.threads)
    device = resolve(snakemake.params.device)
    captions = read_manifest(snakemake.input.captions, labelled=False).caption
    encode_prompts_file(base_folder(snakemake.input.base), captions, snakemake.output.prompts, device, compute_dtype(device))
