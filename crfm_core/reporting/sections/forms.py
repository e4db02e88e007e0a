"""The forms of the correction side by side."""

from __future__ import annotations

import pandas as pd

from crfm_core.reporting import figures as draw
from crfm_core.reporting.comparison import best_form
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.report import Report
from crfm_core.settings import PRESETS, describe_preset

TITLE = "Which correction?"


def show_dataset(report: Report, results: DatasetResults) -> dict | None:
    """The forms of the correction side by side; None when they were not compared."""
    compared = results.comparison
    if compared is None:
        return None
    name, plain = results.dataset.name, compared.rows[0]
    levels, curves, hues, notes = {}, {}, {}, []
    for preset, colour in zip(compared.presets[1:], draw.repeated(draw.COLOURS, len(compared.presets) - 1), strict=True):
        rows = compared.of(preset)
        points = [{"steps": row.form.steps} for row in (plain, *rows)]
        for point, row in zip(points, (plain, *rows), strict=True):
            for who in ("judge", "critic"):
                point[who], point[f"{who}_sd"] = row.spread(who, "mIoU")
        levels[preset] = pd.DataFrame(points).sort_values("steps")
        longest = max(rows, key=lambda row: row.form.steps).form
        if longest.by_step:
            title = f"{preset} ({longest.steps} steps)"
            curves[title], hues[title] = pd.DataFrame(longest.by_step).astype(float), colour
        samples = compared.masks * len(compared.seeds)
        notes += [f"{row.name}: {count} of {samples} samples: {note}" for row in rows for note, count in row.form.notes.items()]
    drawn = draw.levels_by_steps(levels, "mIoU", report.pictures.folder, f"{name}-forms")
    steps = curves and draw.correction_curves(curves, hues, report.pictures.folder, f"{name}-forms-steps")
    return {
        "compared": compared,
        "finding": best_form(compared),
        "levels": report.pictures(drawn, "mIoU over the number of corrected steps for each form of the correction, by judge and critic"),
        "steps": report.pictures(steps, "Critic's loss before and after each correction, and the velocity's changes, per form")
        if steps
        else None,
        "notes": notes,
        "forms": {preset: f"{describe_preset(preset)} Its settings: {PRESETS[preset]().describe()}." for preset in compared.presets[1:]},
    }
