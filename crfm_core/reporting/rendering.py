"""What the pages share: their templates, how numbers are written in them, and pictures as data, so that a page needs nothing beside it."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from crfm_core import DataError
from crfm_core.reporting.findings import number

MIME_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def environment() -> Environment:
    """The templates of this folder; what is put into them is escaped, and a name that is not there is an error."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {"number": number, "signed": lambda value, digits=1: number(value, True, digits), "percent": percent}
    found.globals["spread"] = spread
    return found


def spread(mean: float, sd: float | None = None, digits: int = 1) -> str:
    """``69.0 ± 1.1``; only the mean where there is no sd."""
    text = number(mean, digits=digits)
    return text if sd is None or np.isnan(sd) or np.isnan(mean) else f"{text} ± {number(sd, digits=digits)}"


def embed(path: Path, alt: str, file: Path | None = None) -> dict:
    """A figure as a page holds it: its data, its text for those who do not see it, and the name of its file (``file`` if it will move).

    Raises DataError when there is no such picture.
    """
    try:
        data = base64.b64encode(Path(path).read_bytes()).decode()
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; delete its folder and run the workflow again") from None
    return {"data": f"data:{MIME_TYPES[Path(path).suffix]};base64,{data}", "alt": alt, "file": str(file or path)}


def percent(share: float | None) -> str:
    """A share in percent, with as many decimals as small ones need."""
    if share is None or np.isnan(share):
        return "–"
    if 0 < share < 1e-6:
        return "< 0.0001 %"
    return f"{100 * share:{'.1f' if share >= 0.01 else '.2g'}} %"


class Pictures:
    """Turns figures saved in a folder into what a page can hold: data, and the name under which they will lie."""

    def __init__(self, folder: Path, final: Path):
        self.folder, self.final = folder, final

    def __call__(self, name: str, alt: str, suffix: str = "svg") -> dict:
        return embed(self.folder / f"{name}.{suffix}", alt, Path(self.final) / f"{name}.{suffix}")
