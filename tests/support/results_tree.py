"""A results folder as the workflow leaves it, small and invented, for the tests of tables and report."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from paths import ROOT

from crfm_core.curation.mixing import mix
from crfm_core.data.rasters import write_raster
from crfm_core.experiment import Experiment, copies, filter_chain, keeps_every_image, selected_tables
from crfm_core.files import remove, seed_of, write_json
from crfm_core.manifest import relocate, write_manifest
from crfm_core.reporting.data_sheet import draw_data_sheet
from crfm_core.reporting.tables import make_table
from crfm_core.settings import TRAINING, Dataset, Settings, load_dataset, load_settings

REPO = ROOT
EVIL = "<script>alert('x')</script>"
#: mIoU per seed of the recipes of the table main.
MIOU = {"real": [66, 67, 68], "real-equal": [68, 69, 70.5], "triattention": [69.5, 68.6, 71.9], "crfm": [71, 71.8, 73.6]}
SIDE = 16  #: of a tile


def scores(mean, classes, seed, recipe=""):
    """What a segmentor scored, with an IoU per class that averages to ``mean``."""
    of_classes = np.random.default_rng(0).normal(0, 15, len(classes))
    of_recipe = np.random.default_rng(seed_of(recipe)).normal(0, 3, len(classes))
    spread = of_classes + of_recipe + np.random.default_rng(seed_of(recipe, seed)).normal(0, 1, len(classes))
    iou = (mean + spread - spread.mean()).clip(0, 100).tolist()
    return {
        "OA": mean + 10, "mIoU": mean, "mAcc": mean + 7, "mF1": mean + 9, "IoU": iou, "Acc": iou, "F1": iou,
        "classes": list(classes), "tiles": 192,
    }  # fmt: skip


def write_scores(results, dataset, classes, miou, segmentor="segformer_tiny"):
    """The scores.json of every recipe and seed, {recipe: [mIoU per seed]}; their paths."""
    paths = []
    for recipe, values in miou.items():
        for seed, value in enumerate(values):
            paths.append(results / dataset / "segmentors" / recipe / segmentor / f"seed{seed}" / "scores.json")
            write_json(paths[-1], scores(value, classes, seed, recipe))
    return paths


def configuration(**changes):
    """The default configuration, changed."""
    return load_settings(yaml.safe_load((REPO / "config.yaml").read_text()) | changes)


def dataset_named(name, **changes):
    """A dataset of the repository, changed."""
    dataset = load_dataset(REPO / "configs" / "datasets" / f"{name}.yaml")
    return Dataset(**dataset.model_dump() | {"licence": "none: an embedded world"} | changes)


def draw_tile(folder, name, rng, classes, split, dataset):
    """Write one small georeferenced tile and return its manifest row."""
    label = np.repeat(np.repeat(rng.integers(0, classes, (4, 4)), SIDE // 4, 0), SIDE // 4, 1).astype(np.uint8)
    image = np.clip(label[..., None] * 30 + rng.normal(30, 10, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    grid = {"crs": "EPSG:32631", "transform": [0.3, 0.0, 5e5, 0.0, -0.3, 5e6]}
    for kind, array in (("images", image), ("labels", label)):
        write_raster(folder / split / kind / f"{name}.tif", array, **grid)
    return {
        "tile_id": name, "dataset": dataset, "split": split, "scene": "s", "row": 0, "col": 0, "width": SIDE, "height": SIDE,
        "image": f"{split}/images/{name}.tif", "label": f"{split}/labels/{name}.tif", **grid,
        "classes": [int(c) for c in np.unique(label)], "pixels": np.bincount(label.ravel(), minlength=classes).tolist(), "digest": name,
        "scene_width": SIDE, "scene_height": SIDE,
    }  # fmt: skip


def agreement(level, tiles, lowest):
    """What critic and judge saw in samples, three copies each."""
    found = {"tiles": tiles}
    for who, gain in (("critic", 20), ("judge", 0)):
        copies = [{"OA": level + gain + 15 + c, "mIoU": level + gain + c, "mAcc": level + gain + 8 + c} for c in (-0.5, 0.0, 0.5)]
        found[who] = {"recipe": "real", "segmentor": "unet_tiny", "seed": 1, "copies": copies}
        found[who] |= {key: copies[1][key] for key in copies[0]} | {f"{key}_sd": 0.5 for key in copies[0]}
    return found | {"lowest": [{"tile_id": name, "judge": 3.0 + rank, "critic": 9.0} for rank, name in enumerate(lowest)]}


def generation(samples, neighbours, **changes):
    """What was measured of samples beside real tiles."""
    found = {
        "features": "deepest features of the judge, unet_tiny on reference, seed 1", "kind": "judge",
        "real": {"split": "reference", "tiles": 384},
        "samples": samples, "fid": 12.345, "kid": 0.0123, "kid_sd": 0.0021, "subset": 12, "missing": "", "cmmd": None, "cmmd_missing": "",
        "diversity": {"copies": 0.0312, "real": 0.1234}, "neighbours": neighbours, "memorised": [], "threshold": 0.5,
    }  # fmt: skip
    return found | changes


PLAIN, DEFAULT = ([30, 32, 34], [40, 42, 44]), ([33, 34, 38], [50, 53, 56])  #: mIoU per seed by judge and critic


def form(judge, critic, steps=4, **changes):
    """An entry of a comparison's ``forms``, corrected in ``steps`` steps unless there are none."""
    seeds = [
        {"seed": seed, **{who: {"OA": value + 10, "mIoU": value, "mAcc": value + 5} for who, value in (("critic", c), ("judge", j))}}
        | {"critic_loss": 1 + seed / 10}
        for seed, (j, c) in enumerate(zip(judge, critic, strict=True))
    ]
    means = {"gradient_ratio": 0.3, "clamp_ratio": 0.0}
    by_step = [
        {"step": s, "sigma": 1 - s / 23, "samples": 6, "step_size": 0.3, "loss_before": 2.0, "loss_after": 1.9, "agreement": 0.5, **means}
        for s in range(steps)
    ]
    found = {"steps": steps, "seeds": seeds, "seconds_per_image": 0.5 + 0.1 * steps, "notes": {}, "corrections": float(steps)}
    found |= {"raised": 0.25, **means} if steps else dict.fromkeys(("raised", *means))
    return found | {"by_step": by_step} | changes


def write_comparison(root, forms, plain=PLAIN):
    """Write the files of a comparison below a dataset's folder; ``forms`` maps a preset to its forms."""
    paths = []
    for preset, entries in {"plain": [form(*plain, steps=0)], **forms}.items():
        paths.append(root / "comparison" / f"{preset}.json")
        write_json(paths[-1], {"preset": preset, "masks": 8, "num_steps": 23, "forms": entries})
    return paths


@dataclass
class Tree:
    """One dataset's folder while it is filled, and the files of it by the kinds of a report."""

    root: Path
    settings: Settings
    dataset: Dataset
    recipes: list[str]
    train_tiles: int = 6
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    files: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, kind: str, path: Path) -> Path:
        if path not in self.files.setdefault(kind, []):
            self.files[kind].append(path)
        return path

    def fill(self, forms=None) -> dict[str, list[Path]]:
        self.tiles()
        self.pseudo_label()
        used = [self.settings.recipes[name] for name in self.recipes]
        for control, sampler in dict.fromkeys((r.control, r.sampler) for r in used if r.control):
            self.synthesise(control, sampler)
        for name in self.recipes:
            self.curate(name)
        level = {"OA": 80.0, "mIoU": 70.0, "mAcc": 78.0}
        path = self.add("reconstruction", self.root / "agreement" / "reconstruction.json")
        write_json(path, {"tiles": 4, **{kind: {"critic": level, "judge": level} for kind in ("real", "reconstructed")}})
        if forms and self.settings.comparison:
            self.files["comparison"] = write_comparison(self.root, forms)
        return self.files

    def tiles(self) -> None:
        """Tiles, captions and the data sheet."""
        name, classes, manifests = self.dataset.name, len(self.dataset.classes), {}
        for split, count in (("train", self.train_tiles), ("test", 4)):
            rows = [draw_tile(self.root / "tiles", f"{split}-{i}", self.rng, classes, split, name) for i in range(count)]
            manifests[split] = self.root / "tiles" / f"{split}.parquet"
            write_manifest(manifests[split], rows)
            if split == "train":
                captions = self.add("tiles", self.root / "captions" / "train.parquet")
                self.train = [
                    row
                    | {key: relocate(row[key], manifests[split], captions) for key in ("image", "label")}
                    | {"caption": EVIL, "prompt": "0"}
                    for row in rows
                ]
                write_manifest(captions, self.train)
        write_raster(self.root / "scenes" / "s.tif", np.full((24, SIDE, 3), 90, np.uint8))
        row = {"dataset": name, "split": "", "scene": "s", "image": "scenes/s.tif", "label": "scenes/s.tif"}
        pd.DataFrame([row | {"group": "", "low": [], "high": [], "caption": ""}]).to_parquet(self.root / "scenes.parquet")
        draw_data_sheet(self.dataset, self.root / "scenes.parquet", manifests, self.root, self.add("data_sheets", self.root / "data_sheet"))

    def pseudo_label(self) -> None:
        """Unlabelled tiles with labels of the critic, where a recipe has them."""
        if any(self.settings.recipes[name].pseudo for name in self.recipes):
            classes, name = len(self.dataset.classes), self.dataset.name
            rows = [draw_tile(self.root / "pseudo", f"unlabelled-{i}", self.rng, classes, "unlabelled", name) for i in range(5)]
            out = self.add("pseudo_labels", self.root / "pseudo_labels.parquet")
            for row in rows:
                row |= {key: f"pseudo/{row[key]}" for key in ("image", "label")} | {"source": "pseudo", "labelled_by": "c" * 12}
            write_manifest(out, rows)

    def synthesise(self, control: str, sampler: str) -> None:
        """The gathered manifest of one sampler, and what was measured of its samples."""
        out = self.add("synthetic", self.root / "synthetic" / control / sampler / "all.parquet")
        correction, made = self.settings.samplers[sampler].rectify, []
        for row in self.train:
            for copy in range(copies(self.settings, control, sampler)):
                name = f"{row['tile_id']}-{copy}"
                image = self.rng.integers(60, 190, (SIDE, SIDE, 3)).astype(np.uint8)
                write_raster(out.parent / "images" / f"{name}.tif", image, row["crs"], row["transform"])
                steps = [
                    {"step": s, "sigma": 1 - s / 23, "step_size": 0.3, "loss_before": 2 - s / 29, "loss_after": 1.8 - s / 29,
                     "gradient_ratio": 0.3, "clamp_ratio": 0.4 * correction.clamp}
                    for s in range(min(4, correction.steps) if correction else 0)
                ]  # fmt: skip
                masks, new = self.settings.samplers[sampler].layouts, {}
                if masks != TRAINING:
                    new = {"mask_of": f"{row['tile_id']}-{masks}-{copy}", "layout_of": row["tile_id"], "layouts": "augmented", "pieces": 2}
                losses = {"critic_loss_before": 2.0, "critic_loss_after": 1.5} if steps else {}
                made.append(row | dict.fromkeys(("critic_loss_before", "critic_loss_after"), np.nan) | losses | {
                    "tile_id": name, "image": f"images/{name}.tif", "label": relocate(row["label"], self.files["tiles"][0], out),
                    "mask_of": row["tile_id"], "copy": copy, "seed": 1, "sampler": sampler, "generator": "f" * 64, "source": "synthetic",
                    "corrections": json.dumps(steps), "note": "",
                } | new)  # fmt: skip
        write_manifest(out, made)
        names, level = [row["tile_id"] for row in made], 40.0 if correction else 34.0
        path = self.add("agreement", self.root / "agreement" / control / f"{sampler}.json")
        write_json(path, agreement(level, len(made), names[:8]))
        near = [{"tile_id": name, "nearest": self.train[0]["tile_id"], "ratio": 0.7 + rank / 50} for rank, name in enumerate(names[:10])]
        write_json(self.add("generation", self.root / "generation" / control / f"{sampler}.json"), generation(len(made), near))
        path = self.add("validation", self.root / "validation" / control / "final.json")
        write_json(path, {"loss": 0.4321, "loss_mask_ignored": 0.8769, "tiles": ["a", "b"]})

    def curate(self, name: str) -> None:
        """Filters, re-sampling and mix of a recipe."""
        recipe, current = self.settings.recipes[name], None
        if recipe.control:
            current = self.root / "synthetic" / recipe.control / recipe.sampler / "all.parquet"
            for step in filter_chain(self.settings, recipe.filter):
                current = self.filter(current, step, self.root / "filtered" / recipe.control / recipe.sampler / f"{step}.parquet")
            if recipe.resample:
                folder = self.root / "resampled" / recipe.control / recipe.sampler / (recipe.filter or "none")
                current = self.keep("resampled", current, folder / f"{recipe.resample}.parquet", 2 / 3)
        out = self.add("mixes", self.root / "mixes" / f"{name}.parquet")
        exactly = keeps_every_image(self.settings, name)
        real = self.root / "tiles" / "train.parquet"
        pseudo = {"pseudo_manifest": self.root / "pseudo_labels.parquet", "pseudo_weight": recipe.pseudo_weight} if recipe.pseudo else {}
        mix(real, current, out, recipe.synthetic_per_real, recipe.real_weight, exactly=exactly, **pseudo)

    def filter(self, before: Path, step: str, out: Path) -> Path:
        if self.settings.filters[step].kind != "pixel":
            return self.keep("filtered", before, out, self.settings.filters[step].keep)
        rows = []
        for row in pd.read_parquet(before).to_dict("records"):
            label = np.full((SIDE, SIDE), 255, np.uint8)
            label[:8] = row["classes"][0]
            write_raster(out.parent / step / "labels" / f"{row['tile_id']}.tif", label, row["crs"], row["transform"])
            row |= {"image": relocate(row["image"], before, out), "label": f"{step}/labels/{row['tile_id']}.tif"}
            rows.append(row | {"kept": 0.5, "pixels": [n // 2 if c else 0 for c, n in enumerate(row["pixels"])]})  # none of class 0
        write_manifest(self.add("filtered", out), rows)
        return out

    def keep(self, kind: str, before: Path, out: Path, share: float) -> Path:
        """The first ``share`` of the rows."""
        table = pd.read_parquet(before)
        table = table.iloc[: round(share * len(table))]
        moved = {column: [relocate(path, before, out) for path in table[column]] for column in ("image", "label")}
        write_manifest(self.add(kind, out), table.assign(**moved))
        return out


FORMS = {
    "released": [form([29, 32.5, 33], [39, 42, 44], gradient_ratio=8.3e-5, clamp_ratio=0.483)],
    "default": [form(*DEFAULT, notes={"the critic's loss is not finite at step 1: not corrected from there on": 2})],
}


def level_of(recipe, index, seeds):
    """mIoU per seed of a recipe without given ones."""
    return [66 + (index * 1.7) % 6 + (seed * 0.7 + index * 0.31) % 1.3 for seed in range(seeds)]


def build(folder, miou=MIOU, names=("embedded",), datasets=None, forms=FORMS, **changes):
    """A results tree; the arguments of make_report. ``names`` are the run's datasets, ``datasets`` those of all tables if not these."""
    results, files = folder / "results", {}
    if forms and "comparison" not in changes:
        changes["comparison"] = configuration().comparison.model_dump() | {"presets": list(forms)}
    settings = configuration(datasets=list(names), results=str(results), **changes)
    known = {one.name: one for one in datasets or [dataset_named(name) for name in names]}
    runs = [(d, r) for table in selected_tables(settings).values() for d in table.datasets or names for r in table.recipes]
    for index, (name, dataset) in enumerate(known.items()):
        recipes = list(dict.fromkeys(r for d, r in runs if d == name))
        tree = Tree(results / name, settings, dataset, recipes, train_tiles=6 - index, rng=np.random.default_rng(index))
        for kind, paths in tree.fill(forms if name in names else None).items():
            files.setdefault(kind, []).extend(paths)
    for stage, seconds in (("embedded/train_generator-triattention", 400.0), ("embedded/train_segmentor-real-segformer_tiny-0", 40.5)):
        path = results / "benchmarks" / f"{stage}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n{seconds}\t0:0:0\t812.5\t-\t-\t-\t-\t-\t90\t{seconds}\n"
        )
    order = list(settings.recipes)
    for name, table in selected_tables(settings).items():
        within, paths = table.datasets or list(names), []
        for dataset in within:
            for shift, segmentor in enumerate(table.segmentors):
                levels = {r: miou.get(r) or level_of(r, order.index(r) + shift, len(settings.seeds)) for r in table.recipes}
                paths += write_scores(results, dataset, known[dataset].classes, levels, segmentor)
        csv = results / "tables" / f"{name}.csv"
        make_table(
            paths, files["mixes"], [*files.get("agreement", []), *files.get("generation", [])], table, settings.recipes, within,
            settings.seeds, settings.scale, "ab" * 32, results, csv, csv.with_suffix(".txt"),
        )  # fmt: skip
        files.setdefault("tables", []).append(csv)
    every = {name: known.get(name) or dataset_named(name) for name in dict.fromkeys([*names, *known])}
    return {
        "experiment": Experiment(settings, every), "paper": REPO / "configs" / "paper_results.yaml", "configuration": "ab" * 32,
        "command": "run {target} --config tables=all", "gpu_stages": [], "page": results / "report.html", "figures": results / "figures",
    }  # fmt: skip


def copied(arguments, folder):
    """The arguments of make_report with a copy of the results in another folder."""
    experiment, results = arguments["experiment"], folder / "results"
    shutil.copytree(experiment.results.results, results)
    settings = experiment.settings.model_copy(update={"results": str(results)})
    for made in ("report.html", "figures"):
        remove(results / made)
    return arguments | {
        "experiment": Experiment(settings, experiment.datasets), "page": results / "report.html", "figures": results / "figures",
    }  # fmt: skip
