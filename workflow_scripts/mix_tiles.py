"""Choose what a recipe trains on: the real tiles, and synthetic and pseudo-labelled ones if it has them, in; one manifest out."""

from job import job

with job(snakemake):
    from crfm_core.curation.mixing import mix
    from crfm_core.layout import Layout
    from crfm_core.settings import Recipe

    recipe = Recipe(**snakemake.params.recipe)
    mix(
        snakemake.input.real,
        snakemake.input.synthetic or None,
        snakemake.output.manifest,
        synthetic_per_real=recipe.synthetic_per_real,
        real_weight=recipe.real_weight,
        exactly=snakemake.params.exactly,
        classes=snakemake.params.classes,
        root=Layout.mix.root(snakemake.output.manifest),
        pseudo_manifest=snakemake.input.pseudo or None,
        pseudo_weight=recipe.pseudo_weight,
    )
