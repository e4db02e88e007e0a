# Curation: how well samples agree with their masks, which pixels and images are kept, which are used how often, the critic's labels of
# unlabelled tiles, and what a recipe trains on.


rule measure_class_losses:
    input:
        tiles=results.tiles("{dataset}", "{split}"),
        critic=critic,
    output:
        losses=results.class_losses("{dataset}", "{split}"),
    log:
        results.log("{dataset}/measure_class_losses-{split}"),
    benchmark:
        results.benchmark("{dataset}/measure_class_losses-{split}")
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(240),
    params:
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Measuring class losses on {wildcards.dataset}/{wildcards.split}"
    script:
        "../workflow_scripts/measure_class_losses.py"


rule filter_tiles:
    input:
        synthetic=tiles_to_filter,
        critic=critic_of_filter,
        losses=losses_of_filter,
        clip=clip_of_filter,
    output:
        manifest=results.filtered("{dataset}", "{control}", "{sampler}", "{filter}"),
    log:
        results.log("{dataset}/filter_tiles-{control}-{sampler}-{filter}"),
    benchmark:
        results.benchmark("{dataset}/filter_tiles-{control}-{sampler}-{filter}")
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 3000),
        runtime=times_attempt(1440),
    params:
        filter=lambda wildcards: filter_of(wildcards).result_keys(),
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Filtering tiles of {wildcards.control}/{wildcards.sampler} with {wildcards.filter}"
    script:
        "../workflow_scripts/filter_tiles.py"


rule resample_tiles:
    input:
        synthetic=filtered_tiles,
        tiles=lambda wildcards: experiment.manifest_of_masks(wildcards.dataset, wildcards.sampler),
        losses=split_of("train", results.class_losses),
    output:
        manifest=results.resampled("{dataset}", "{control}", "{sampler}", "{filter}", "{resampling}"),
    log:
        results.log("{dataset}/resample_tiles-{control}-{sampler}-{filter}-{resampling}"),
    benchmark:
        results.benchmark("{dataset}/resample_tiles-{control}-{sampler}-{filter}-{resampling}")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(4000),
        runtime=times_attempt(30),
    params:
        resampling=lambda wildcards: settings.resamplings[wildcards.resampling].result_keys(),
        classes=classes_of,
    message:
        "Re-sampling {wildcards.control}/{wildcards.sampler}/{wildcards.filter} with {wildcards.resampling}"
    script:
        "../workflow_scripts/resample_tiles.py"


rule label_tiles:
    input:
        tiles=results.tiles("{dataset}", UNLABELLED),
        critic=critic,
    output:
        manifest=results.pseudo_labels("{dataset}"),
    log:
        results.log("{dataset}/label_tiles"),
    benchmark:
        results.benchmark("{dataset}/label_tiles")
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(1440),
    params:
        **section(evaluation=settings.evaluation),
        pseudo_labels=settings.pseudo_labels.result_keys(),
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Labelling the unlabelled tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/label_tiles.py"


rule mix_tiles:
    input:
        real=real_tiles,
        synthetic=synthetic_tiles,
        pseudo=pseudo_labelled_tiles,
        disjoint=results.disjoint("{dataset}"),
    output:
        manifest=results.mix("{dataset}", "{recipe}"),
    log:
        results.log("{dataset}/mix_tiles-{recipe}"),
    benchmark:
        results.benchmark("{dataset}/mix_tiles-{recipe}")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(4000),
        runtime=times_attempt(30),
    params:
        recipe=lambda wildcards: settings.recipes[wildcards.recipe].result_keys(),
        exactly=lambda wildcards: keeps_every_image(settings, wildcards.recipe),
        classes=classes_of,
    message:
        "Mixing tiles of {wildcards.recipe}"
    script:
        "../workflow_scripts/mix_tiles.py"


rule measure_agreement:
    input:
        synthetic=results.synthetic("{dataset}", "{control}", "{sampler}"),
        critic=critic,
        judge=judge,
    output:
        scores=results.agreement("{dataset}", "{control}", "{sampler}"),
    log:
        results.log("{dataset}/measure_agreement-{control}-{sampler}"),
    benchmark:
        results.benchmark("{dataset}/measure_agreement-{control}-{sampler}")
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(1440),
    params:
        judged_by=JUDGED_BY,
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Measuring agreement of {wildcards.control}/{wildcards.sampler} with its masks"
    script:
        "../workflow_scripts/measure_agreement.py"


rule measure_reconstruction:
    input:
        tiles=split_of("train", results.tiles),
        held_out=split_of("held_out_split", results.tiles),
        base=base_model,
        critic=critic,
        judge=judge,
    output:
        scores=results.reconstruction("{dataset}"),
    log:
        results.log("{dataset}/measure_reconstruction"),
    benchmark:
        results.benchmark("{dataset}/measure_reconstruction")
    priority: 1  # before the generator is trained: a critic or judge from elsewhere that does not fit stops the run here
    conda:
        "../envs/synthesis.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 3000),
        runtime=times_attempt(240),
    params:
        judged_by=JUDGED_BY,
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Measuring reconstruction of {wildcards.dataset}"
    script:
        "../workflow_scripts/measure_reconstruction.py"
