"""The correction: its forms side by side, and what it did to the samples of the run."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from crfm_core.reporting import figures as draw
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.comparison import best_form
from crfm_core.reporting.material import Material
from crfm_core.reporting.rendering import Pictures
from crfm_core.settings import PRESETS, Sampler, describe_preset


def show_forms(material: Material, show: Pictures) -> dict | None:
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
        "settings": {preset: f"{describe_preset(preset)} Its settings: {PRESETS[preset]().describe()}." for preset in compared.presets[1:]},
    }


def show_corrections(material: Material, colours: Colours, show: Pictures) -> dict | None:
    """What the critic saw while it corrected, averaged over images; None when nothing was corrected."""
    found = {}
    for key, table in material.synthetic.items():
        if records := [record for text in table.corrections for record in json.loads(text)]:
            found[key] = pd.DataFrame(records).astype(float)  # None: not measured
    if not found:
        return None
    hues = {material.name_of(key): colour for key, colour in colours.of_samples(found).items()}
    curves = {material.name_of(key): frame.groupby("step", as_index=False).mean() for key, frame in found.items()}
    name = draw.correction_curves(curves, hues, show.folder, f"{material.dataset.name}-corrections")
    rows = []
    for key, frame in found.items():
        table = material.synthetic[key]
        row = {"sampler": material.name_of(key), "steps": frame.step.nunique(), "corrections": len(frame) / len(table)}
        row |= {when: _mean(table[f"critic_loss_{when}"]) for when in ("before", "after")}
        rows.append(row | {"gradient": frame.gradient_ratio.mean(), "clamp": frame.clamp_ratio.mean()})
    return {"figure": show(name, "The critic's loss before and after each corrected step, and the size of the change"), "rows": rows}


def _mean(column: pd.Series) -> float:
    values = column.astype(float)
    return float(values.mean()) if values.notna().any() else np.nan


def notes_on_samples(material: Material) -> list[str]:
    """How many samples of each sampler carry which note."""
    told = []
    for key, table in material.synthetic.items():
        counts = table.note[table.note.astype(bool)].value_counts()
        told += [f"{material.name_of(key)}: {count} of {len(table)} samples: {note}" for note, count in counts.items()]
    return told


def sampler_line(sampler: Sampler) -> str:
    """The settings of a sampler that its images depend on, beside its steps."""
    parts = []
    if correction := sampler.rectify:
        parts.append(f"first {correction.steps} steps, {correction.describe()}")
    if sampler.critic_decoder:
        parts.append(f"the critic looks through {sampler.critic_decoder}")
    if sampler.guidance_scale > 1:
        parts.append(f"guidance {sampler.guidance_scale:g}")
    return ", ".join(parts) or "–"
