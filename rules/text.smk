# Text: a caption per tile, an embedding per distinct caption.

MODEL_CAPTIONS = settings.captions.kind == "vlm"


rule caption_tiles:
    input:
        tiles=tiles_to_caption,
        model=caption_model_of_tiles,
    output:
        manifest=results.captions("{dataset}", "{split}"),
    log:
        results.log("{dataset}/caption_tiles-{split}"),
    benchmark:
        results.benchmark("{dataset}/caption_tiles-{split}")
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    threads: by_model(4, 1)
    resources:
        **gpus(by_model(GPU, 0) if MODEL_CAPTIONS else 0),
        mem_mb=times_attempt(by_model(48000 if GPU else 16000, 2000)),
        runtime=times_attempt(by_model(1440, 60)),
    params:
        **dataset_without("licence", "palette", "select", "split", "test", "val"),
        captions=caption_keys,
        device=untracked(by_model(settings.device, "cpu")),
    message:
        "Captioning {wildcards.dataset}/{wildcards.split}"
    script:
        "../workflow_scripts/caption_tiles.py"


rule encode_prompts:
    input:
        captions=results.captions("{dataset}", "{split}"),
        base=base_model,
    output:
        prompts=results.prompts("{dataset}", "{split}"),
    log:
        results.log("{dataset}/encode_prompts-{split}"),
    benchmark:
        results.benchmark("{dataset}/encode_prompts-{split}")
    conda:
        "../envs/generator.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(32000 if GPU else 3000),
        runtime=times_attempt(120),
    params:
        device=untracked(settings.device),
    message:
        "Encoding prompts of {wildcards.dataset}/{wildcards.split}"
    script:
        "../workflow_scripts/encode_prompts.py"
