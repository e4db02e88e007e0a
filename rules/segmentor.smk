# Segmentors: one rule trains every one of them, the critic and the judge too; one scores them on the test split; others predict.


rule train_segmentor:
    input:
        mix=results.mix("{dataset}", "{recipe}"),
        val=split_of("val", results.tiles),
        held_out=split_of("held_out_split", results.tiles),
        config=lambda wildcards: user_file(segmentor_of(wildcards).config),
        pretrained=pretrained_weights,
    output:
        checkpoint=results.checkpoint("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
    log:
        results.log("{dataset}/train_segmentor-{recipe}-{segmentor}-{seed}"),
    benchmark:
        results.benchmark("{dataset}/train_segmentor-{recipe}-{segmentor}-{seed}")
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    threads: lambda wildcards: segmentor_of(wildcards).processes * (8 if GPU else 1)
    resources:
        **gpus(lambda wildcards: segmentor_of(wildcards).processes * GPU),
        mem_mb=times_attempt(lambda wildcards: segmentor_of(wildcards).processes * (32000 if GPU else 2000)),
        runtime=times_attempt(2880),
    params:
        **section(segmentor=segmentor_of),
        classes=classes_of,
        palette=untracked(palette_of),
        network=lambda wildcards: network_of(wildcards.segmentor),
        iterations=lambda wildcards: settings.iterations(wildcards.recipe, wildcards.segmentor),
        device=untracked(settings.device),
    message:
        "Training {wildcards.segmentor} on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/train_segmentor.py"


rule evaluate_segmentor:
    input:
        checkpoint=results.checkpoint("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
        tiles=split_of("test", results.tiles),
    output:
        scores=results.scores("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
    log:
        results.log("{dataset}/evaluate_segmentor-{recipe}-{segmentor}-{seed}"),
    benchmark:
        results.benchmark("{dataset}/evaluate_segmentor-{recipe}-{segmentor}-{seed}")
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(120),
    params:
        **section(evaluation=settings.evaluation),
        device=untracked(settings.device),
    message:
        "Scoring {wildcards.segmentor} on {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/evaluate_segmentor.py"


rule predict_tiles:
    input:
        checkpoint=results.checkpoint("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
        tiles=results.tiles("{dataset}", "{split}"),
    output:
        manifest=results.predictions("{dataset}", "{recipe}", "{segmentor}", "{seed}", "{split}"),
    log:
        results.log("{dataset}/predict_tiles-{recipe}-{segmentor}-{seed}-{split}"),
    benchmark:
        results.benchmark("{dataset}/predict_tiles-{recipe}-{segmentor}-{seed}-{split}")
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(240),
    params:
        **section(evaluation=settings.evaluation),
        classes=classes_of,
        device=untracked(settings.device),
    message:
        "Predicting {wildcards.dataset}/{wildcards.split} with {wildcards.segmentor} of {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/predict_tiles.py"


rule predict_scene:
    input:
        checkpoint=results.checkpoint("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
        scenes=results.scenes("{dataset}"),
    output:
        raster=results.predicted_scene("{dataset}", "{recipe}", "{segmentor}", "{seed}", "{scene}", "{suffix}"),
    log:
        results.log("{dataset}/predict_scene-{recipe}-{segmentor}-{seed}-{scene}-{suffix}"),
    benchmark:
        results.benchmark("{dataset}/predict_scene-{recipe}-{segmentor}-{seed}-{scene}-{suffix}")
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(480),
    params:
        **dataset_without("select", "split", "test", "val"),
        **section(evaluation=settings.evaluation),
        device=untracked(settings.device),
    message:
        "Predicting scene {wildcards.scene} with {wildcards.segmentor} of {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/predict_scene.py"


rule zip_predictions:
    input:
        checkpoint=results.checkpoint("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
        images=results.source_note("{dataset}", "test_images"),
    output:
        archive=results.submission("{dataset}", "{recipe}", "{segmentor}", "{seed}"),
    log:
        results.log("{dataset}/zip_predictions-{recipe}-{segmentor}-{seed}"),
    benchmark:
        results.benchmark("{dataset}/zip_predictions-{recipe}-{segmentor}-{seed}")
    wildcard_constraints:
        dataset=one_of(experiment.with_server),
    retries: RETRIES
    conda:
        "../envs/segmentor.yaml"
    resources:
        **gpus(GPU),
        mem_mb=times_attempt(16000 if GPU else 2000),
        runtime=times_attempt(1440),
    params:
        **dataset_without("select", "split", "test", "val"),
        **section(evaluation=settings.evaluation),
        device=untracked(settings.device),
    message:
        "Predicting the server's images of {wildcards.dataset} with {wildcards.segmentor} of {wildcards.recipe}, seed {wildcards.seed}"
    script:
        "../workflow_scripts/zip_predictions.py"
