# Curation: how well samples agree with their masks, which pixels and images are kept, which are used how often, and what a recipe
# trains on.

if settings.clip and settings.clip.repo:

    rule fetch_clip_model:
        output:
            where=f"{RESULTS}/clip_model.json",
        log:
            f"{RESULTS}/logs/fetch_clip_model.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch_clip_model.tsv"
        retries: RETRIES
        # on a cluster it runs where Snakemake runs: the nodes that compute may have no network
        localrule: True
        conda:
            "../envs/generator.yaml"
        resources:
            mem_mb=more(2000),
            runtime=more(600),
        params:
            model=dump(settings.clip),
        message:
            "Fetching the CLIP-like model from the hub"
        script:
            "../workflow_scripts/fetch_clip_model.py"


rule measure_class_losses:
    input:
        tiles=f"{RESULTS}/{{dataset}}/tiles/{{split}}.parquet",
        critic=checkpoint_of(settings.critic),
    output:
        losses=f"{RESULTS}/{{dataset}}/class_losses/{{split}}.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/measure_class_losses-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/measure_class_losses-{{split}}.tsv"
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(240),
    params:
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Measuring the critic's loss per class on the {wildcards.split} tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/measure_class_losses.py"


rule filter_pixels:
    input:
        synthetic=tiles_to_filter,
        losses=class_losses,
        critic=checkpoint_of(settings.critic),
    output:
        manifest=f"{RESULTS}/{{dataset}}/filtered/{{control}}/{{sampler}}/{{filter}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/filter_pixels-{{control}}-{{sampler}}-{{filter}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/filter_pixels-{{control}}-{{sampler}}-{{filter}}.tsv"
    wildcard_constraints:
        filter=filters_that(drop_images=False),
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(1440),
    params:
        filter=lambda wildcards: dump(settings.filters[wildcards.filter]),
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Filtering the pixels of {wildcards.control}, {wildcards.sampler} by the filter {wildcards.filter}"
    script:
        "../workflow_scripts/filter_pixels.py"


rule filter_images:
    input:
        synthetic=tiles_to_filter,
        critic=critic_of_filter,
        clip=clip_of_filter,
    output:
        manifest=f"{RESULTS}/{{dataset}}/filtered/{{control}}/{{sampler}}/{{filter}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/filter_images-{{control}}-{{sampler}}-{{filter}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/filter_images-{{control}}-{{sampler}}-{{filter}}.tsv"
    wildcard_constraints:
        filter=filters_that(drop_images=True),
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 3000),
        runtime=more(1440),
    params:
        filter=lambda wildcards: dump(settings.filters[wildcards.filter]),
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Choosing the best images of {wildcards.control}, {wildcards.sampler} by the filter {wildcards.filter}"
    script:
        "../workflow_scripts/filter_images.py"


rule resample_tiles:
    input:
        synthetic=tiles_to_resample,
        tiles=training_tiles,
        losses=losses_of_training_tiles,
    output:
        manifest=f"{RESULTS}/{{dataset}}/resampled/{{control}}/{{sampler}}/{{filter}}/{{resampling}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/resample_tiles-{{control}}-{{sampler}}-{{filter}}-{{resampling}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/resample_tiles-{{control}}-{{sampler}}-{{filter}}-{{resampling}}.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=more(4000),
        runtime=more(30),
    params:
        resampling=lambda wildcards: dump(settings.resamplings[wildcards.resampling]),
        classes=classes_of,
    message:
        "Re-sampling the tiles of {wildcards.control}, {wildcards.sampler}, filter {wildcards.filter}, by {wildcards.resampling}"
    script:
        "../workflow_scripts/resample_tiles.py"


rule mix_tiles:
    input:
        real=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/tiles/{recipe_of(wildcards).split or dataset_of(wildcards).train}.parquet",
        synthetic=synthetic_tiles,
        disjoint=f"{RESULTS}/{{dataset}}/tiles/disjoint.json",
    output:
        manifest=f"{RESULTS}/{{dataset}}/mixes/{{recipe}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/mix_tiles-{{recipe}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/mix_tiles-{{recipe}}.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=more(4000),
        runtime=more(30),
    params:
        recipe=lambda wildcards: dump(recipe_of(wildcards)),
        exactly=lambda wildcards: keeps_every_image(settings, wildcards.recipe),
        classes=classes_of,
    message:
        "Mixing the tiles of recipe {wildcards.recipe}"
    script:
        "../workflow_scripts/mix_tiles.py"


rule measure_agreement:
    input:
        synthetic=f"{RESULTS}/{{dataset}}/synthetic/{{control}}/{{sampler}}/all.parquet",
        critic=checkpoint_of(settings.critic),
        judge=checkpoint_of(settings.judge),
    output:
        scores=f"{RESULTS}/{{dataset}}/agreement/{{control}}/{{sampler}}.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/measure_agreement-{{control}}-{{sampler}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/measure_agreement-{{control}}-{{sampler}}.tsv"
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(1440),
    params:
        judged_by=JUDGED_BY,
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Measuring whether the samples of {wildcards.control}, {wildcards.sampler} agree with their masks"
    script:
        "../workflow_scripts/measure_agreement.py"


rule measure_reconstruction:
    input:
        tiles=training_tiles,
        base=base_model,
        critic=checkpoint_of(settings.critic),
        judge=checkpoint_of(settings.judge),
    output:
        scores=f"{RESULTS}/{{dataset}}/agreement/reconstruction.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/measure_reconstruction.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/measure_reconstruction.tsv"
    priority: 1  # before the generator is trained: a critic or judge from elsewhere that does not fit stops the run here
    conda:
        "../envs/synthesis.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 3000),
        runtime=more(240),
    params:
        judged_by=JUDGED_BY,
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Measuring what the autoencoder keeps of the training tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/measure_reconstruction.py"
