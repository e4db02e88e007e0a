"""Compare samples with real tiles: synthetic, real and training manifests, and what gives features of them, in, distances out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.realism import measure_generation
    from crfm_core.devices import resolve, use_threads
    from crfm_core.files import write_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic
    from crfm_core.settings import Generation, Judge

    use_threads(snakemake.threads)
    given, device = snakemake.input, resolve(snakemake.params.device)
    settings = Generation(**snakemake.params.generation, **snakemake.params.performance)
    result = measure_generation(
        synthetic=Path(given.synthetic),
        real=Path(given.real),
        training=Path(given.training),
        root=Layout.generation.root(snakemake.output.distances),
        settings=settings,
        judge=load_critic(given.judge, device, snakemake.params.classes) if given.judge else None,
        judged_by=Judge(**snakemake.params.judge),
        weights=given.weights or settings.weights,
        clip=given.clip or None,
        device=device,
    )
    write_json(snakemake.output.distances, result)
