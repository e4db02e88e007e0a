"""Which colour stands for which recipe and which samples, the same all over a page where there are enough colours."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from crfm_core.experiment import selected_tables
from crfm_core.reporting.figures import COLOURS, GREYS
from crfm_core.settings import Settings


class Colours:
    """Greys are real tiles only; samples of a (control, sampler) have the colour of the first recipe that uses them."""

    def __init__(self, settings: Settings):
        in_tables = [name for table in selected_tables(settings).values() for name in table.recipes]
        self.recipes: dict[str, str] = {}
        self.samples: dict[tuple[str, str], str] = {}
        greys, vivid = 0, 0
        for name in dict.fromkeys([*in_tables, *settings.recipes]):
            recipe = settings.recipes[name]
            if recipe.control is None:
                self.recipes[name] = GREYS[greys % len(GREYS)]
                greys += 1
            else:
                self.recipes[name] = COLOURS[vivid % len(COLOURS)]
                self.samples.setdefault((recipe.control, recipe.sampler), self.recipes[name])
                vivid += 1

    def of_recipes(self, names: Iterable[str]) -> dict[str, str]:
        """Colours for recipes that share a figure."""
        return apart(list(names), self.recipes)

    def of_samples(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Colours for samples that share a figure."""
        keys = list(keys)
        return apart(keys, dict.fromkeys(keys, COLOURS[-1]) | self.samples)


def apart(names: Sequence[Hashable], preferred: dict) -> dict:
    """A colour for each name: its preferred one, or the first free one of its kind where a name before it has that."""
    found: dict = {}
    for name in names:
        palette = GREYS if preferred[name] in GREYS else COLOURS
        free = [colour for colour in (preferred[name], *palette) if colour not in found.values()]
        found[name] = free[0] if free else preferred[name]
    return found
