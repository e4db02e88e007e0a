"""The report: one HTML page that needs nothing beside it, the answer first."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import yaml
from jinja2 import Environment

import crfm_core
from crfm_core import DataError
from crfm_core.experiment import selected_tables
from crfm_core.files import atomic_path, write_text
from crfm_core.layout import Layout
from crfm_core.planning.durations import duration, hours
from crfm_core.reporting import figures as draw
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.costs import of_cost, read_stages
from crfm_core.reporting.findings import caveats, number
from crfm_core.reporting.material import ONE_EACH, SEVERAL, Material, read_material
from crfm_core.reporting.published import parts_beside, read_published
from crfm_core.reporting.rendering import Pictures, environment
from crfm_core.reporting.sections.answers import answer, other_statements
from crfm_core.reporting.sections.corrections import notes_on_samples, sampler_line, show_corrections, show_forms
from crfm_core.reporting.sections.curation import show_curation
from crfm_core.reporting.sections.data import show_data
from crfm_core.reporting.sections.gallery import show_failures, show_sheets
from crfm_core.reporting.sections.run import hardware, recipe_rows, sampler_rows
from crfm_core.reporting.sections.samples import show_agreement, show_generation
from crfm_core.reporting.sections.scores import Shown, count_intervals, show_table
from crfm_core.reporting.tables import SCORES, VERSIONS, read_table
from crfm_core.settings import Dataset, Settings

#: What the report is written from, by kind.
KINDS = ("tables", *ONE_EACH, *SEVERAL)


def make_report(
    inputs: Mapping[str, list[Path]],
    paper: Path,
    settings: Settings,
    datasets: list[Dataset],
    own: list[str],
    configuration: str,
    command: str,
    gpu_stages: Collection[str],
    results: Path,
    page: Path,
    figures: Path,
) -> None:
    """Write the page and, beside it, the folder of its figures (PNG and SVG each).

    Args:
        inputs: files by kind (:data:`KINDS`); a kind that is not there has none.
            tables: CSV files of :func:`crfm_core.reporting.tables.make_table`, one for each selected table, named like it.
            tiles, data_sheets, reconstruction: one per dataset, in the order of ``datasets``: the captioned manifest of the training
            tiles, the folder of :func:`crfm_core.reporting.data_sheet.draw_data_sheet`, {results}/{dataset}/agreement/reconstruction.json.
            synthetic: {results}/{dataset}/synthetic/{control}/{sampler}/all.parquet.
            filtered, resampled: {results}/{dataset}/filtered/{control}/{sampler}/{filter}.parquet, and
            {results}/{dataset}/resampled/{control}/{sampler}/{filter or "none"}/{re-sampling}.parquet.
            mixes: {results}/{dataset}/mixes/{recipe}.parquet.
            agreement, generation: {results}/{dataset}/agreement/{control}/{sampler}.json, and the same in the folder generation.
            validation: {results}/{dataset}/validation/{control}/final.json.
            comparison: {results}/{dataset}/comparison/{preset}.json of :func:`crfm_core.sampling.comparison.compare_corrections`; none
            where ``settings.comparison`` is None.
        paper: YAML of published figures, shown in tables of their own.
        datasets: those of the tables.
        own: names of the run's datasets. Others, which only an experiment names, are shown in short; those of a table that names none.
        command: what makes a file of the workflow, with {target} for its name; shown below each table.
        gpu_stages: names of the stages whose jobs hold a GPU.
        results: folder of all results; benchmark files below it tell the time each stage took.

    Raises DataError naming the file when an input is missing or incomplete.
    """
    inputs = {kind: [Path(path) for path in inputs.get(kind, [])] for kind in KINDS}
    frames = _read_tables(inputs["tables"], settings)
    published = read_published(paper)
    stages = read_stages(Path(Layout(results).benchmarks()), gpu_stages, settings)
    materials = [read_material(dataset, results, index, inputs, settings) for index, dataset in enumerate(datasets)]
    _lead(materials, own, settings, frames)
    colours, by_name = Colours(settings), {dataset.name: dataset for dataset in datasets}
    with atomic_path(figures) as folder:
        folder.mkdir()
        show = Pictures(folder, figures)
        tables = []
        for name, (source, frame) in frames.items():
            beside = parts_beside(name, settings.experiments[name], published, paper)
            tables.append(show_table(name, frame, source, by_name, own, settings, beside, colours, show, command))
        sections = [_dataset_section(material, tables, settings, colours, show) for material in materials]
        main = [section for section in sections if not section["folded"]]
        first = next(iter(frames.values()))[1].iloc[0]
        leading = {name for material in materials if not material.folded for name in material.leading}
        template = _environment().get_template("page.html")
        html = template.render(
            settings=settings,
            sections=sections,
            main=main,
            folded=[section for section in sections if section["folded"]],
            tables=tables,
            others=other_statements(tables, [section["leading"] for section in main if section["leading"]]),
            cost=of_cost(stages),
            caveats=caveats(settings, any(d.source.kind == "embedded" for d in datasets), count_intervals(tables)),
            published=published,
            paper=f"{paper.parent.name}/{paper.name}",
            recipes=recipe_rows(settings, leading),
            samplers=sampler_rows(settings, leading),
            stages=stages,
            benchmarks=Path(Layout(results).benchmarks()),
            hardware=hardware(settings.device),
            configuration=configuration,
            command=command.replace("{target}", str(page)),
            dump=yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            versions={"crfm_core": crfm_core.__version__, "Python": platform.python_version(), **{name: first[name] for name in VERSIONS}},
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            figures=figures,
            scores=SCORES,
        )
    write_text(page, html)


def _read_tables(paths: list[Path], settings: Settings) -> dict[str, tuple[Path, pd.DataFrame]]:
    """The tables by name, in the order in which the configuration selects them."""
    by_name = {path.stem: path for path in paths}
    if missing := [name for name in selected_tables(settings) if name not in by_name]:
        raise DataError(f"tables/{missing[0]}.csv: not among the tables given, and `tables` names it; build it, or take it out there")
    return {name: (by_name[name], read_table(by_name[name])) for name in selected_tables(settings)}


def _lead(materials: list[Material], own: list[str], settings: Settings, frames: dict[str, tuple[Path, pd.DataFrame]]) -> None:
    """Say of each dataset which recipes lead, those of its first table, and whether it is shown in short."""
    for material in materials:
        name = material.dataset.name
        leading = next((table.recipes for key, table in selected_tables(settings).items() if (frames[key][1].dataset == name).any()), None)
        if leading is None:
            raise DataError(f"{material.root}: no table has rows of dataset {name}; build the tables again")
        material.leading = leading
        material.folded = name not in own
    if all(material.folded for material in materials):
        materials[0].folded = False


def _dataset_section(material: Material, tables: list[Shown], settings: Settings, colours: Colours, show: Pictures) -> dict:
    dataset = material.dataset
    answers, leading = answer(material, tables, settings)
    draw.class_legend(dataset.classes, dataset.palette, show.folder, f"{dataset.name}-legend")
    return {
        "dataset": dataset,
        "folded": material.folded,
        "answers": answers,
        "leading": leading,
        "data": show_data(material),
        "curation": show_curation(material, settings, colours, show),
        "failures": show_failures(material, settings, show),
        "agreement": show_agreement(material, settings, colours, show),
        "generation": show_generation(material),
        "validation": material.validation,
        "forms": show_forms(material, show),
        "sheets": show_sheets(material, settings, show),
        "corrections": show_corrections(material, colours, show),
        "notes": notes_on_samples(material),
        "generators": {material.name_of(key): sorted(set(table.generator)) for key, table in material.synthetic.items()},
        "samples": {material.name_of(key): len(table) for key, table in material.synthetic.items()},
        "paths": material.files,
    }


def _spread(mean: float | None, sd: float | None = None, digits: int = 1) -> str:
    text = number(mean, digits=digits)
    return text if sd is None or pd.isna(sd) or text == "–" else f"{text} ± {number(sd, digits=digits)}"


def _environment() -> Environment:
    """The templates, with what only this page writes."""
    found = environment()
    found.filters |= {"duration": duration, "hours": hours, "sampler": sampler_line}
    found.globals |= {"spread": _spread}
    return found
