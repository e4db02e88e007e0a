# From few labelled scenes to a better segmentor: `snakemake --cores all` runs everything and writes the report.
# One stage alone: name its file, e.g. `snakemake --cores all results/embedded/tiles/train.parquet` (docs/stages-and-targets.md).

from snakemake.utils import min_version

min_version("9.27")


# A file given by --configfile stands alone; it does not mix with the embedded default.
if not workflow.overwrite_configfiles:

    configfile: workflow.source_path("config.yaml")


include: "rules/common.smk"
include: "rules/inputs.smk"
include: "rules/engine.smk"
include: "rules/fetching.smk"
include: "rules/scenes.smk"
include: "rules/tiles.smk"
include: "rules/text.smk"
include: "rules/generator.smk"
include: "rules/segmentor.smk"
include: "rules/layouts.smk"
include: "rules/synthesis.smk"
include: "rules/curation.smk"
include: "rules/report.smk"
include: "rules/planning.smk"


rule all:
    default_target: True
    input:
        tables=[results.table(name) for name in experiment.tables],
        report=results.report(),
        stages=experiment.stage_files(),
