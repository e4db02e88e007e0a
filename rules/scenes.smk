# Scenes: what the dataset's source holds, listed and checked (the embedded world is drawn).


rule list_scenes:
    input:
        source=source_note,
    output:
        manifest=results.scenes("{dataset}"),
    log:
        results.log("{dataset}/list_scenes"),
    benchmark:
        results.benchmark("{dataset}/list_scenes")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(60),
    params:
        **dataset_without("licence", "palette", "select", "test", "val"),
    message:
        "Listing the scenes of {wildcards.dataset}"
    script:
        "../workflow_scripts/list_scenes.py"
