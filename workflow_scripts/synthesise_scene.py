"""Sample one image for a whole scene's mask: generator, scene manifest and critic in, a raster in the scene's place out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core import DataError
    from crfm_core.data.scenes import read_scenes
    from crfm_core.data.tiling import read_mask
    from crfm_core.devices import resolve, use_threads
    from crfm_core.sampling.sampler import SamplerSpec
    from crfm_core.sampling.scenes import synthesise_scene
    from crfm_core.settings import Captions, Dataset, Sampler

    use_threads(snakemake.threads)
    dataset, scene = Dataset(**snakemake.params.dataset, **snakemake.params.others), snakemake.wildcards.scene
    scenes = read_scenes(snakemake.input.scenes).set_index("scene")
    if scene not in scenes.index:
        raise DataError(f"{snakemake.input.scenes}: no scene {scene!r}; it has {', '.join(scenes.index[:8])}, ...")
    mask, grid = read_mask(scenes.image[scene], scenes.label[scene], dataset)
    sampler = SamplerSpec(
        name=snakemake.wildcards.sampler,
        settings=Sampler(**snakemake.params.sampler, **snakemake.params.performance),
        generator=Path(snakemake.input.generator),
        classes=dataset.classes,
        critic=Path(snakemake.input.critic) if snakemake.input.critic else None,
        device=resolve(snakemake.params.device),
    )
    captions, out = Captions(**snakemake.params.captions), Path(snakemake.output.image)
    synthesise_scene(sampler, scene, mask, grid, captions, size=dataset.tile.size, seed=snakemake.params.seed, out=out)
