"""The layout that the authors' released code reads: one JSON object per line with the paths of a label and an image, and the prompt."""

from __future__ import annotations

import json
from pathlib import Path

from crfm_core import DataError
from crfm_core.data.sources import FoundScene, SceneSource
from crfm_core.files import inside


class ReleasedIndex(SceneSource):
    """Pairs that an index lists, as the code released with TODSynth reads them.

    Features: images with labels and a prompt each, which ``captions: {kind: given}`` takes.
    Format: per split a text file of JSON objects, one per line, with ``source`` (label), ``target`` (image) and ``prompt``.
    Classes: ids or colours of the labels, by the dataset's ``label_map``.
    Splits: one index file each.
    Licence: that of the files.
    Citation: that of the files.
    """

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """The pairs that the index files list. DataError, with file and line, for lines that are not such objects or name missing files."""
        indices = self.settings.splits.items()
        return [scene for split, index in indices for scene in _listed(inside(self.folder, index), split, self.folder)]

    def faults(self) -> list[str]:
        missing = {split: index for split, index in self.settings.splits.items() if not (self.folder / index).is_file()}
        return [
            f"dataset {self.dataset.name}: {self.folder / index}: no such file; correct source.root or source.splits.{split}"
            for split, index in missing.items()
        ]


def _listed(index: Path, split: str, root: Path) -> list[FoundScene]:
    try:
        lines = index.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{index}: no such file; correct source.root or source.splits.{split}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{index}: cannot be read ({error}); it must be a text file with one JSON object per line") from None
    scenes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{index}, line {number}"
        try:
            entry = json.loads(line)
            label, image, prompt = (entry[key] for key in ("source", "target", "prompt"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f'{where}: not an object with "source", "target" and "prompt" ({error!r}); correct the line') from None
        try:
            image_path, label_path = inside(root, str(image)), inside(root, str(label))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        for path in (image_path, label_path):
            if not path.is_file():
                raise DataError(f"{where}: there is no {path}; correct the line, or source.root")
        relative = Path(image)
        key, group = relative.with_suffix("").parts, str(relative.parent)
        scenes.append(FoundScene(key, image_path, label_path, relative, split, group, str(prompt)))
    if not scenes:
        raise DataError(f"{index}: lists nothing; correct source.splits.{split}")
    return scenes
