# Report: the data looked at, scores of the recipes as tables, and one page that says whether synthetic data helped.


rule draw_data_sheet:
    input:
        scenes=f"{RESULTS}/{{dataset}}/scenes.parquet",
        tiles=lambda wildcards: [f"{RESULTS}/{wildcards.dataset}/tiles/{split}.parquet" for split in used_splits(wildcards)],
        disjoint=f"{RESULTS}/{{dataset}}/tiles/disjoint.json",
    output:
        sheet=directory(f"{RESULTS}/{{dataset}}/data_sheet"),
    log:
        f"{RESULTS}/logs/{{dataset}}/draw_data_sheet.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/draw_data_sheet.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        dataset=lambda wildcards: dump(dataset_of(wildcards)),
    message:
        "Drawing the data sheet of {wildcards.dataset}"
    script:
        "../workflow_scripts/draw_data_sheet.py"


rule make_table:
    input:
        scores=lambda wildcards: scores_of(settings.tables[wildcards.table]),
    output:
        csv=f"{RESULTS}/tables/{{table}}.csv",
        text=f"{RESULTS}/tables/{{table}}.txt",
    log:
        f"{RESULTS}/logs/make_table-{{table}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/make_table-{{table}}.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        table=lambda wildcards: dump(settings.tables[wildcards.table]),
        datasets=list(datasets),
        seeds=settings.seeds,
        scale=settings.scale,
        configuration=CONFIGURATION,
    message:
        "Writing table {wildcards.table}"
    script:
        "../workflow_scripts/make_table.py"


rule make_report:
    input:
        tables=expand(f"{RESULTS}/tables/{{table}}.csv", table=settings.tables),
        tiles=[f"{RESULTS}/{name}/captions/{dataset.train}.parquet" for name, dataset in datasets.items()],
        data_sheets=[f"{RESULTS}/{name}/data_sheet" for name in datasets],
        synthetic=[f"{RESULTS}/{name}/synthetic/{c}/{s}/all.parquet" for name in datasets for c, s in generated()],
        filtered=[f"{RESULTS}/{name}/filtered/{c}/{s}/{f}.parquet" for name in datasets for c, s, f in filtered()],
        agreement=[f"{RESULTS}/{name}/agreement/{c}/{s}.json" for name in datasets for c, s in generated()],
        reconstruction=[f"{RESULTS}/{name}/agreement/reconstruction.json" for name in datasets],
        validation=[f"{RESULTS}/{name}/validation/{c}/final.json" for name in datasets for c in used_controls()],
        comparison=compared_corrections(),
        paper=str(HERE / "configs" / "paper_results.yaml"),
    output:
        page=f"{RESULTS}/report.html",
        figures=directory(f"{RESULTS}/figures"),
    log:
        f"{RESULTS}/logs/make_report.log",
    benchmark:
        f"{RESULTS}/benchmarks/make_report.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        settings=dump(settings),
        datasets=[dump(dataset) for dataset in datasets.values()],
        configuration=CONFIGURATION,
    message:
        "Writing the report"
    script:
        "../workflow_scripts/make_report.py"
