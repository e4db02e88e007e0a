"""Which colour stands for which recipe and which samples, the same all over a page where there are enough colours."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TypeVar

from crfm_core.experiment import selected_tables
from crfm_core.reporting.figures import COLOURS, GREYS
from crfm_core.settings import Settings

Key = TypeVar("Key", bound=Hashable)


class Colours:
    """Greys are real tiles only; samples of a (control, sampler) have the colour of the first recipe that uses them."""

    def __init__(self, settings: Settings):
        in_tables = [name for table in selected_tables(settings).values() for name in table.recipes]
        self.recipes: dict[str, str] = {}
        self.samples: dict[tuple[str, str], str] = {}
        greys, vivid = cycle(GREYS), cycle(COLOURS)
        for name in dict.fromkeys([*in_tables, *settings.recipes]):
            recipe = settings.recipes[name]
            if recipe.control is None or recipe.sampler is None:
                self.recipes[name] = next(greys)
            else:
                self.recipes[name] = next(vivid)
                self.samples.setdefault((recipe.control, recipe.sampler), self.recipes[name])

    def of_recipes(self, names: Iterable[str]) -> dict[str, str]:
        """Colours for recipes that share a figure."""
        return _distinct(list(names), self.recipes)

    def of_samples(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Colours for samples that share a figure."""
        pairs = list(pairs)
        return _distinct(pairs, dict.fromkeys(pairs, COLOURS[-1]) | self.samples)


def _distinct(names: Sequence[Key], preferred: Mapping[Key, str]) -> dict[Key, str]:
    """A colour for each name: its preferred one, or the first free one of its kind where a name before it has that."""
    found: dict[Key, str] = {}
    for name in names:
        palette = GREYS if preferred[name] in GREYS else COLOURS
        free = [colour for colour in (preferred[name], *palette) if colour not in found.values()]
        found[name] = free[0] if free else preferred[name]
    return found
