# Segmentors: one rule trains every one of them, the critic and the judge too; one scores them on the test split.


rule train_segmentor:
    input:
        mix=f"{RESULTS}/{{dataset}}/mixes/{{recipe}}.parquet",
    output:
        checkpoint=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/checkpoint.pth",
    log:
        f"{RESULTS}/logs/{{dataset}}/train_segmentor-{{recipe}}-{{segmentor}}-{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/train_segmentor-{{recipe}}-{{segmentor}}-{{seed}}.tsv"
    retries: 1
    conda:
        "../envs/segmentor.yaml"
    threads: 8 if GPU else 1
    resources:
        mem_mb=32000 if GPU else 2000,
        runtime=2880,
        gpu=GPU,
    params:
        dataset=dataset_section,
        segmentor=lambda wildcards: dump(settings.segmentors[wildcards.segmentor]),
        iterations=lambda wildcards: settings.iterations(wildcards.recipe, wildcards.segmentor),
        device=settings.device,
    message:
        "Training {wildcards.segmentor} on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/train_segmentor.py"


rule evaluate_segmentor:
    input:
        checkpoint=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/checkpoint.pth",
        tiles=test_tiles,
    output:
        scores=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/scores.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/evaluate_segmentor-{{recipe}}-{{segmentor}}-{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/evaluate_segmentor-{{recipe}}-{{segmentor}}-{{seed}}.tsv"
    conda:
        "../envs/segmentor.yaml"
    resources:
        mem_mb=16000 if GPU else 2000,
        runtime=120,
        gpu=GPU,
    params:
        device=settings.device,
    message:
        "Scoring {wildcards.segmentor} trained on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/evaluate_segmentor.py"
