# Fetching: data sets, models and weights from elsewhere, each once, with a note of where it lies.
# On a cluster these jobs run where Snakemake runs: the nodes that compute may have no network.


# labelled scenes, or the images that the dataset's own server scores
rule fetch_dataset:
    output:
        note=results.source_note("{dataset}", "{files}"),
    log:
        results.log("{dataset}/fetch_dataset-{files}"),
    benchmark:
        results.benchmark("{dataset}/fetch_dataset-{files}")
    wildcard_constraints:
        dataset=one_of(experiment.published),
        files="source|test_images",
    retries: RETRIES
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(1440),
    params:
        **dataset_without("palette", "select", "split", "test", "train", "val"),
        licence=lambda wildcards: dataset_of(wildcards).licence or "not stated",
    message:
        "Fetching {wildcards.dataset} unless it is there; its licence: {params.licence}"
    script:
        "../workflow_scripts/fetch_dataset.py"


rule fetch_model:
    output:
        where=results.model_note("{model}"),
    log:
        results.log("fetch_model-{model}"),
    benchmark:
        results.benchmark("fetch_model-{model}")
    wildcard_constraints:
        model=one_of(MODELS),
    retries: RETRIES
    localrule: True
    conda:
        "../envs/generator.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(600),
    params:
        model=lambda wildcards: MODELS[wildcards.model].model_dump(include={"repo", "revision", "path"}),
    message:
        "Fetching {wildcards.model}"
    script:
        "../workflow_scripts/fetch_model.py"


rule fetch_weights:
    output:
        where=results.weights_note("{weights}"),
    log:
        results.log("fetch_weights-{weights}"),
    benchmark:
        results.benchmark("fetch_weights-{weights}")
    wildcard_constraints:
        weights=one_of(WEIGHTS),
    retries: RETRIES
    localrule: True
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(600),
    params:
        weights=lambda wildcards: WEIGHTS[wildcards.weights].result_keys(),
        optional=lambda wildcards: wildcards.weights == "inception",  # without them there is no FID, and all else goes on
    message:
        "Fetching weights of {wildcards.weights}"
    script:
        "../workflow_scripts/fetch_weights.py"
