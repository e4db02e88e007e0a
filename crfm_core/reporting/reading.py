"""JSON files of earlier stages as typed values."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from crfm_core import DataError
from crfm_core.files import read_json

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def read_model(path: Path, model: type[AnyModel], remedy: str = "delete it") -> AnyModel:
    """The content of a JSON file as a ``model``. Raises DataError naming the file and what is wrong in it, key by key."""
    content = read_json(path)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'all of it'}: {fault['msg']}" for fault in error.errors()]
        raise DataError(f"{path}: {'; '.join(faults[:3])}; {remedy} and run the workflow again") from None
