# Tiles: scenes cut to one size, splits that share no ground; and a scene put back together from its tiles.


rule tile_scenes:
    input:
        scenes=f"{RESULTS}/{{dataset}}/scenes.parquet",
        ids=listed_tiles,
    output:
        manifest=f"{RESULTS}/{{dataset}}/tiles/{{split}}.parquet",
    log:
        f"{RESULTS}/logs/{{dataset}}/tile_scenes-{{split}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/tile_scenes-{{split}}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 8
    resources:
        mem_mb=more(5000),
        runtime=more(480),
    params:
        **dataset_but("palette", "test", "val"),
    message:
        "Cutting the {wildcards.split} scenes of {wildcards.dataset} into tiles"
    script:
        "../workflow_scripts/tile_scenes.py"


# Mixes are made again with it. Were they to ask for it as ancient, the engine (9.27) would overlook files that are missing behind them.
rule check_splits:
    input:
        manifests=lambda wildcards: [
            f"{RESULTS}/{wildcards.dataset}/tiles/{split}.parquet" for split in experiment.used_splits(wildcards.dataset)
        ],
    output:
        report=f"{RESULTS}/{{dataset}}/tiles/disjoint.json",
    log:
        f"{RESULTS}/logs/{{dataset}}/check_splits.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/check_splits.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=more(2000),
        runtime=more(30),
    message:
        "Checking that the splits of {wildcards.dataset} share no ground"
    script:
        "../workflow_scripts/check_splits.py"


rule mosaic_tiles:
    input:
        tiles=f"{RESULTS}/{{dataset}}/tiles/{{split}}.parquet",
    output:
        raster=f"{RESULTS}/{{dataset}}/mosaics/{{split}}/{{scene}}-{{kind}}.{{suffix}}",
    log:
        f"{RESULTS}/logs/{{dataset}}/mosaic_tiles-{{split}}-{{scene}}-{{kind}}-{{suffix}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/mosaic_tiles-{{split}}-{{scene}}-{{kind}}-{{suffix}}.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=more(2000),
        runtime=more(120),
    message:
        "Putting scene {wildcards.scene} back together"
    script:
        "../workflow_scripts/mosaic_tiles.py"
