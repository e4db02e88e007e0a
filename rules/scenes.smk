# Scenes: what the dataset's source holds, listed and checked (the embedded world is drawn).


if PUBLISHED:

    # labelled scenes, or the images that the dataset's own server scores
    rule fetch_dataset:
        output:
            note=f"{RESULTS}/{{dataset}}/{{files}}.json",
        log:
            f"{RESULTS}/logs/{{dataset}}/fetch_dataset-{{files}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{{dataset}}/fetch_dataset-{{files}}.tsv"
        wildcard_constraints:
            dataset="|".join(PUBLISHED),
            files="source|test_images",
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
            "Fetching {wildcards.dataset} unless it is there; its licence: {params.licence}"
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
