# Report: the data looked at, scores of the recipes as tables, and one page that says whether synthetic data helped.


report: "../report/workflow.rst"  # what `snakemake --report report.zip` begins with


rule draw_data_sheet:
    input:
        scenes=f"{RESULTS}/{{dataset}}/scenes.parquet",
        tiles=lambda wildcards: [
            f"{RESULTS}/{wildcards.dataset}/tiles/{split}.parquet" for split in experiment.used_splits(wildcards.dataset)
        ],
        disjoint=f"{RESULTS}/{{dataset}}/tiles/disjoint.json",
    output:
        sheet=report(
            directory(f"{RESULTS}/{{dataset}}/data_sheet"),
            patterns=["{page}.html"],
            caption="../report/data_sheet.rst",
            category="Data",
            labels={"dataset": "{dataset}"},
        ),
    log:
        f"{RESULTS}/logs/{{dataset}}/draw_data_sheet.log",
    benchmark:
        f"{RESULTS}/benchmarks/{{dataset}}/draw_data_sheet.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=more(3000),
        runtime=more(60),
    params:
        dataset=lambda wildcards: dump(dataset_of(wildcards)),
    message:
        "Drawing the data sheet of {wildcards.dataset}"
    script:
        "../workflow_scripts/draw_data_sheet.py"


rule make_table:
    input:
        scores=lambda wildcards: experiment.scores(settings.experiments[wildcards.table]),
        mixes=lambda wildcards: experiment.mixes(settings.experiments[wildcards.table]),
        generation=lambda wildcards: experiment.generation(settings.experiments[wildcards.table]),
    output:
        csv=report(
            f"{RESULTS}/tables/{{table}}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
        text=f"{RESULTS}/tables/{{table}}.txt",
    log:
        f"{RESULTS}/logs/make_table-{{table}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/make_table-{{table}}.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=more(2000),
        runtime=more(30),
    params:
        table=lambda wildcards: dump(settings.experiments[wildcards.table]),
        recipes=lambda wildcards: {name: dump(settings.recipes[name]) for name in settings.experiments[wildcards.table].recipes},
        datasets=lambda wildcards: experiment.datasets_of(settings.experiments[wildcards.table]),
        seeds=settings.seeds,
        scale=settings.scale,
        configuration=CONFIGURATION,
    message:
        "Writing table {wildcards.table}"
    script:
        "../workflow_scripts/make_table.py"


rule make_report:
    input:
        **experiment.report_files(),
        paper=str(HERE / "configs" / "paper_results.yaml"),
    output:
        page=report(f"{RESULTS}/report.html", caption="../report/page.rst", category="Findings", labels={"page": "report"}),
        figures=report(
            directory(f"{RESULTS}/figures"),
            patterns=["{figure}.png"],
            caption="../report/figures.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        f"{RESULTS}/logs/make_report.log",
    benchmark:
        f"{RESULTS}/benchmarks/make_report.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=more(16000 if GPU else 3000),
        runtime=more(60),
    params:
        settings=dump(settings),
        datasets=[dump(datasets[name]) for name in experiment.used_datasets],
        own=experiment.own,
        configuration=CONFIGURATION,
        snakefile=str(workflow.main_snakefile),
        configfiles=[str(path) for path in workflow.overwrite_configfiles],
        overrides=dict(workflow.config_settings.config),
        gpu_stages=gpu_rules(),
    message:
        "Writing the report"
    script:
        "../workflow_scripts/make_report.py"


CONFIGFILES = [str(path) for path in workflow.overwrite_configfiles]
OVERRIDES = workflow.config_settings.config_args or []

# Lists the run's files and what is left of them, by the same engine and configuration.
LISTING = [sys.executable, "-m", "snakemake", "--snakefile", str(workflow.main_snakefile), "--nolock", "--summary"]
LISTING += ["--configfile", *CONFIGFILES] if CONFIGFILES else []
LISTING += ["--config", *OVERRIDES] if OVERRIDES else []


rule plan:
    log:
        ".snakemake/log/plan.log",  # nor into the results: a plan makes nothing
    localrule: True
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=more(2000),
        runtime=more(10),
    params:
        settings=dump(settings),
        datasets=[dump(dataset) for dataset in datasets.values()],
        rates=str(HERE / "configs" / "rates.yaml"),
        listing=LISTING,
        rules=files_of_rules,
        gpu_rules=lambda wildcards: gpu_rules(),
        cores=lambda wildcards: workflow.resource_settings.cores or workflow.resource_settings.nodes,
        gpus=lambda wildcards: gpu_limit() or workflow.resource_settings.nodes,
    message:
        "Planning the remaining jobs"
    script:
        "../workflow_scripts/plan.py"


rule preflight:
    log:
        ".snakemake/log/preflight.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=more(2000),
        runtime=more(10),
    params:
        settings=dump(settings),
        datasets=[dump(dataset) for dataset in datasets.values()],
        rates=str(HERE / "configs" / "rates.yaml"),
        listing=LISTING,
        rules=files_of_rules,
        gpu_rules=lambda wildcards: gpu_rules(),
        gpu_limit=lambda wildcards: gpu_limit(),
        local=lambda wildcards: workflow.local_exec,
        software=lambda wildcards: software(),
    message:
        "Checking what the run needs"
    script:
        "../workflow_scripts/preflight.py"
