# Text: a caption per tile, an embedding per distinct caption.

MODEL_CAPTIONS = settings.captions.kind == "vlm"


rule caption_tiles:
    input:
        tiles=results.tiles("{dataset}", "{split}"),
        model=caption_model,
    output:
        manifest=results.captions("{dataset}", "{split}"),
    log:
        results.log("{dataset}/caption_tiles-{split}"),
    benchmark:
        results.benchmark("{dataset}/caption_tiles-{split}")
    retries: RETRIES
    conda:
        "../envs/generator.yaml"
    threads: 4 if MODEL_CAPTIONS else 1
    resources:
        **gpus(GPU if MODEL_CAPTIONS else 0),
        mem_mb=times_attempt((48000 if GPU else 16000) if MODEL_CAPTIONS else 2000),
        runtime=times_attempt(1440 if MODEL_CAPTIONS else 60),
    params:
        **dataset_without("licence", "palette", "select", "split", "test", "val"),
        captions=settings.captions.result_keys(),
        device=untracked(settings.device if MODEL_CAPTIONS else "cpu"),
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
