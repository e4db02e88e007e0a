"""The report: one HTML page that needs nothing beside it, the answer first."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment

import crfm_core
from crfm_core import DataError
from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.files import atomic_path, read_json, write_text
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.reporting import figures as draw
from crfm_core.reporting.comparison import best_form, read_comparison
from crfm_core.reporting.data_sheet import read_data_sheet, shown_picture
from crfm_core.reporting.findings import Finding, against_baseline, caveats, number, of_rectification, rectified_pairs
from crfm_core.reporting.rendering import embed, environment
from crfm_core.reporting.tables import SCORES, VERSIONS, read_table
from crfm_core.settings import PRESETS, Dataset, RectifySettings, Sampler, Settings

SHEET_ROWS = 6
Key = tuple[str, str]  #: control, sampler


def make_report(
    tables: list[Path],
    tiles: list[Path],
    data_sheets: list[Path],
    synthetic: list[Path],
    filtered: list[Path],
    agreement: list[Path],
    reconstruction: list[Path],
    validation: list[Path],
    comparison: list[Path],
    paper: Path,
    settings: Settings,
    datasets: list[Dataset],
    configuration: str,
    results: Path,
    page: Path,
    figures: Path,
) -> None:
    """Write the page and, beside it, the folder of its figures (PNG and SVG each).

    Args:
        tables: CSV files of :func:`crfm_core.reporting.tables.make_table`, named like the tables of ``settings``.
        tiles, data_sheets, reconstruction: one per dataset, in the order of ``datasets``: the captioned manifest of the training tiles,
            the folder of :func:`crfm_core.reporting.data_sheet.draw_data_sheet`, {results}/{dataset}/agreement/reconstruction.json.
        synthetic: {results}/{dataset}/synthetic/{control}/{sampler}/all.parquet.
        filtered: {results}/{dataset}/filtered/{control}/{sampler}/{filter}.parquet.
        agreement: {results}/{dataset}/agreement/{control}/{sampler}.json.
        validation: {results}/{dataset}/validation/{control}/final.json.
        comparison: {results}/{dataset}/comparison/{preset}.json of :func:`crfm_core.sampling.comparison.compare_corrections`; none
            where ``settings.comparison`` is None.
        paper: YAML of published figures, shown in tables of their own.
        results: folder of all results; benchmark files below it tell the time each stage took.

    Raises DataError naming the file when an input is missing or incomplete.
    """
    frames = {path.stem: read_table(path) for path in tables}
    sources = {path.stem: str(path) for path in tables}
    published = _read_paper(paper)
    colours = _colours(settings)
    with atomic_path(figures) as folder:
        folder.mkdir()
        show = Pictures(folder, figures)
        sections = []
        for index, dataset in enumerate(datasets):
            material = Material(
                dataset,
                results=results,
                tiles=tiles[index],
                data_sheet=data_sheets[index],
                synthetic={_key(path): path for path in synthetic if path.parts[-5] == dataset.name},
                filtered={(*_key(path), path.stem): path for path in filtered if path.parts[-5] == dataset.name},
                agreement={(path.parts[-2], path.stem): path for path in agreement if path.parts[-4] == dataset.name},
                reconstruction=reconstruction[index],
                validation={path.parts[-2]: path for path in validation if path.parts[-4] == dataset.name},
                comparison=[path for path in comparison if settings.comparison and path.parts[-3] == dataset.name],
            )
            sections.append(_dataset_section(material, frames, sources, settings, colours, show))
        comparisons = sum(len(table.recipes) - 1 for table in settings.tables.values() if table.baseline) * len(datasets)
        invented = any(dataset.source.kind == "embedded" for dataset in datasets)
        first = next(iter(frames.values())).iloc[0]
        html = (
            _environment()
            .get_template("page.html")
            .render(
                settings=settings,
                sections=sections,
                caveats=caveats(settings, invented, comparisons),
                tables=[_paper_table(name, table, published, paper) for name, table in settings.tables.items()],
                recipes=_recipe_rows(settings),
                samplers={
                    name: sampler
                    for name, sampler in settings.samplers.items()
                    if any(r.sampler == name for r in settings.recipes.values())
                },
                stages=_stages(Path(results) / "benchmarks"),
                benchmarks=Path(results) / "benchmarks",
                hardware=_hardware(settings.device),
                configuration=configuration,
                dump=yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
                versions={
                    "crfm_core": crfm_core.__version__,
                    "Python": platform.python_version(),
                    **{name: first[name] for name in VERSIONS},
                },
                written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
                figures=figures,
                scores=SCORES,
            )
        )
    write_text(page, html)


def _key(path: Path) -> Key:
    return path.parts[-3], path.parts[-2]


class Pictures:
    """Turns figures saved in a folder into what a page can hold: data, and the name under which they will lie."""

    def __init__(self, folder: Path, final: Path):
        self.folder, self.final = folder, final

    def __call__(self, name: str, alt: str, suffix: str = "svg") -> dict:
        return embed(self.folder / f"{name}.{suffix}", alt, Path(self.final) / f"{name}.{suffix}")


class Material:
    """What was made of one dataset: the files, and their contents where several parts of the page need them."""

    def __init__(
        self,
        dataset: Dataset,
        results: Path,
        tiles: Path,
        data_sheet: Path,
        synthetic: dict,
        filtered: dict,
        agreement: dict,
        reconstruction: Path,
        validation: dict[str, Path],
        comparison: list[Path],
    ):
        self.dataset, self.root = dataset, Path(results) / dataset.name
        self.files = {"tiles": tiles, "data_sheet": data_sheet, "synthetic": synthetic, "filtered": filtered}
        self.files |= {"agreement": agreement, "reconstruction": reconstruction, "validation": validation, "comparison": comparison}
        self.tiles, self.data_sheet = read_manifest(tiles), read_data_sheet(data_sheet)
        self.synthetic: dict[Key, pd.DataFrame] = {key: read_manifest(path) for key, path in synthetic.items()}
        self.filtered: dict[tuple, pd.DataFrame] = {key: read_manifest(path) for key, path in filtered.items()}
        self.agreement: dict[Key, dict] = {key: _read(path, "critic", "judge") for key, path in agreement.items()}
        self.reconstruction = _read(reconstruction, "tiles", "real", "reconstructed")
        self.comparison = read_comparison(comparison) if comparison else None
        self.validation = {control: _read(path, "loss", "loss_mask_ignored", "tiles") for control, path in validation.items()}

    def name_of(self, key: Key) -> str:
        """The sampler, with the control only where several are compared."""
        return key[1] if len({control for control, _ in self.synthetic}) == 1 else f"{key[0]}, {key[1]}"


def _read(path: Path, *keys: str) -> dict:
    found = read_json(path)
    if missing := [key for key in keys if key not in found]:
        raise DataError(f"{path}: {', '.join(missing)} missing; delete it and run the workflow again")
    return found


def _colours(settings: Settings) -> dict:
    """One colour per recipe and, the same one, per (control, sampler) it uses: greys are real tiles only."""
    greys, vivid, colours = 0, 0, {}
    for name, recipe in settings.recipes.items():
        if recipe.control is None:
            colours[name] = draw.GREYS[greys % len(draw.GREYS)]
            greys += 1
        else:
            colours[name] = draw.COLOURS[vivid % len(draw.COLOURS)]
            colours.setdefault((recipe.control, recipe.sampler), colours[name])
            vivid += 1
    return colours


# ------------------------------------------------------------------------------------------------- a dataset's sections


def _dataset_section(
    material: Material, frames: dict[str, pd.DataFrame], sources: dict[str, str], settings: Settings, colours: dict, show: Pictures
) -> dict:
    dataset, folder = material.dataset, show.folder
    comparisons, answers, told = [], [], set()
    for index, (name, frame) in enumerate(frames.items()):
        table, rows = settings.tables[name], frame[frame.dataset == dataset.name]
        if rows.empty:
            raise DataError(f"{sources[name]}: no rows of dataset {dataset.name}; delete it and build it again")
        finding = against_baseline(rows, table.title, settings.recipes)
        pairs = [pair for pair in rectified_pairs(settings, list(rows.recipe)) if pair not in told]
        told.update(pairs)
        effects = [of_rectification(rows, *pair, settings, material.agreement) for pair in pairs]
        bars = draw.per_class_bars(rows, dataset.classes, colours, folder, f"{dataset.name}-{name}-classes")
        differences = None
        if finding:
            drawn = draw.difference_plot(rows, table.baseline, colours, folder, f"{dataset.name}-{name}-differences")
            differences = show(drawn, f"mIoU of each recipe minus {table.baseline}: every seed, the mean and its 95 % interval")
        comparison = {
            "title": table.title,
            "finding": finding,
            "rows": rows.to_dict("records"),
            "baseline": table.baseline,
            "differences": differences,
            "bars": show(bars, "IoU per class and recipe, in percent, with the standard deviation over seeds"),
            "source": sources[name],
            "scores": f"{material.root}/segmentors/RECIPE/{table.segmentor}/seedN/scores.json",
            "segmentor": table.segmentor,
        }
        comparisons.append(comparison)
        answers += [*([finding] if finding and index == 0 else []), *effects]
    draw.class_legend(dataset.classes, dataset.palette, folder, f"{dataset.name}-legend")
    return {
        "dataset": dataset,
        "answers": answers or [Finding(next(iter(frames)), "No comparison was asked for", "open")],
        "comparisons": comparisons,
        "agreement": _agreement(material, settings, colours, show),
        "validation": material.validation,
        "forms": _forms(material, show),
        "sheet": _sheet(material, show),
        "corrections": _corrections(material, colours, show),
        "notes": _notes(material),
        "data": _data(material),
        "generators": {material.name_of(key): sorted(set(table.generator)) for key, table in material.synthetic.items()},
        "samples": {material.name_of(key): len(table) for key, table in material.synthetic.items()},
        "files": material.files,
    }


def _agreement(material: Material, settings: Settings, colours: dict, show: Pictures) -> dict:
    """Images against their masks: real training tiles, the same through the autoencoder, and every sampler's images."""
    rows, bars = [], []
    for kind, label in (("real", "real training tiles"), ("reconstructed", "the same through the autoencoder")):
        scores = material.reconstruction[kind]
        rows.append(
            {"label": label, "tiles": material.reconstruction["tiles"], "copies": None, **{who: scores[who] for who in ("judge", "critic")}}
        )
        bars.append(
            {"label": label, "colour": draw.GREYS[kind == "real"], **{who: [_float(scores[who]["mIoU"])] for who in ("judge", "critic")}}
        )
    for key, found in material.agreement.items():
        label, whos = f"samples: {material.name_of(key)}", {who: found[who] for who in ("judge", "critic")}
        rows.append({"label": label, "tiles": found["tiles"], "copies": len(found["judge"]["copies"]), **whos})
        values = {who: [_float(copy["mIoU"]) for copy in scores["copies"]] for who, scores in whos.items()}
        bars.append({"label": label, "colour": colours.get(key, draw.COLOURS[-1]), **values})
    name = draw.agreement_bars(bars, "mIoU", show.folder, f"{material.dataset.name}-agreement")
    recipe = settings.recipes.get(settings.judge.recipe)  # none for a judge from elsewhere
    split = recipe and (recipe.split or material.dataset.train)
    return {
        "rows": rows,
        "figure": show(name, "Agreement of images with their masks, by the independent judge and by the guiding critic"),
        "judge_saw_the_masks": split == material.dataset.train,
        "judge_split": split,
        "judge": settings.judge,
        "critic": settings.critic,
    }


def _float(value: float | None) -> float:
    return float("nan") if value is None else value


def _sheet(material: Material, show: Pictures) -> dict:
    """Real tiles chosen by their classes, each with the first sample of every sampler and its filtered label."""
    dataset, root, tiles = material.dataset, material.root, material.tiles
    images, labels = (paths_of(material.files["tiles"], tiles, column, root) for column in ("image", "label"))
    columns, lookups = ["mask", "real tile"], []
    for key, table in material.synthetic.items():
        columns.append(material.name_of(key))
        lookups.append((_firsts(material.files["synthetic"][key], table, "image", root), read_rgb))
    for key, table in material.filtered.items():
        columns.append(f"{material.name_of(key[:2])}, filtered")
        lookups.append(
            (_firsts(material.files["filtered"][key], table, "label", root), lambda path: paint(read_label(path), dataset.palette))
        )
    rows = []
    for row in draw.choose_tiles(tiles, SHEET_ROWS):
        tile_id = tiles.tile_id.iloc[row]
        pictures = [paint(read_label(labels[row]), dataset.palette), read_rgb(images[row])]
        pictures += [read(found[tile_id]) if tile_id in found else None for found, read in lookups]
        rows.append((tile_id, pictures))
    name = draw.sample_sheet(draw.Sheet(columns, rows), dataset.classes, dataset.palette, show.folder, f"{dataset.name}-samples")
    return {
        "figure": show(name, f"Masks, real tiles and samples, one tile per row; columns: {', '.join(columns)}", "png"),
        "tiles": [name for name, _ in rows],
    }


def _firsts(manifest: Path, table: pd.DataFrame, column: str, root: Path) -> dict[str, Path]:
    """The file of the first copy made for each mask."""
    first = table[table["copy"] == table["copy"].min()]
    return dict(zip(first.mask_of, paths_of(manifest, first, column, root), strict=True))


def _corrections(material: Material, colours: dict, show: Pictures) -> dict | None:
    """What the critic saw while it corrected, averaged over images; None when nothing was corrected."""
    found = {}
    for key, table in material.synthetic.items():
        if records := [record for text in table.corrections for record in json.loads(text)]:
            found[key] = pd.DataFrame(records).astype(float)  # None: not measured
    if not found:
        return None
    curves = {material.name_of(key): frame.groupby("step", as_index=False).mean() for key, frame in found.items()}
    hues = {material.name_of(key): colours.get(key, draw.COLOURS[-1]) for key in found}
    name = draw.correction_curves(curves, hues, show.folder, f"{material.dataset.name}-corrections")
    rows = []
    for key, frame in found.items():
        table = material.synthetic[key]
        row = {"sampler": material.name_of(key), "steps": frame.step.nunique(), "corrections": len(frame) / len(table)}
        row |= {when: float(table[f"critic_loss_{when}"].astype(float).mean()) for when in ("before", "after")}
        rows.append(row | {"gradient": frame.gradient_ratio.mean(), "clamp": frame.clamp_ratio.mean()})
    return {"figure": show(name, "The critic's loss before and after each corrected step, and the size of the change"), "rows": rows}


def _notes(material: Material) -> list[str]:
    """How many samples of each sampler carry which note."""
    told = []
    for key, table in material.synthetic.items():
        counts = table.note[table.note.astype(bool)].value_counts()
        told += [f"{material.name_of(key)}: {count} of {len(table)} samples: {note}" for note, count in counts.items()]
    return told


def _forms(material: Material, show: Pictures) -> dict | None:
    """The forms of the correction side by side; None when they were not compared."""
    compared = material.comparison
    if compared is None:
        return None
    name, plain = material.dataset.name, compared.rows[0]
    levels, curves, notes = {}, {}, []
    for preset in compared.presets[1:]:
        rows = compared.of(preset)
        points = [{"steps": row.form.steps} for row in (plain, *rows)]
        for point, row in zip(points, (plain, *rows), strict=True):
            for who in ("judge", "critic"):
                point[who], point[f"{who}_sd"] = row.spread(who, "mIoU")
        levels[preset] = pd.DataFrame(points).sort_values("steps")
        longest = max(rows, key=lambda row: row.form.steps).form
        if longest.by_step:
            curves[f"{preset} ({longest.steps} steps)"] = pd.DataFrame(longest.by_step).astype(float)
        samples = compared.masks * len(compared.seeds)
        notes += [f"{row.name}: {count} of {samples} samples: {note}" for row in rows for note, count in row.form.notes.items()]
    drawn = draw.levels_by_steps(levels, "mIoU", show.folder, f"{name}-forms")
    steps = curves and draw.corrections_by_step(curves, show.folder, f"{name}-forms-steps")
    return {
        "compared": compared,
        "finding": best_form(compared),
        "levels": show(drawn, "mIoU over the number of corrected steps for each form of the correction, by judge and critic"),
        "steps": show(steps, "Critic's loss before and after each correction, and the velocity's changes, per form") if steps else None,
        "notes": notes,
        "settings": {preset: _correction_line(PRESETS[preset]()) for preset in compared.presets[1:]},
    }


def _data(material: Material) -> dict:
    """The dataset's sheet with its pictures, and the share of each class's synthetic pixels that the filter kept."""
    sheet, folder, train = material.data_sheet, material.files["data_sheet"], material.dataset.train
    wanted = {"contact": sheet.of_kind("contact", train), "shares": sheet.of_kind("shares"), "scenes": sheet.of_kind("scenes")}
    if missing := [kind for kind, picture in wanted.items() if picture is None]:
        raise DataError(f"{folder}/data_sheet.json: no picture of {missing[0]} for {train}; delete the folder and run the workflow again")
    kept = []
    for key, table in material.filtered.items():
        after, before = _pixels(table), _pixels(material.synthetic[key[:2]]) if key[:2] in material.synthetic else _pixels(table) * 0
        with np.errstate(divide="ignore", invalid="ignore"):
            share = [_nullable(value) for value in 100 * after / before]
        kept.append({"name": f"{material.name_of(key[:2])}, {key[2]}", "shares": share, "all": 100 * float(table.kept.mean())})
    return {"sheet": sheet, "kept": kept, **{kind: shown_picture(folder, picture) for kind, picture in wanted.items()}}


def _pixels(table: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(counts, float) for counts in table.pixels]).sum(axis=0)


def _nullable(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# -------------------------------------------------------------------------------------------------- the run as a whole


def _read_paper(path: Path) -> dict:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it ships with the workflow, restore it") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML: {error}") from None


def _paper_table(name: str, table: object, published: dict, path: Path) -> dict:
    """The published figures that belong beside a table, None when it names none."""
    if table.paper is None:
        return {"name": name, "paper": None}
    known = published.get("tables") or {}
    if table.paper not in known:
        raise DataError(f"{path}: has no table {table.paper!r}, which tables.{name}.paper names; it has: {', '.join(known) or '(none)'}")
    return {
        "name": name,
        "paper": known[table.paper],
        "source": published.get("source", "source not given"),
        "file": f"{path.parent.name}/{path.name}",
    }


def _recipe_rows(settings: Settings) -> list[dict]:
    """What each compared or judging recipe trains on, and for how long with each segmentor that meets it."""
    uses: dict[str, dict[str, int]] = {}
    for table in settings.tables.values():
        for name in table.recipes:
            uses.setdefault(name, {})[table.segmentor] = settings.iterations(name, table.segmentor)
    for one in (settings.critic, settings.judge):
        if one.recipe:
            uses.setdefault(one.recipe, {})[one.segmentor] = settings.iterations(one.recipe, one.segmentor)
    return [{"name": name, "recipe": settings.recipes[name], "iterations": found} for name, found in uses.items()]


def _sampler_line(sampler: Sampler) -> str:
    """The settings of a sampler that its images depend on, beside its steps."""
    parts = []
    if correction := sampler.rectification:
        parts.append(f"first {correction.steps} steps, {_correction_line(correction)}")
    if sampler.critic_decoder:
        parts.append(f"the critic looks through {sampler.critic_decoder}")
    if sampler.guidance_scale > 1:
        parts.append(f"guidance {sampler.guidance_scale:g}")
    return ", ".join(parts) or "–"


def _correction_line(settings: RectifySettings) -> str:
    """A form of the correction in a line, without its number of steps."""
    schedule = settings.schedule.replace("_", " ")
    if settings.search == "backtracking":
        return (
            f"step size searched for, at most {settings.step_size:g} ({schedule}), {settings.trials} trials per step; a sample is done at "
            f"{100 * settings.agreement:g} % agreement or after {settings.patience} steps without gain"
        )
    parts = [f"step size {settings.step_size:g} ({schedule})", f"{settings.inner_steps} per step", f"{settings.pixels} pixels"]
    parts += [settings.reduction, f"normalise {settings.normalise}"]
    parts += ["shrink" if settings.shrink else "no shrink", "clamp" if settings.clamp else "no clamp"]
    return ", ".join(parts)


def _stages(folder: Path) -> list[dict]:
    """Time and memory per stage from the benchmark files STAGE.tsv or STAGE-....tsv, in the order in which stages ended."""
    stages: dict[str, dict] = {}
    for path in sorted(folder.rglob("*.tsv"), key=lambda path: (path.stat().st_mtime, path.name)):
        stage = path.stem.split("-")[0]
        if stage == "make_report":  # that of an earlier page
            continue
        table = pd.read_csv(path, sep="\t", na_values="-")
        seconds, cpu, memory = (
            pd.to_numeric(table.get(name, pd.Series(dtype=float)), errors="coerce") for name in ("s", "cpu_time", "max_rss")
        )
        entry = stages.setdefault(stage, {"name": stage.replace("_", " "), "jobs": 0, "seconds": 0.0, "cpu": 0.0, "memory": 0.0})
        entry["jobs"] += 1
        entry["seconds"] += float(seconds.mean()) if seconds.notna().any() else 0.0
        entry["cpu"] += float(cpu.mean()) if cpu.notna().any() else 0.0
        entry["memory"] = max(entry["memory"], float(memory.max()) if memory.notna().any() else 0.0)
    return list(stages.values())


def _hardware(device: str) -> str:
    """Processor, memory and, for device cuda, GPUs of the machine that writes the page."""
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (OSError, ValueError):
        names, memory = [], ""
    parts = [f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical cores{memory}"]
    if device == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        parts += sorted(set(subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")) - {""})
    return "; ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _spread(mean: float | None, sd: float | None = None, digits: int = 1) -> str:
    text = number(mean, digits=digits)
    return text if sd is None or np.isnan(sd) or text == "–" else f"{text} ± {number(sd, digits=digits)}"


def _environment() -> Environment:
    found = environment()
    found.filters |= {"duration": _duration, "sampler": _sampler_line}
    found.globals |= {"spread": _spread}
    return found
