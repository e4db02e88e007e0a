# Scenes: what the dataset's source holds, listed and checked (the embedded world is drawn).


if PUBLISHED:

    rule fetch_dataset:
        output:
            note=f"{RESULTS}/{{dataset}}/source.json",
        log:
            f"{RESULTS}/logs/{{dataset}}/fetch_dataset.log",
        benchmark:
            f"{RESULTS}/benchmarks/{{dataset}}/fetch_dataset.tsv"
        wildcard_constraints:
            dataset="|".join(PUBLISHED),
        retries: RETRIES
        # on a cluster it runs where Snakemake runs: the nodes that compute may have no network
        localrule: True
        conda:
            "../envs/data.yaml"
        resources:
            mem_mb=more(2000),
            runtime=more(1440),
        params:
            **dataset_but("palette", "select", "split", "test", "train", "val"),
            licence=lambda wildcards: dataset_of(wildcards).licence or "not stated",
        message:
            "Seeing to it that {wildcards.dataset} is there, or fetching it; its licence: {params.licence}"
        script:
            "../workflow_scripts/fetch_dataset.py"


rule list_scenes:
    input:
        source=source_note,
    output:
        manifest=f"{RESULTS}/{{dataset}}/scenes.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/list_scenes.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/list_scenes.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=more(2000),
        runtime=more(60),
    params:
        **dataset_but("licence", "palette", "select", "test", "val"),
    message:
        "Listing the scenes of {wildcards.dataset}"
    script:
        "../workflow_scripts/list_scenes.py"
