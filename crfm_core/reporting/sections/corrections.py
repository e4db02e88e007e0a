"""What the correction did to the samples of the run."""

from __future__ import annotations

import json

import pandas as pd

from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.page import Report

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
        row |= {when: table[f"critic_loss_{when}"].astype(float).mean() for when in ("before", "after")}
        rows.append(row | {"gradient": frame.gradient_ratio.mean(), "clamp": frame.clamp_ratio.mean()})
    return {"figure": report.pictures(name, alt), "rows": rows}
