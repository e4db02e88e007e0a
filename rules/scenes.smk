# Scenes: what the dataset's source holds, listed and checked (the embedded world is drawn).


rule list_scenes:
    output:
        manifest=f"{RESULTS}/{{dataset}}/scenes.parquet",
    params:
        dataset=lambda wildcards: dump(dataset_of(wildcards)),
    log:
        f"{RESULTS}/logs/{{dataset}}/list_scenes.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/list_scenes.tsv"
    resources:
        mem_mb=2000,
        runtime=60,
    conda:
        "../envs/data.yaml"
    message:
        "Listing the scenes of {wildcards.dataset}"
    script:
        "../workflow_scripts/list_scenes.py"
