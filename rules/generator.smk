# Generator: the base model, latents of the training tiles, and the fine-tuned mask-conditioned transformer.


if isinstance(settings.base_model, FolderBase):

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
            mem_mb=2000,
            runtime=30,
        params:
            path=settings.base_model.path,
        message:
            "Checking the base model"
        script:
            "../workflow_scripts/check_base_model.py"

else:

    rule build_base_model:
        input:
            tiles=training_tiles,
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
            mem_mb=3000,
            runtime=60,
        params:
            dataset=dataset_section,
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
    retries: 1
    conda:
        "../envs/generator.yaml"
    resources:
        mem_mb=32000 if GPU else 3000,
        runtime=600,
        gpu=GPU,
    params:
        dataset=dataset_section,
        device=settings.device,
    message:
        "Encoding the training tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/encode_latents.py"


rule train_generator:
    input:
        base=base_model,
        latents=lambda wildcards: f"{RESULTS}/{wildcards.dataset}/latents/{settings.controls[wildcards.control].mask_code}.safetensors",
        captions=training_captions,
        prompts=training_prompts,
    output:
        folder=directory(f"{RESULTS}/{{dataset}}/generators/{{control}}"),
    log:
        f"{RESULTS}/logs/{{dataset}}/train_generator-{{control}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/train_generator-{{control}}.tsv"
    priority: 10
    retries: 1
    conda:
        "../envs/generator.yaml"
    threads: 8 if GPU else 1
    resources:
        mem_mb=96000 if GPU else 3000,
        runtime=10000,
        gpu=GPU,
    params:
        dataset=dataset_section,
        control=lambda wildcards: dump(settings.controls[wildcards.control]),
        device=settings.device,
    message:
        "Training the generator {wildcards.control} on {wildcards.dataset}"
    script:
        "../workflow_scripts/train_generator.py"
