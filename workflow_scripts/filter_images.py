"""Keep the synthetic images that show their mask, or their caption, best: synthetic manifest and critic or CLIP in, kept rows out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.curation.image_filters import filter_images
    from crfm_core.devices import resolve, use_threads
    from crfm_core.layout import Layout
    from crfm_core.segmentor.critic import load_critic
    from crfm_core.settings import AnyFilter, read_section
    from crfm_core.text.clip import load_clip

    use_threads(snakemake.threads)
    settings, out = read_section(AnyFilter, snakemake.params.filter), Path(snakemake.output.manifest)
    device, classes = resolve(snakemake.params.device), snakemake.params.classes
    filter_images(
        manifest=Path(snakemake.input.synthetic),
        root=Layout.filtered.root(out),
        scorer=load_clip(snakemake.input.clip, device) if settings.NEEDS_CLIP else load_critic(snakemake.input.critic, device, classes),
        keep=settings.keep,
        out=out,
        classes=classes,
    )
