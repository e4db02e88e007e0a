# Layouts: new masks to draw images for, beside those of the training tiles.


rule draw_layouts:
    input:
        tiles=split_of("train", results.tiles),
        pseudo_labels=pseudo_labels_of_layouts,
    output:
        manifest=results.layouts("{dataset}", "{layouts}"),
    log:
        results.log("{dataset}/draw_layouts-{layouts}"),
    benchmark:
        results.benchmark("{dataset}/draw_layouts-{layouts}")
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(120),
    params:
        layouts=lambda wildcards: layouts_of(wildcards).result_keys(),
        copies=lambda wildcards: layout_copies(settings, wildcards.layouts),
        classes=classes_of,
    message:
        "Drawing layouts {wildcards.layouts} of {wildcards.dataset}"
    script:
        "../workflow_scripts/draw_layouts.py"
