"""Sample one image for a whole scene's mask: generator, scene manifest and critic in, a raster in the scene's place out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core import DataError
    from crfm_core.data.scenes import read_scenes
    from crfm_core.data.tiling import read_mask
    from crfm_core.devices import resolve, use_threads
    from crfm_core.sampling.windows import synthesise_scene
    from crfm_core.settings import Captions, Dataset, Sampler

    use_threads(snakemake.threads)
    dataset, scene = Dataset(**snakemake.params.dataset, **snakemake.params.others), snakemake.wildcards.scene
    scenes = read_scenes(snakemake.input.scenes).set_index("scene")
    if scene not in scenes.index:
        raise DataError(f"{snakemake.input.scenes}: no scene {scene!r}; it has {', '.join(scenes.index[:8])}, ...")
    mask, grid = read_mask(scenes.image[scene], scenes.label[scene], dataset)
    synthesise_scene(
        generator=Path(snakemake.input.generator),
        name=scene,
        mask=mask,
        grid=grid,
        critic=Path(snakemake.input.critic) if snakemake.input.critic else None,
        classes=dataset.classes,
        captions=Captions(**snakemake.params.captions),
        sampler_name=snakemake.wildcards.sampler,
        sampler=Sampler(**snakemake.params.sampler, **snakemake.params.performance),
        size=dataset.tile.size,
        seed=snakemake.params.seed,
        out=Path(snakemake.output.image),
        device=resolve(snakemake.params.device),
    )
