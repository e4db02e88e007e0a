"""The real tiles: a dataset's sheet with its pictures."""

from __future__ import annotations

from crfm_core import DataError
from crfm_core.reporting.data_sheet import shown_picture
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.page import Report

TITLE = "Data"


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """The sheet and those of its pictures that the report shows. Raises DataError when one is missing."""
    sheet, folder, train = results.data_sheet, results.files["data_sheet"][results.dataset.name], results.dataset.train
    shown = {}
    for kind, split in (("contact", train), ("shares", None), ("scenes", None)):
        picture = sheet.of_kind(kind, split)
        if picture is None:
            raise DataError(f"{folder}/data_sheet.json: no picture of {kind} for {train}; delete the folder and run the workflow again")
        shown[kind] = shown_picture(folder, picture)
    return {"sheet": sheet, "folder": folder, **shown}
