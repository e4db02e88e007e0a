# Scenes: what the dataset's source holds, listed and checked (the embedded world is drawn).


rule list_scenes:
    output:
        manifest=f"{RESULTS}/{{dataset}}/scenes.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/list_scenes.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/list_scenes.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        dataset=dataset_section,
    message:
        "Listing the scenes of {wildcards.dataset}"
    script:
        "../workflow_scripts/list_scenes.py"
