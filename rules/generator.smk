# Generator: the base model, latents of the training tiles, and the fine-tuned mask-conditioned transformer.


if settings.base_model.IS_FETCHED:

    rule fetch_base_model:
        output:
            where=f"{RESULTS}/base_model.json",
        log:
            f"{RESULTS}/logs/fetch_base_model.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch_base_model.tsv"
        retries: RETRIES
        # on a cluster it runs where Snakemake runs: the nodes that compute may have no network
        localrule: True
        conda:
            "../envs/generator.yaml"
        resources:
            mem_mb=more(2000),
            runtime=more(600),
        params:
            base=dump(settings.base_model),
        message:
            "Fetching the base model from the hub"
        script:
            "../workflow_scripts/fetch_base_model.py"

elif not settings.base_model.IS_BUILT:

    rule check_base_model:
        output:
            where=f"{RESULTS}/base_model.json",
        log:
            f"{RESULTS}/logs/check_base_model.log",
        benchmark:
            f"{RESULTS}/benchmarks/check_base_model.tsv"
        conda:
            "../envs/data.yaml"
        resources:
            mem_mb=more(2000),
            runtime=more(30),
        params:
            path=settings.base_model.path,
        message:
            "Checking the base model"
        script:
            "../workflow_scripts/check_base_model.py"

else:

    rule build_base_model:
        input:
            captions=training_captions,
        output:
            folder=directory(f"{RESULTS}/{{dataset}}/base_model"),
        log:
            f"{RESULTS}/logs/{{dataset}}/build_base_model.log",
        benchmark:
            f"{RESULTS}/benchmarks/{{dataset}}/build_base_model.tsv"
        priority: 10
        conda:
            "../envs/generator.yaml"
        resources:
            mem_mb=more(3000),
            runtime=more(60),
        params:
            classes=classes_of,
            captions=dump(settings.captions),
            base=dump(settings.base_model),
        message:
            "Building the embedded base model of {wildcards.dataset}"
        script:
            "../workflow_scripts/build_base_model.py"


rule encode_latents:
    input:
        tiles=training_tiles,
        base=base_model,
    output:
        latents=f"{RESULTS}/{{dataset}}/latents/{{mask_code}}.safetensors",
    log:
        f"{RESULTS}/logs/{{dataset}}/encode_latents-{{mask_code}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/encode_latents-{{mask_code}}.tsv"
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(32000 if GPU else 3000),
        runtime=more(600),
    params:
        classes=classes_of,
        device=aside(settings.device),
    message:
        "Encoding the training tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/encode_latents.py"


rule train_generator:
    input:
        base=base_model,
        latents=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/latents/{control_of(wildcards).mask_code}.safetensors",
        captions=training_captions,
        prompts=training_prompts,
        start_from=lambda wildcards: given(control_of(wildcards).start_from),
    output:
        folder=directory(f"{RESULTS}/{{dataset}}/generators/{{control}}"),
    log:
        f"{RESULTS}/logs/{{dataset}}/train_generator-{{control}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/train_generator-{{control}}.tsv"
    priority: 10
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    threads: lambda wildcards: control_of(wildcards).processes * (8 if GPU else 1)
    resources:
        **gpus(lambda wildcards: control_of(wildcards).processes * GPU),
        mem_mb=more(lambda wildcards: control_of(wildcards).processes * (64000 if GPU else 3000)),
        runtime=more(10000),
    params:
        classes=classes_of,
        control=lambda wildcards: dump(control_of(wildcards)),
        performance=aside(lambda wildcards: control_of(wildcards).performance_keys()),
        device=aside(settings.device),
    message:
        "Training the generator {wildcards.control} on {wildcards.dataset}"
    script:
        "../workflow_scripts/train_generator.py"


rule sample_validation:
    input:
        weights=weights_to_sample,
        base=base_model,
        captions=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/captions/{dataset_of(wildcards).test}.parquet",
        prompts=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/prompts/{dataset_of(wildcards).test}.json",
    output:
        picture=f"{RESULTS}/{{dataset}}/validation/{{control}}/{{checkpoint}}.png",
        losses=f"{RESULTS}/{{dataset}}/validation/{{control}}/{{checkpoint}}.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/sample_validation-{{control}}-{{checkpoint}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/sample_validation-{{control}}-{{checkpoint}}.tsv"
    conda:
        "../envs/generator.yaml"
    threads: 4 if GPU else 1
    resources:
        **gpus(GPU),
        mem_mb=more(48000 if GPU else 3000),
        runtime=more(120),
    params:
        classes=classes_of,
        palette=palette_of,
        control=lambda wildcards: dump(control_of(wildcards)),
        performance=aside(lambda wildcards: control_of(wildcards).performance_keys()),
        device=aside(settings.device),
    message:
        "Sampling held-out masks with {wildcards.control}, {wildcards.checkpoint}"
    script:
        "../workflow_scripts/sample_validation.py"


rule export_sd3:
    input:
        generator=f"{RESULTS}/{{dataset}}/generators/{{control}}",
    output:
        folder=directory(f"{RESULTS}/{{dataset}}/exports/{{control}}"),
    log:
        f"{RESULTS}/logs/{{dataset}}/export_sd3-{{control}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/export_sd3-{{control}}.tsv"
    conda:
        "../envs/generator.yaml"
    resources:
        mem_mb=more(48000 if GPU else 3000),
        runtime=more(120),
    message:
        "Writing the image and text part of {wildcards.control} as a Stable Diffusion 3 pipeline"
    script:
        "../workflow_scripts/export_sd3.py"
