# Report: the data looked at, scores of the recipes as tables, and one page that says whether synthetic data helped.


from crfm_core.reporting.sections import report_files


report: "../report/workflow.rst"  # what `snakemake --report report.zip` begins with


rule draw_data_sheet:
    input:
        scenes=results.scenes("{dataset}"),
        tiles=used_tiles,
        disjoint=results.disjoint("{dataset}"),
    output:
        sheet=report(
            directory(results.data_sheet("{dataset}")),
            patterns=["{page}.html"],
            caption="../report/data_sheet.rst",
            category="Data",
            labels={"dataset": "{dataset}"},
        ),
    log:
        results.log("{dataset}/draw_data_sheet"),
    benchmark:
        results.benchmark("{dataset}/draw_data_sheet")
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=times_attempt(3000),
        runtime=times_attempt(60),
    params:
        dataset=lambda wildcards: dataset_of(wildcards).result_keys(),
    message:
        "Drawing the data sheet of {wildcards.dataset}"
    script:
        "../workflow_scripts/draw_data_sheet.py"


rule make_table:
    input:
        scores=lambda wildcards: experiment.scores(table_of(wildcards)),
        mixes=lambda wildcards: experiment.mixes(table_of(wildcards)),
        generation=lambda wildcards: experiment.generation(table_of(wildcards)),
    output:
        csv=report(
            results.table("{table}"),
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
        text=results.table_text("{table}"),
    log:
        results.log("make_table-{table}"),
    benchmark:
        results.benchmark("make_table-{table}")
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(30),
    params:
        table=lambda wildcards: table_of(wildcards).result_keys(),
        recipes=lambda wildcards: {name: settings.recipes[name].result_keys() for name in table_of(wildcards).recipes},
        datasets=lambda wildcards: experiment.datasets_of(table_of(wildcards)),
        seeds=settings.seeds,
        scale=settings.scale,
        configuration=CONFIGURATION,
    message:
        "Writing table {wildcards.table}"
    script:
        "../workflow_scripts/make_table.py"


rule make_report:
    input:
        results=report_files(experiment),
        paper=str(HERE / "configs" / "paper_results.yaml"),
    output:
        page=report(results.report(), caption="../report/page.rst", category="Findings", labels={"page": "report"}),
        figures=report(
            directory(results.figures()),
            patterns=["{figure}.png"],
            caption="../report/figures.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        results.log("make_report"),
    benchmark:
        results.benchmark("make_report")
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=times_attempt(16000 if GPU else 3000),
        runtime=times_attempt(60),
    params:
        settings=settings.result_keys(),
        datasets=[dataset.result_keys() for dataset in datasets.values()],
        configuration=CONFIGURATION,
        snakefile=str(workflow.main_snakefile),
        configfiles=[str(path) for path in workflow.overwrite_configfiles],
        overrides=dict(workflow.config_settings.config),
        gpu_stages=gpu_rules(),
    message:
        "Writing the report"
    script:
        "../workflow_scripts/make_report.py"
