"""What samples are like: whether they show their masks, and how they compare with real tiles."""

from __future__ import annotations

import math

from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.measurements import Agreement, OfBoth, SamplesAgreement, distance_names
from crfm_core.reporting.page import Report

TITLE = "Are the samples good?"


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """Whether samples show their masks, how they compare with real tiles, and whether the generator reads the mask."""
    return {"a": agreement_of(report, results), "g": distances_of(results), "validation": results.validation}


def agreement_of(report: Report, results: DatasetResults) -> dict:
    """Images against their masks: real training tiles, the same through the autoencoder, and every sampler's images."""
    known, hues = results.reconstruction, report.colours.of_samples(results.agreement)
    rows = [
        _row("real training tiles", draw.GREYS[1], known.tiles, known.real),
        _row("the same through the autoencoder", draw.GREYS[0], known.tiles, known.reconstructed),
        *(_row(f"samples: {results.name_of(key)}", hues[key], found.tiles, found) for key, found in results.agreement.items()),
    ]
    name = draw.agreement_bars([row["bar"] for row in rows], "mIoU", report.pictures.folder, f"{results.dataset.name}-agreement")
    recipe = report.settings.recipes[report.settings.judge.recipe] if report.settings.judge.recipe else None
    split = recipe and (recipe.split or results.dataset.train)
    return {
        "rows": rows,
        "figure": report.pictures(name, "Agreement of images with their masks, by the independent judge and by the guiding critic"),
        "held_out": known.held_out,
        "judge_saw_the_masks": split == results.dataset.train,
        "judge_split": split,
    }


def _row(label: str, colour: str, tiles: int, found: OfBoth | SamplesAgreement) -> dict:
    """A row of the table: mean and, over copies, sd of each score; and its bar, the mIoU of every copy."""
    bar = {"label": label, "colour": colour, "judge": [found.judge.mIoU], "critic": [found.critic.mIoU]}
    copies = None
    if isinstance(found, SamplesAgreement):
        bar |= {"judge": found.copies_of("judge"), "critic": found.copies_of("critic")}
        copies = len(found.judge.copies)
    return {"label": label, "tiles": tiles, "copies": copies, "judge": _cells(found.judge), "critic": _cells(found.critic), "bar": bar}


def _cells(found: Agreement) -> dict[str, tuple[float, float | None]]:
    return {score: (getattr(found, score), getattr(found, f"{score}_sd", None)) for score in ("mIoU", "OA", "mAcc")}


def distances_of(results: DatasetResults) -> dict | None:
    """Samples beside real tiles: distances, diversity, memorised tiles; None where nothing was measured."""
    if not results.generation:
        return None
    named = {results.name_of(key): found for key, found in results.generation.items()}
    found = list(named.values())
    reasons: dict[str, list[str]] = {}
    for name, one in named.items():
        for reason in filter(None, (one.missing, one.cmmd_missing)):
            reasons[reason] = [*reasons.get(reason, []), name]
    return {
        "of": named,
        "names": distance_names(found[0].kind),
        "extractors": dict.fromkeys(one.features for one in found),
        "subsets": sorted({one.subset for one in found if one.subset}),
        "kind": found[0].kind,
        "threshold": found[0].threshold,
        "cmmd": not all(math.isnan(one.cmmd) for one in found),
        "reasons": reasons,
    }
