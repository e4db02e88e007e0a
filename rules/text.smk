# Text: a caption per tile, an embedding per distinct caption.

MODEL_CAPTIONS = settings.captions.kind == "vlm"

if settings.captions.model and settings.captions.model.repo:

    rule fetch_caption_model:
        output:
            where=f"{RESULTS}/caption_model.json",
        log:
            f"{RESULTS}/logs/fetch_caption_model.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch_caption_model.tsv"
        retries: RETRIES
        # on a cluster it runs where Snakemake runs: the nodes that compute may have no network
        localrule: True
        conda:
            "../envs/generator.yaml"
        resources:
            mem_mb=more(2000),
            runtime=more(600),
        params:
            model=settings.captions.model.model_dump(include={"repo", "revision", "path"}),
        message:
            "Fetching the captioning model from the hub"
        script:
            "../workflow_scripts/fetch_caption_model.py"


rule caption_tiles:
    input:
        tiles=f"{RESULTS}/{{dataset}}/tiles/{{split}}.parquet",
        model=caption_model,
    output:
        manifest=f"{RESULTS}/{{dataset}}/captions/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/caption_tiles-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/caption_tiles-{{split}}.tsv"
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    threads: 4 if MODEL_CAPTIONS else 1
    resources:
        **gpus(GPU if MODEL_CAPTIONS else 0),
        mem_mb=more((48000 if GPU else 16000) if MODEL_CAPTIONS else 2000),
        runtime=more(1440 if MODEL_CAPTIONS else 60),
    params:
        **dataset_but("licence", "palette", "select", "split", "test", "val"),
        captions=dump(settings.captions),
        device=aside(settings.device if MODEL_CAPTIONS else "cpu"),
    message:
        "Captioning the {wildcards.split} tiles of {wildcards.dataset}"
    script:
        "../workflow_scripts/caption_tiles.py"


rule encode_prompts:
    input:
        captions=f"{RESULTS}/{{dataset}}/captions/{{split}}.parquet",
        base=base_model,
    output:
        prompts=f"{RESULTS}/{{dataset}}/prompts/{{split}}.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/encode_prompts-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/encode_prompts-{{split}}.tsv"
    conda:
        "../envs/generator.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(32000 if GPU else 3000),
        runtime=more(120),
    params:
        device=aside(settings.device),
    message:
        "Encoding the prompts of {wildcards.dataset}, {wildcards.split}"
    script:
        "../workflow_scripts/encode_prompts.py"
