"""The real tiles: a dataset's sheet with its pictures."""

from __future__ import annotations

from crfm_core import DataError
from crfm_core.reporting.data_sheet import shown_picture
from crfm_core.reporting.inputs import DatasetResults
from crfm_core.reporting.report import Report

TITLE = "Data"


def show_dataset(report: Report, results: DatasetResults) -> dict:
    """The sheet and those of its pictures that the report shows. Raises DataError when one is missing."""
    sheet, folder, dataset = results.data_sheet, results.files["data_sheet"][results.dataset.name], results.dataset
    pictures = {"contact": sheet.of_kind("contact", dataset.train), "shares": sheet.of_kind("shares"), "scenes": sheet.of_kind("scenes")}
    if missing := [kind for kind, picture in pictures.items() if picture is None]:
        raise DataError(
            f"{folder}/data_sheet.json: no picture of {missing[0]} for {dataset.train}; delete the folder and run the workflow again"
        )
    return {"sheet": sheet, "folder": folder, **{kind: shown_picture(folder, picture) for kind, picture in pictures.items()}}
