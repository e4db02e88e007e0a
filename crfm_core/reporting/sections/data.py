"""The real tiles: a dataset's sheet with its pictures."""

from __future__ import annotations

from crfm_core import DataError
from crfm_core.reporting.data_sheet import shown_picture
from crfm_core.reporting.material import Material


def show_data(material: Material) -> dict:
    """The sheet and those of its pictures that the report shows. Raises DataError when one is missing."""
    sheet, folder, train = material.data_sheet, material.files["data_sheets"], material.dataset.train
    wanted = {"contact": sheet.of_kind("contact", train), "shares": sheet.of_kind("shares"), "scenes": sheet.of_kind("scenes")}
    if missing := [kind for kind, picture in wanted.items() if picture is None]:
        raise DataError(f"{folder}/data_sheet.json: no picture of {missing[0]} for {train}; delete the folder and run the workflow again")
    return {"sheet": sheet, **{kind: shown_picture(folder, picture) for kind, picture in wanted.items()}}
