# Synthesis: images for the training masks, in a fixed number of shards, gathered into one manifest; and one for a whole scene's mask.


rule synthesise_shard:
    input:
        generator=f"{RESULTS}/{{dataset}}/generators/{{control}}",
        captions=training_captions,
        prompts=training_prompts,
        critic=critic_of_sampler,
    output:
        manifest=f"{RESULTS}/{{dataset}}/synthetic/{{control}}/{{sampler}}/shard-{{shard}}-of-{{shards}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/synthesise_shard-{{control}}-{{sampler}}-{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/synthesise_shard-{{control}}-{{sampler}}-{{shard}}-of-{{shards}}.tsv"
    retries: RETRIES
    conda:
        "../envs/synthesis.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=more(48000 if GPU else 3000),
        runtime=more(1440),
    params:
        sampler=lambda wildcards: dump(settings.samplers[wildcards.sampler]),
        performance=aside(lambda wildcards: settings.samplers[wildcards.sampler].performance_keys()),
        classes=classes_of,
        copies=lambda wildcards: copies(settings, wildcards.control, wildcards.sampler),
        seed=settings.seed,
        device=aside(settings.device),
    message:
        "Sampling shard {wildcards.shard} of {wildcards.shards} with {wildcards.control}, {wildcards.sampler}"
    script:
        "../workflow_scripts/synthesise_shard.py"


rule gather_shards:
    input:
        shards=expand(
            f"{RESULTS}/{{{{dataset}}}}/synthetic/{{{{control}}}}/{{{{sampler}}}}/shard-{{shard}}-of-{{shards}}.parquet",
            shard=range(1, settings.shards + 1),
            shards=settings.shards,
        ),
        captions=training_captions,
    output:
        manifest=f"{RESULTS}/{{dataset}}/synthetic/{{control}}/{{sampler}}/all.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/gather_shards-{{control}}-{{sampler}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/gather_shards-{{control}}-{{sampler}}.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=more(4000),
        runtime=more(30),
    params:
        copies=lambda wildcards: copies(settings, wildcards.control, wildcards.sampler),
    message:
        "Gathering the shards of {wildcards.control}, {wildcards.sampler}"
    script:
        "../workflow_scripts/gather_shards.py"


rule measure_generation:
    input:
        synthetic=f"{RESULTS}/{{dataset}}/synthetic/{{control}}/{{sampler}}/all.parquet",
        real=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/tiles/{settings.generation.split or dataset_of(wildcards).train}.parquet",
        training=training_tiles,
        judge=checkpoint_of(settings.judge) if settings.generation.features == "judge" else [],
        weights=inception_weights(),
        clip=clip_model if settings.generation.features == "clip" or settings.generation.cmmd else [],
    output:
        distances=f"{RESULTS}/{{dataset}}/generation/{{control}}/{{sampler}}.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/measure_generation-{{control}}-{{sampler}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/measure_generation-{{control}}-{{sampler}}.tsv"
    conda:
        "../envs/segmentor.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(1440),
    params:
        generation=dump(settings.generation),
        performance=aside(settings.generation.performance_keys()),
        judge=dump(settings.judge),
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Comparing the samples of {wildcards.control}, {wildcards.sampler} with real tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/measure_generation.py"


rule synthesise_scene:
    input:
        generator=f"{RESULTS}/{{dataset}}/generators/{{control}}",
        scenes=f"{RESULTS}/{{dataset}}/scenes.parquet",
        critic=critic_of_sampler,
    output:
        image=f"{RESULTS}/{{dataset}}/synthetic_scenes/{{control}}/{{sampler}}/{{scene}}.tif",
    log:
        f"{RESULTS}/logs/{{dataset}}/synthesise_scene-{{control}}-{{sampler}}-{{scene}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/synthesise_scene-{{control}}-{{sampler}}-{{scene}}.tsv"
    retries: RETRIES
    conda:
        "../envs/synthesis.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=more(64000 if GPU else 3000),
        runtime=more(1440),
    params:
        **dataset_but("licence", "palette", "select", "split", "test", "val"),
        captions=dump(settings.captions),
        sampler=lambda wildcards: dump(settings.samplers[wildcards.sampler]),
        performance=aside(lambda wildcards: settings.samplers[wildcards.sampler].performance_keys()),
        seed=settings.seed,
        device=aside(settings.device),
    message:
        "Sampling the whole scene {wildcards.scene} with {wildcards.control}, {wildcards.sampler}"
    script:
        "../workflow_scripts/synthesise_scene.py"


rule compare_corrections:
    input:
        generator=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/generators/{settings.comparison.control}",
        captions=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/captions/{dataset_of(wildcards).test}.parquet",
        prompts=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/prompts/{dataset_of(wildcards).test}.json",
        critic=checkpoint_of(settings.critic),
        judge=checkpoint_of(settings.judge),
    output:
        scores=f"{RESULTS}/{{dataset}}/comparison/{{preset}}.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/compare_corrections-{{preset}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/compare_corrections-{{preset}}.tsv"
    retries: RETRIES
    conda:
        "../envs/synthesis.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=more(48000 if GPU else 3000),
        runtime=more(1440),
    params:
        comparison=lambda wildcards: settings.comparison.model_dump(mode="json", exclude={"presets"}),
        judged_by=JUDGED_BY,
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Sampling the test masks of {wildcards.dataset} with the correction {wildcards.preset}"
    script:
        "../workflow_scripts/compare_corrections.py"
