"""Measure whether samples agree with their masks, by the critic and by the judge: synthetic manifest and both in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.agreement import agreement_by_copy
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.manifest import read_manifest
    from crfm_core.segmentor.critic import load_critic

    use_threads(snakemake.threads)
    device, manifest = resolve(snakemake.params.device), Path(snakemake.input.synthetic)
    root = Path(snakemake.output.scores).parents[2]
    scores = {
        who: snakemake.params[who] | agreement_by_copy(load_critic(snakemake.input[who], device, snakemake.params.classes), manifest, root)
        for who in ("critic", "judge")
    }
    write_json(snakemake.output.scores, {"tiles": len(read_manifest(manifest)), **scores})
