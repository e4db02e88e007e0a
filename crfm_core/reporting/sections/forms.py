"""The forms of the correction side by side."""

from __future__ import annotations

import pandas as pd

from crfm_core.reporting import figures as draw
from crfm_core.reporting.comparison import FormRow, best_form
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.page import Report
from crfm_core.settings import PRESETS, describe_preset

TITLE = "Which correction?"


def show_dataset(report: Report, results: DatasetResults) -> dict | None:
    """The forms of the correction side by side; None when they were not compared."""
    compared = results.comparison
    if compared is None:
        return None
    presets, (plain, *corrected) = compared.presets[1:], compared.rows
    curves, hues = {}, {}
    for preset, colour in zip(presets, draw.repeated(draw.COLOURS, len(presets)), strict=True):
        longest = max(compared.of(preset), key=lambda row: row.form.steps).form
        if longest.by_step:
            title = f"{preset} ({longest.steps} steps)"
            curves[title], hues[title] = pd.DataFrame(longest.by_step).astype(float), colour
    name, folder = results.dataset.name, report.pictures.folder
    levels = {preset: _levels([plain, *compared.of(preset)]) for preset in presets}
    drawn = draw.levels_by_steps(levels, "mIoU", folder, f"{name}-forms")
    steps = None
    if curves:
        alt = "Critic's loss before and after each correction, and the velocity's changes, per form"
        steps = report.pictures(draw.correction_curves(curves, hues, folder, f"{name}-forms-steps"), alt)
    samples = compared.masks * len(compared.seeds)
    return {
        "compared": compared,
        "finding": best_form(compared),
        "levels": report.pictures(drawn, "mIoU over the number of corrected steps for each form of the correction, by judge and critic"),
        "steps": steps,
        "notes": [f"{row.name}: {count} of {samples} samples: {note}" for row in corrected for note, count in row.form.notes.items()],
        "forms": {preset: f"{describe_preset(preset)} Its settings: {PRESETS[preset]().describe()}." for preset in presets},
    }


def _levels(rows: list[FormRow]) -> pd.DataFrame:
    """The mIoU over the number of corrected steps by judge and critic, with the sd over seeds."""
    columns: dict[str, list[float]] = {"steps": [row.form.steps for row in rows]}
    for who in ("judge", "critic"):
        columns[who], columns[f"{who}_sd"] = map(list, zip(*(row.spread(who, "mIoU") for row in rows), strict=True))
    return pd.DataFrame(columns).sort_values("steps")
