# Planning: what a run still takes, and what stands in its way, before it. Both rules make nothing.

CONFIGFILES = [str(path) for path in workflow.overwrite_configfiles]
OVERRIDES = workflow.config_settings.config_args or []

# Lists the run's files and what is left of them, by the same engine and configuration.
LISTING = [sys.executable, "-m", "snakemake", "--snakefile", str(workflow.main_snakefile), "--nolock", "--summary"]
LISTING += ["--configfile", *CONFIGFILES] if CONFIGFILES else []
LISTING += ["--config", *OVERRIDES] if OVERRIDES else []


RUN = {
    "settings": settings.result_keys(),
    "datasets": [dataset.result_keys() for dataset in datasets.values()],
    "rates": str(HERE / "configs" / "rates.yaml"),
    "listing": LISTING,
    "rules": files_of_rules,
    "gpu_rules": lambda wildcards: gpu_rules(),
}


rule plan:
    log:
        ".snakemake/log/plan.log",  # nor into the results: a plan makes nothing
    localrule: True
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=times_attempt(2000),
        runtime=times_attempt(10),
    params:
        **RUN,
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
        mem_mb=times_attempt(2000),
        runtime=times_attempt(10),
    params:
        **RUN,
        gpu_limit=lambda wildcards: gpu_limit(),
        local=lambda wildcards: workflow.local_exec,
        software=lambda wildcards: software(),
    message:
        "Checking what the run needs"
    script:
        "../workflow_scripts/preflight.py"
