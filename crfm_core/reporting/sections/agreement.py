"""What samples are like: whether they show their masks, and how they compare with real tiles."""

from __future__ import annotations

from crfm_core.reporting import figures as draw
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.measurements import Agreement, AgreementOverCopies, as_float
from crfm_core.reporting.report import Report

TITLE = "Are the samples good?"
BOTH = ("judge", "critic")
MEMORISED = 20  #: ids of memorised samples that are listed per sampler
CLOSEST = 5  #: closest neighbours that are listed per sampler


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """Whether samples show their masks, how they compare with real tiles, and whether the generator reads the mask."""
    return {"a": agreement_of(report, results), "g": distances_of(results), "validation": results.validation}


def agreement_of(report: Report, results: DatasetResults) -> dict:
    """Images against their masks: real training tiles, the same through the autoencoder, and every sampler's images."""
    rows, bars, known = [], [], results.reconstruction
    for both, label, grey in (
        (known.real, "real training tiles", draw.GREYS[1]),
        (known.reconstructed, "the same through the autoencoder", draw.GREYS[0]),
    ):
        rows.append({"label": label, "tiles": known.tiles, "copies": None} | {who: _cells(both.by(who)) for who in BOTH})
        bars.append({"label": label, "colour": grey} | {who: [as_float(both.by(who).mIoU)] for who in BOTH})
    hues = report.colours.of_samples(results.agreement)
    for key, found in results.agreement.items():
        label = f"samples: {results.name_of(key)}"
        rows.append(
            {"label": label, "tiles": found.tiles, "copies": len(found.judge.copies)} | {who: _cells(found.by(who)) for who in BOTH}
        )
        bars.append({"label": label, "colour": hues[key]} | {who: found.copies_of(who) for who in BOTH})
    name = draw.agreement_bars(bars, "mIoU", report.pictures.folder, f"{results.dataset.name}-agreement")
    recipe = report.settings.recipes.get(report.settings.judge.recipe)  # none for a judge from elsewhere
    split = recipe and (recipe.split or results.dataset.train)
    return {
        "rows": rows,
        "figure": report.pictures(name, "Agreement of images with their masks, by the independent judge and by the guiding critic"),
        "judge_saw_the_masks": split == results.dataset.train,
        "judge_split": split,
    }


def _cells(found: Agreement) -> dict[str, tuple[float | None, float | None]]:
    """Mean and, over copies, sd of each score."""
    sd = isinstance(found, AgreementOverCopies)
    return {score: (getattr(found, score), getattr(found, f"{score}_sd") if sd else None) for score in ("mIoU", "OA", "mAcc")}


def distances_of(results: DatasetResults) -> dict | None:
    """Samples beside real tiles: distances, diversity, memorised tiles; None where nothing was measured."""
    if not results.generation:
        return None
    rows, memorised, reasons = [], [], {}
    for key, found in results.generation.items():
        name = results.name_of(key)
        rows.append({"name": name, "found": found, "memorised": len(found.memorised)})
        for reason in filter(None, (found.missing, found.cmmd_missing)):
            reasons.setdefault(reason, []).append(name)
        memorised.append({
            "name": name,
            "tiles": found.memorised[:MEMORISED],
            "more": max(0, len(found.memorised) - MEMORISED),
            "of": found.samples,
            "closest": found.neighbours[:CLOSEST],
            "threshold": found.threshold,
        })  # fmt: skip
    first = next(iter(results.generation.values()))
    extractors = {found.features: None for found in results.generation.values()}
    subsets = sorted({found.subset for found in results.generation.values() if found.subset})
    return {
        "rows": rows,
        "names": first.names,
        "extractors": list(extractors),
        "subsets": subsets,
        "kind": first.kind,
        "cmmd": any(found.cmmd is not None for found in results.generation.values()),
        "reasons": [{"reason": reason, "names": names} for reason, names in reasons.items()],
        "memorised": memorised,
    }
