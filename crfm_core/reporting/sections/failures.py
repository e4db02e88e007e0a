"""The samples that show their masks worst, by the judge."""

from __future__ import annotations

from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.manifest import paths_of
from crfm_core.reporting import figures as draw
from crfm_core.reporting.findings import number
from crfm_core.reporting.inputs import DatasetResults, Pair
from crfm_core.reporting.page import Report

TITLE = "Failures"
FAILURES = 6  #: per sampler


def show_dataset(report: Report, results: DatasetResults) -> dict | None:
    """For every sampler the samples with the lowest mIoU by the judge, each below its mask; those of the leading recipes first."""
    found = []
    for pair in (*results.leading_pairs, *results.other_pairs):
        if lowest := results.agreement[pair].lowest[:FAILURES]:
            found.append(_failures(report, results, pair, lowest) | {"leading": pair in results.leading_pairs})
    return {"failures": found} if results.synthetic else None


def _failures(report: Report, results: DatasetResults, key: Pair, lowest: list) -> dict:
    dataset, manifest = results.dataset, results.files["synthetic"][key]
    masks, samples = [], []
    for tile in lowest:
        row = results.sample_row(key, tile.tile_id, results.files["agreement"][key])
        (image,), (label,) = (paths_of(manifest, row, column, results.root) for column in ("image", "label"))
        masks.append(paint(read_label(label), dataset.palette))
        samples.append(read_rgb(image))
    titles = [number(tile.judge) for tile in lowest]
    name = "-".join((dataset.name, "failures", *key))
    draw.sample_sheet(titles, [masks, samples], dataset.classes, dataset.palette, report.pictures.folder, name)
    alt = f"The {len(lowest)} samples of {results.name_of(key)} that show their masks worst: masks above, samples below"
    return {
        "sampler": results.name_of(key),
        "figure": report.pictures(name, alt, "png"),
        "tiles": [{"tile_id": tile.tile_id, "judge": tile.judge, "critic": tile.critic} for tile in lowest],
        "of": results.agreement[key].tiles,
    }
