# Text: a caption per tile, an embedding per distinct caption.


rule caption_tiles:
    input:
        tiles=f"{RESULTS}/{{dataset}}/tiles/{{split}}.parquet",
    output:
        manifest=f"{RESULTS}/{{dataset}}/captions/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/caption_tiles-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/caption_tiles-{{split}}.tsv"
    conda:
        "../envs/generator.yaml"
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        dataset=dataset_section,
        captions=dump(settings.captions),
    message:
        "Captioning the {wildcards.split} tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/caption_tiles.py"


rule encode_prompts:
    input:
        captions=f"{RESULTS}/{{dataset}}/captions/{{split}}.parquet",
        base=base_model,
    output:
        prompts=f"{RESULTS}/{{dataset}}/prompts/{{split}}.safetensors",
    log:
        f"{RESULTS}/logs/{{dataset}}/encode_prompts-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/encode_prompts-{{split}}.tsv"
    conda:
        "../envs/generator.yaml"
    resources:
        mem_mb=32000 if GPU else 3000,
        runtime=120,
        gpu=GPU,
    params:
        device=settings.device,
    message:
        "Encoding the prompts of {wildcards.dataset}, {wildcards.split}"
    script:
        "../workflow_scripts/encode_prompts.py"
