"""Measure whether samples agree with their masks, by the critic and by the judge: synthetic manifest and both in, scores out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.agreement import agreement_by_copy
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic

    use_threads(snakemake.threads)
    device, manifest = resolve(snakemake.params.device), Path(snakemake.input.synthetic)
    critics = {who: load_critic(snakemake.input[who], device, snakemake.params.classes) for who in ("critic", "judge")}
    scores = agreement_by_copy(critics, manifest, root=Layout.agreement.root(snakemake.output.scores))
    write_json(snakemake.output.scores, scores | {who: snakemake.params.judged_by[who] | scores[who] for who in critics})
