"""The samples that show their masks worst, by the judge."""

from __future__ import annotations

from crfm_core import DataError
from crfm_core.data.rasters import paint, read_label, read_rgb
from crfm_core.manifest import paths_of
from crfm_core.reporting import figures as draw
from crfm_core.reporting.findings import number
from crfm_core.reporting.inputs import DatasetResults, Pair
from crfm_core.reporting.measurements import LowTile
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


def _failures(report: Report, results: DatasetResults, pair: Pair, lowest: list[LowTile]) -> dict:
    dataset, manifest = results.dataset, results.files["synthetic"][pair]
    table = results.synthetic[pair].set_index("tile_id", drop=False)
    if unknown := [tile.tile_id for tile in lowest if tile.tile_id not in table.index]:
        raise DataError(f"{results.files['agreement'][pair]}: names {unknown[0]!r}, which is not in {manifest}; delete it and run it again")
    rows = table.loc[[tile.tile_id for tile in lowest]]
    images, labels = (paths_of(manifest, rows, column, results.root) for column in ("image", "label"))
    pictures: list[list] = [[paint(read_label(path), dataset.palette) for path in labels], [read_rgb(path) for path in images]]
    name, titles = "-".join((dataset.name, "failures", *pair)), [number(tile.judge) for tile in lowest]
    draw.sample_sheet(titles, pictures, dataset.classes, dataset.palette, report.pictures.folder, name)
    alt = f"The {len(lowest)} samples of {results.name_of(pair)} that show their masks worst: masks above, samples below"
    figure = report.pictures(name, alt, "png")
    return {"sampler": results.name_of(pair), "figure": figure, "tiles": lowest, "of": results.agreement[pair].tiles}
