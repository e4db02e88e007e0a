# Generator: the base model, latents of the tiles, and the fine-tuned mask-conditioned transformer.


if not (settings.base_model.IS_BUILT or settings.base_model.IS_FETCHED):

    rule check_base_model:
        output:
            where=results.model_note("base_model"),
        log:
            results.log("check_base_model"),
        benchmark:
            results.benchmark("check_base_model")
        conda:
            "../envs/data.yaml"
        resources:
            mem_mb=times_attempt(2000),
            runtime=times_attempt(30),
        params:
            path=settings.base_model.path,
        message:
            "Checking the base model"
        script:
            "../workflow_scripts/check_base_model.py"

elif settings.base_model.IS_BUILT:

    rule build_base_model:
        input:
            captions=split_of("train", results.captions),
        output:
            folder=directory(results.base_model("{dataset}")),
        log:
            results.log("{dataset}/build_base_model"),
        benchmark:
            results.benchmark("{dataset}/build_base_model")
        priority: 10
        conda:
            "../envs/generator.yaml"
        resources:
            mem_mb=times_attempt(3000),
            runtime=times_attempt(60),
        params:
            classes=classes_of,
            captions=caption_keys,
            unlabelled=lambda wildcards: dataset_of(wildcards).has_unlabelled,
            base=settings.base_model.result_keys(),
        message:
            "Building the base model of {wildcards.dataset}"
        script:
            "../workflow_scripts/build_base_model.py"


rule encode_latents:
    input:
        tiles=split_of("train", results.tiles),
        base=base_model,
    output:
        latents=results.latents("{dataset}", "{mask_code}"),
    log:
        results.log("{dataset}/encode_latents-{mask_code}"),
    benchmark:
        results.benchmark("{dataset}/encode_latents-{mask_code}")
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(32000 if GPU else 3000),
        runtime=times_attempt(600),
    params:
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Encoding tiles of {wildcards.dataset} as latents"
    script:
        "../workflow_scripts/encode_latents.py"


use rule encode_latents as encode_set_latents with:
    input:
        tiles=tiles_of_set,
        base=base_model,
    output:
        latents=results.set_latents("{dataset}", "{set}", "{mask_code}"),
    log:
        results.log("{dataset}/encode_set_latents-{set}-{mask_code}"),
    benchmark:
        results.benchmark("{dataset}/encode_set_latents-{set}-{mask_code}")
    message:
        "Encoding {wildcards.set} tiles of {wildcards.dataset} as latents"


rule train_generator:
    input:
        base=base_model,
        latents=lambda wildcards: results.latents(wildcards.dataset, mask_code_of(wildcards)),
        captions=split_of("train", results.captions),
        prompts=split_of("train", results.prompts),
        unlabelled_latents=of_set(unlabelled_set, results.set_latents, mask_code_of),
        unlabelled_captions=of_set(unlabelled_set, results.captions),
        unlabelled_prompts=of_set(unlabelled_set, results.prompts),
        validation_latents=of_set(validation_set, results.set_latents, mask_code_of),
        validation_captions=of_set(validation_set, results.captions),
        validation_prompts=of_set(validation_set, results.prompts),
        start_from=lambda wildcards: user_file(control_of(wildcards).start_from),
    output:
        folder=directory(results.generator("{dataset}", "{control}")),
    log:
        results.log("{dataset}/train_generator-{control}"),
    benchmark:
        results.benchmark("{dataset}/train_generator-{control}")
    priority: 10
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    threads: lambda wildcards: control_of(wildcards).processes * (8 if GPU else 1)
    resources:
        **gpus(lambda wildcards: control_of(wildcards).processes * GPU),
        mem_mb=times_attempt(lambda wildcards: control_of(wildcards).processes * (64000 if GPU else 3000)),
        runtime=times_attempt(10000),
    params:
        **section(control=control_of),
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Training generator {wildcards.control} on {wildcards.dataset}"
    script:
        "../workflow_scripts/train_generator.py"


rule sample_validation:
    input:
        weights=weights_to_sample,
        base=base_model,
        captions=held_out(results.captions),
        prompts=held_out(results.prompts),
    output:
        picture=results.validation_picture("{dataset}", "{control}", "{checkpoint}"),
        losses=results.validation("{dataset}", "{control}", "{checkpoint}"),
    log:
        results.log("{dataset}/sample_validation-{control}-{checkpoint}"),
    benchmark:
        results.benchmark("{dataset}/sample_validation-{control}-{checkpoint}")
    conda:
        "../envs/generator.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(48000 if GPU else 3000),
        runtime=times_attempt(120),
    params:
        **section(control=control_of),
        classes=classes_of,
        palette=palette_of,
        device=untracked(settings.device),
    message:
        "Sampling validation masks with {wildcards.control}, {wildcards.checkpoint}"
    script:
        "../workflow_scripts/sample_validation.py"


rule export_sd3:
    input:
        generator=results.generator("{dataset}", "{control}"),
    output:
        folder=directory(results.exported("{dataset}", "{control}")),
    log:
        results.log("{dataset}/export_sd3-{control}"),
    benchmark:
        results.benchmark("{dataset}/export_sd3-{control}")
    conda:
        "../envs/generator.yaml"
    resources:
        mem_mb=times_attempt(48000 if GPU else 3000),
        runtime=times_attempt(120),
    message:
        "Exporting {wildcards.control} as a Stable Diffusion 3 pipeline"
    script:
        "../workflow_scripts/export_sd3.py"
