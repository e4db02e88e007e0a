"""What the correction did to the samples of the run."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.page import Report
from crfm_core.settings import Sampler

TITLE = "What the correction did"


def show_dataset(report: Report, results: DatasetResults) -> dict | None:
    """What the critic saw while it corrected, averaged over images; None when nothing was corrected."""
    found = {}
    for key, table in results.synthetic.items():
        if records := [record for text in table.corrections for record in json.loads(text)]:
            found[key] = pd.DataFrame(records).astype(float)  # None: not measured
    if not found:
        return None
    hues = {results.name_of(key): colour for key, colour in report.colours.of_samples(found).items()}
    curves = {results.name_of(key): frame.groupby("step", as_index=False).mean() for key, frame in found.items()}
    name = draw.correction_curves(curves, hues, report.pictures.folder, f"{results.dataset.name}-corrections")
    alt = "The critic's loss before and after each corrected step, and the size of the change"
    rows = []
    for key, frame in found.items():
        table = results.synthetic[key]
        row = {"sampler": results.name_of(key), "steps": frame.step.nunique(), "corrections": len(frame) / len(table)}
        row |= {when: _mean(table[f"critic_loss_{when}"]) for when in ("before", "after")}
        rows.append(row | {"gradient": frame.gradient_ratio.mean(), "clamp": frame.clamp_ratio.mean()})
    return {
        "figure": report.pictures(name, alt),
        "rows": rows,
    }


def _mean(column: pd.Series) -> float:
    values = column.astype(float)
    return float(values.mean()) if values.notna().any() else np.nan


def notes_on_samples(results: DatasetResults) -> list[str]:
    """How many samples of each sampler carry which note."""
    told = []
    for key, table in results.synthetic.items():
        counts = table.note[table.note.astype(bool)].value_counts()
        told += [f"{results.name_of(key)}: {count} of {len(table)} samples: {note}" for note, count in counts.items()]
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
