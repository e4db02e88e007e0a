"""What every adapter gives: scenes as they lie in the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FoundScene:
    """A scene of a source; paths are absolute."""

    key: tuple[str, ...]  #: what tells it from the others, which becomes its name
    image: Path
    label: Path | None  #: None where labels are burned later
    relative: Path  #: of the image, below the source's root
    split: str = ""  #: "" where the dataset's section ``split`` says it
    group: str = ""  #: the part of the key that its folders gave
    caption: str = ""
