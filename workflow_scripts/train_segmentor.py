"""Train one segmentor on one mix with one seed: the mix manifest in, a checkpoint out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.devices import resolve, use_threads
    from crfm_core.distributed import launch
    from crfm_core.files import read_json
    from crfm_core.layout import Layout
    from crfm_core.segmentor.training import SegmentorTraining
    from crfm_core.settings import Segmentor

    use_threads(snakemake.threads)
    segmentor = Segmentor(**snakemake.params.segmentor, **snakemake.params.performance)
    out, pretrained = Path(snakemake.output.checkpoint), snakemake.input.pretrained
    if pretrained and not isinstance(segmentor.pretrained, str):
        pretrained = read_json(pretrained)["file"]
    training = SegmentorTraining(
        manifest=snakemake.input.mix,
        root=Layout.mix.root(snakemake.input.mix),
        out=out,
        work=out.parent / "unfinished",
        segmentor=segmentor,
        classes=snakemake.params.classes,
        palette=snakemake.params.palette,
        iterations=snakemake.params.iterations,
        seed=int(snakemake.wildcards.seed),
        device=resolve(snakemake.params.device),
        val=snakemake.input.val or None,
        held_out=snakemake.input.held_out or None,
        pretrained=pretrained or None,
        scratch=snakemake.resources.get("scratch"),
    )
    launch(training, snakemake.threads)
