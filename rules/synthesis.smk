# Synthesis: images for the training masks or new layouts, in a fixed number of shards, gathered into one manifest; and one for a whole
# scene's mask.


rule synthesise_shard:
    input:
        generator=results.generator("{dataset}", "{control}"),
        captions=masks_of_sampler(results.captions),
        prompts=masks_of_sampler(results.prompts),
        critic=critic_of_sampler,
    output:
        manifest=results.shard("{dataset}", "{control}", "{sampler}", "{shard}", "{shards}"),
    log:
        results.log("{dataset}/synthesise_shard-{control}-{sampler}-{shard}-of-{shards}"),
    benchmark:
        results.benchmark("{dataset}/synthesise_shard-{control}-{sampler}-{shard}-of-{shards}")
    retries: RETRIES
    conda:
        "../envs/synthesis.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(48000 if GPU else 3000),
        runtime=times_attempt(1440),
    params:
        **section(sampler=sampler_of),
        classes=classes_of,
        copies=copies_of,
        seed=settings.seed,
        device=untracked(settings.device),
    message:
        "Sampling shard {wildcards.shard}/{wildcards.shards} of {wildcards.control}/{wildcards.sampler}"
    script:
        "../workflow_scripts/synthesise_shard.py"


rule gather_shards:
    input:
        shards=[results.shard("{dataset}", "{control}", "{sampler}", part, settings.shards) for part in range(1, settings.shards + 1)],
        captions=masks_of_sampler(results.captions),
    output:
        manifest=results.synthetic("{dataset}", "{control}", "{sampler}"),
    log:
        results.log("{dataset}/gather_shards-{control}-{sampler}"),
    benchmark:
        results.benchmark("{dataset}/gather_shards-{control}-{sampler}")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(4000),
        runtime=times_attempt(30),
    params:
        copies=copies_of,
    message:
        "Gathering shards of {wildcards.control}/{wildcards.sampler}"
    script:
        "../workflow_scripts/gather_shards.py"


rule measure_generation:
    input:
        synthetic=results.synthetic("{dataset}", "{control}", "{sampler}"),
        real=lambda wildcards: results.tiles(wildcards.dataset, settings.generation.split or dataset_of(wildcards).train),
        training=split_of("train", results.tiles),
        judge=judge if settings.generation.features == "judge" else [],
        weights=inception_weights(),
        clip=clip_model if settings.generation.features == "clip" or settings.generation.cmmd else [],
    output:
        distances=results.generation("{dataset}", "{control}", "{sampler}"),
    log:
        results.log("{dataset}/measure_generation-{control}-{sampler}"),
    benchmark:
        results.benchmark("{dataset}/measure_generation-{control}-{sampler}")
    conda:
        "../envs/segmentor.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(1440),
    params:
        **section(generation=settings.generation),
        judge=settings.judge.result_keys(),
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Comparing the samples of {wildcards.control}, {wildcards.sampler} with real tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/measure_generation.py"


rule synthesise_scene:
    input:
        generator=results.generator("{dataset}", "{control}"),
        scenes=results.scenes("{dataset}"),
        critic=critic_of_sampler,
    output:
        image=results.synthetic_scene("{dataset}", "{control}", "{sampler}", "{scene}"),
    log:
        results.log("{dataset}/synthesise_scene-{control}-{sampler}-{scene}"),
    benchmark:
        results.benchmark("{dataset}/synthesise_scene-{control}-{sampler}-{scene}")
    retries: RETRIES
    conda:
        "../envs/synthesis.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(64000 if GPU else 3000),
        runtime=times_attempt(1440),
    params:
        **dataset_without("licence", "palette", "select", "split", "test", "val"),
        **section(sampler=sampler_of),
        captions=CAPTIONS,
        seed=settings.seed,
        device=untracked(settings.device),
    message:
        "Sampling scene {wildcards.scene} with {wildcards.control}/{wildcards.sampler}"
    script:
        "../workflow_scripts/synthesise_scene.py"


rule compare_corrections:
    input:
        generator=lambda wildcards: results.generator(wildcards.dataset, settings.comparison.control),
        captions=held_out(results.captions),
        prompts=held_out(results.prompts),
        critic=critic,
        judge=judge,
    output:
        scores=results.comparison("{dataset}", "{preset}"),
    log:
        results.log("{dataset}/compare_corrections-{preset}"),
    benchmark:
        results.benchmark("{dataset}/compare_corrections-{preset}")
    retries: RETRIES
    conda:
        "../envs/synthesis.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(48000 if GPU else 3000),
        runtime=times_attempt(1440),
    params:
        comparison=lambda wildcards: settings.comparison.model_dump(mode="json", exclude={"presets"}),
        judged_by=JUDGED_BY,
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Sampling the held-out masks of {wildcards.dataset} with the correction {wildcards.preset}"
    script:
        "../workflow_scripts/compare_corrections.py"
