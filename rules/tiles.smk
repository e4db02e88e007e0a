# Tiles: scenes cut to one size, splits that share no ground; and a scene put back together from its tiles.


rule tile_scenes:
    input:
        scenes=results.scenes("{dataset}"),
        ids=listed_tiles,
    output:
        manifest=results.tiles("{dataset}", "{split}"),
    log:
        results.log("{dataset}/tile_scenes-{split}"),
    benchmark:
        results.benchmark("{dataset}/tile_scenes-{split}")
    conda:
        "../envs/data.yaml"
    threads: 8
    resources:
        mem_mb=times_attempt(5000),
        runtime=times_attempt(480),
    params:
        **dataset_without("palette", "test", "val"),
    message:
        "Tiling {wildcards.dataset}/{wildcards.split}"
    script:
        "../workflow_scripts/tile_scenes.py"


# Mixes are made again with it. Were they to ask for it as ancient, the engine (9.27) would overlook files that are missing behind them.
rule check_splits:
    input:
        manifests=used_tiles,
    output:
        report=results.disjoint("{dataset}"),
    log:
        results.log("{dataset}/check_splits"),
    benchmark:
        results.benchmark("{dataset}/check_splits")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(30),
    params:
        train=lambda wildcards: dataset_of(wildcards).train,
    message:
        "Checking that splits of {wildcards.dataset} share no ground"
    script:
        "../workflow_scripts/check_splits.py"


rule mosaic_tiles:
    input:
        tiles=results.tiles("{dataset}", "{split}"),
    output:
        raster=results.mosaic("{dataset}", "{split}", "{scene}", "{kind}", "{suffix}"),
    log:
        results.log("{dataset}/mosaic_tiles-{split}-{scene}-{kind}-{suffix}"),
    benchmark:
        results.benchmark("{dataset}/mosaic_tiles-{split}-{scene}-{kind}-{suffix}")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(120),
    message:
        "Joining tiles of scene {wildcards.scene}"
    script:
        "../workflow_scripts/mosaic_tiles.py"
