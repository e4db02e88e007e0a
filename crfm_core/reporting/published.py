"""Figures that a publication reports, to be shown beside a run's own and never among them."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crfm_core import DataError
from crfm_core.settings import Table

PUBLISHED_SCORES = ("OA", "mIoU", "mAcc", "FID")


class PublishedRow(BaseModel):
    """One method; scores in percent, or points where its part holds differences."""

    model_config = ConfigDict(extra="forbid")

    label: str
    filter: str | None = None
    synthetic_per_real: float | None = None
    OA: float | None = None
    mIoU: float | None = None
    mAcc: float | None = None
    FID: float | None = None


class PublishedPart(BaseModel):
    """The figures of one dataset. ``rows`` are by the name of this workflow's recipe where there is one."""

    model_config = ConfigDict(extra="forbid")

    dataset: str
    difference: bool = False
    rows: dict[str, PublishedRow] = Field(min_length=1)

    @property
    def scores(self) -> list[str]:
        """Those that any row has."""
        return [score for score in PUBLISHED_SCORES if any(getattr(row, score) is not None for row in self.rows.values())]

    def has(self, key: str) -> bool:
        """Whether any row tells ``filter`` or ``synthetic_per_real``."""
        return any(getattr(row, key) is not None for row in self.rows.values())


class Published(BaseModel):
    """configs/paper_results.yaml."""

    model_config = ConfigDict(extra="forbid")

    source: str
    training: str = ""
    tables: dict[str, list[PublishedPart]]


def read_published(path: Path) -> Published:
    """The published figures. Raises DataError when the file is missing or damaged."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return Published.model_validate(content)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it ships with the workflow, restore it") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML: {error}; restore the file that ships with the workflow") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "all of it"
        raise DataError(f"{path}: {where}: {fault['msg']}; restore the file that ships with the workflow") from None


def parts_beside(name: str, table: Table, published: Published, path: Path) -> list[PublishedPart]:
    """The published figures that belong beside a table; none when it names none. Raises DataError when it names an unknown one."""
    if table.paper is None:
        return []
    if table.paper not in published.tables:
        known = ", ".join(published.tables) or "(none)"
        raise DataError(f"{path}: has no table {table.paper!r}, which experiments.{name}.paper names; it has: {known}")
    return published.tables[table.paper]
