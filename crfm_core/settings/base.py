"""What every section of the configuration is made of: the section itself and the types of its fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="a name used in file paths")]
Positive = Annotated[int, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


def _plain(path: str) -> str:
    """Refuse a path with what the engine takes for a wildcard, or the shell that starts its jobs could take for a command."""
    if found := re.search(r"""^-|[{}"'`$;&|<>\\\n\t]""", path):
        raise ValueError(f"a path may not {'begin with' if found[0] == '-' else 'contain'} {found[0]!r}; rename the file or folder")
    return path


Location = Annotated[str, AfterValidator(_plain)]
#: Text that is written into cells of CSV files: nothing that a spreadsheet takes for a formula.
Words = Annotated[str, Field(pattern=r"^[^=+@-]")]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Keys that do not change what is made, except by rounding: speed, memory, how often it is saved.
    PERFORMANCE_KEYS: ClassVar[frozenset[str]] = frozenset()

    #: Keys that came when there were results already: with their default they are no part of what results depend on, so that none of those
    #: is made again.
    LATER_KEYS: ClassVar[frozenset[str]] = frozenset()

    def _performance_key_names(self) -> frozenset[str]:
        """Those of :attr:`PERFORMANCE_KEYS` that do not change what is made with these values."""
        return self.PERFORMANCE_KEYS

    def older_keys(self, exclude: frozenset[str] = frozenset()) -> dict[str, Any]:
        """All keys but those of :attr:`LATER_KEYS` that have their default, with their values as plain data."""
        unchanged = {name for name in self.LATER_KEYS if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=set(exclude) | unchanged)

    def result_keys(self) -> dict[str, Any]:
        """The keys that results depend on, with their values as plain data."""
        return self.older_keys(self._performance_key_names())

    def performance_keys(self) -> dict[str, Any]:
        """The other keys, with their values as plain data."""
        return self.model_dump(mode="json", include=set(self._performance_key_names()))

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        """Refuse text with control characters, which could write anything to a terminal; line ends and tabs are allowed."""
        for key, value in data.items() if isinstance(data, dict) else ():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
                    raise ValueError(f"{key}: contains control characters, in {text!r}; remove them")
        return data


def read_section(kind: Any, values: dict[str, Any]) -> Any:
    """A section from plain values, as a job gets them; ``kind`` is its class, or a union of the classes of its kinds."""
    return TypeAdapter(kind).validate_python(values)
