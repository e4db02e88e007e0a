# Segmentors: one rule trains every one of them, the critic and the judge too; one scores them on the test split; others predict.


if DOWNLOADS:

    rule fetch_weights:
        output:
            where=f"{RESULTS}/weights/{{weights}}.json",
        log:
            f"{RESULTS}/logs/fetch_weights-{{weights}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch_weights-{{weights}}.tsv"
        wildcard_constraints:
            weights="|".join(DOWNLOADS),
        retries: RETRIES
        # on a cluster it runs where Snakemake runs: the nodes that compute may have no network
        localrule: True
        conda:
            "../envs/data.yaml"
        resources:
            mem_mb=more(2000),
            runtime=more(600),
        params:
            weights=lambda wildcards: dump(DOWNLOADS[wildcards.weights]),
            optional=lambda wildcards: wildcards.weights == "inception",  # without them there is no FID, and all else goes on
        message:
            "Fetching the weights of {wildcards.weights}"
        script:
            "../workflow_scripts/fetch_weights.py"


rule train_segmentor:
    input:
        mix=f"{RESULTS}/{{dataset}}/mixes/{{recipe}}.parquet",
        val=val_tiles,
        config=lambda wildcards: given(segmentor_of(wildcards).config),
        pretrained=weights_of_segmentor,
    output:
        checkpoint=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/checkpoint.pth",
    log:
        f"{RESULTS}/logs/{{dataset}}/train_segmentor-{{recipe}}-{{segmentor}}-{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/train_segmentor-{{recipe}}-{{segmentor}}-{{seed}}.tsv"
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    threads: lambda wildcards: segmentor_of(wildcards).processes * (8 if GPU else 1)
    resources:
        **gpus(lambda wildcards: segmentor_of(wildcards).processes * GPU),
        mem_mb=more(lambda wildcards: segmentor_of(wildcards).processes * (32000 if GPU else 2000)),
        runtime=more(2880),
    params:
        classes=classes_of,
        palette=aside(palette_of),
        segmentor=lambda wildcards: dump(segmentor_of(wildcards)),
        performance=aside(lambda wildcards: segmentor_of(wildcards).performance_keys()),
        network=lambda wildcards: NETWORKS.get(wildcards.segmentor, ""),
        iterations=lambda wildcards: iterations(settings, wildcards.recipe, wildcards.segmentor),
        device=aside(settings.device),
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
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(120),
    params:
        evaluation=dump(settings.evaluation),
        performance=aside(settings.evaluation.performance_keys()),
        device=aside(settings.device),
    message:
        "Scoring {wildcards.segmentor} trained on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/evaluate_segmentor.py"


rule predict_tiles:
    input:
        checkpoint=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/checkpoint.pth",
        tiles=f"{RESULTS}/{{dataset}}/tiles/{{split}}.parquet",
    output:
        manifest=f"{RESULTS}/{{dataset}}/predictions/{{recipe}}/{{segmentor}}/seed{{seed}}/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/predict_tiles-{{recipe}}-{{segmentor}}-{{seed}}-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/predict_tiles-{{recipe}}-{{segmentor}}-{{seed}}-{{split}}.tsv"
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(240),
    params:
        classes=classes_of,
        evaluation=dump(settings.evaluation),
        performance=aside(settings.evaluation.performance_keys()),
        device=aside(settings.device),
    message:
        "Predicting the {wildcards.split} tiles with {wildcards.segmentor} trained on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/predict_tiles.py"


rule predict_scene:
    input:
        checkpoint=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/checkpoint.pth",
        scenes=f"{RESULTS}/{{dataset}}/scenes.parquet",
    output:
        raster=f"{RESULTS}/{{dataset}}/predicted_scenes/{{recipe}}/{{segmentor}}/seed{{seed}}/{{scene}}.{{suffix}}",
    log:
        f"{RESULTS}/logs/{{dataset}}/predict_scene-{{recipe}}-{{segmentor}}-{{seed}}-{{scene}}-{{suffix}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/predict_scene-{{recipe}}-{{segmentor}}-{{seed}}-{{scene}}-{{suffix}}.tsv"
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=more(16000 if GPU else 2000),
        runtime=more(480),
    params:
        **dataset_but("select", "split", "test", "val"),
        evaluation=dump(settings.evaluation),
        performance=aside(settings.evaluation.performance_keys()),
        device=aside(settings.device),
    message:
        "Predicting the scene {wildcards.scene} with {wildcards.segmentor} trained on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/predict_scene.py"


if SCORED_BY_A_SERVER:

    rule zip_predictions:
        input:
            checkpoint=f"{RESULTS}/{{dataset}}/segmentors/{{recipe}}/{{segmentor}}/seed{{seed}}/checkpoint.pth",
            images=f"{RESULTS}/{{dataset}}/test_images.json",
        output:
            archive=f"{RESULTS}/{{dataset}}/submissions/{{recipe}}/{{segmentor}}/seed{{seed}}.zip",
        log:
            f"{RESULTS}/logs/{{dataset}}/zip_predictions-{{recipe}}-{{segmentor}}-{{seed}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/{{dataset}}/zip_predictions-{{recipe}}-{{segmentor}}-{{seed}}.tsv"
        wildcard_constraints:
            dataset="|".join(SCORED_BY_A_SERVER),
        retries: RETRIES
        conda:
            "../envs/segmentor.yaml"
        resources:
            **gpus(GPU),
            mem_mb=more(16000 if GPU else 2000),
            runtime=more(1440),
        params:
            **dataset_but("select", "split", "test", "val"),
            evaluation=dump(settings.evaluation),
            performance=aside(settings.evaluation.performance_keys()),
            device=aside(settings.device),
        message:
            "Predicting the test images of {wildcards.dataset} for its server with {wildcards.segmentor} trained on {wildcards.recipe}"
        script:
            "../workflow_scripts/zip_predictions.py"
