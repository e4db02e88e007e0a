"""What was run: recipes, samplers, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path

from crfm_core.devices import gpu_names
from crfm_core.experiment import filter_chain, selected_tables
from crfm_core.reporting.page import Report
from crfm_core.reporting.sections.corrections import sampler_line
from crfm_core.settings import Settings

TITLE = "What was run"


def show(report: Report) -> dict:
    """The run in a list; its recipes and samplers, those of the first tables first; and the time that each stage took."""
    leading = {name for one in report.main for name in one.leading}
    recipes, samplers = recipe_rows(report.settings, leading), sampler_rows(report.settings, leading)
    return {"recipes": recipes, "samplers": samplers, "hardware": hardware(report.settings.device)}


def recipe_rows(settings: Settings, leading: Collection[str]) -> list[dict]:
    """What each compared or judging recipe trains on, and for how long with each segmentor that meets it; the ``leading`` ones, and
    those of critic and judge, are marked."""
    uses: dict[str, dict[str, int]] = {}
    for table in selected_tables(settings).values():
        for name in table.recipes:
            for segmentor in table.segmentors:
                uses.setdefault(name, {})[segmentor] = settings.iterations(name, segmentor)
    marked = set(leading)
    for one in (settings.critic, settings.judge):
        if one.recipe and one.segmentor:
            uses.setdefault(one.recipe, {})[one.segmentor] = settings.iterations(one.recipe, one.segmentor)
            marked.add(one.recipe)
    return [
        {
            "name": name,
            "recipe": settings.recipes[name],
            "filters": filter_chain(settings, settings.recipes[name].filter),
            "iterations": found,
            "leading": name in marked,
        }
        for name, found in uses.items()
    ]


def sampler_rows(settings: Settings, leading: Collection[str]) -> list[dict]:
    """The samplers of the recipes in the tables that are built; those of the ``leading`` recipes are marked."""
    names = {settings.recipes[name].sampler for table in selected_tables(settings).values() for name in table.recipes}
    first = {settings.recipes[name].sampler for name in leading} & names - {None}
    marked = first or names
    return [
        {"name": name, "sampler": one, "line": sampler_line(one), "leading": name in marked}
        for name, one in settings.samplers.items()
        if name in names
    ]


def hardware(device: str) -> str:
    """Processor, memory and, for device cuda, GPUs of the machine that writes the page."""
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (OSError, ValueError):
        names, memory = [], ""
    parts = [f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical cores{memory}"]
    if device == "cuda":
        found = gpu_names()
        parts += [f"{found.count(name)} × {name}" if found.count(name) > 1 else name for name in sorted(set(found))]
    return "; ".join(parts)
