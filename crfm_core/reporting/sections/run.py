"""What was run: recipes, samplers, and the machine."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from crfm_core.devices import gpu_names
from crfm_core.experiment import filter_chain, selected_tables
from crfm_core.reporting.page import Report
from crfm_core.settings import Sampler, Settings

TITLE = "What was run"


def show(report: Report) -> dict:
    """The run in a list; its recipes and samplers, those of the first tables first; and the time that each stage took."""
    leading = {name for one in report.main for name in one.leading}
    return {
        "controls": list(dict.fromkeys(control for one in report.datasets for control, _ in one.files["synthetic"])),
        "recipes": recipe_rows(report.settings, leading),
        "samplers": sampler_rows(report.settings, leading),
        "hardware": hardware(report.settings.device),
    }


def recipe_rows(settings: Settings, leading: Collection[str]) -> list[dict]:
    """What each compared or judging recipe trains on, and for how long with each segmentor that meets it; the ``leading`` ones, and
    those of critic and judge, are marked."""
    uses = [(r, segmentor) for table in selected_tables(settings).values() for r in table.recipes for segmentor in table.segmentors]
    watching = [(one.recipe, one.segmentor) for one in (settings.critic, settings.judge) if one.recipe and one.segmentor]
    counts: dict[str, dict[str, int]] = {}
    for name, segmentor in (*uses, *watching):
        counts.setdefault(name, {})[segmentor] = settings.iterations(name, segmentor)
    marked = {*leading, *dict(watching)}
    recipes = settings.recipes
    return [
        {
            "name": name,
            "recipe": recipes[name],
            "filters": filter_chain(settings, recipes[name].filter),
            "iterations": found,
            "leading": name in marked,
        }
        for name, found in counts.items()
    ]


def sampler_rows(settings: Settings, leading: Collection[str]) -> list[dict]:
    """The samplers of the recipes in the tables that are built; those of the ``leading`` recipes are marked."""
    names = {settings.recipes[name].sampler for table in selected_tables(settings).values() for name in table.recipes}
    marked = {settings.recipes[name].sampler for name in leading} & names - {None} or names
    return [
        {"name": name, "sampler": one, "line": sampler_line(one), "leading": name in marked}
        for name, one in settings.samplers.items()
        if name in names
    ]


def sampler_line(sampler: Sampler) -> str:
    """The settings of a sampler that its images depend on, beside its steps."""
    parts = []
    if correction := sampler.rectify:
        parts.append(f"first {correction.steps} steps, {correction.describe()}")
    if sampler.critic_decoder:
        parts.append(f"the critic looks through {sampler.critic_decoder}")
    if sampler.guidance_scale > 1:
        parts.append(f"guidance {sampler.guidance_scale:g}")
    if sampler.mask_guidance_scale > 1:
        parts.append(f"mask guidance {sampler.mask_guidance_scale:g}")
    return ", ".join(parts) or "–"


def hardware(device: str) -> str:
    """Processor, memory and, for device cuda, GPUs of the machine that writes the page."""
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (OSError, ValueError):
        names, memory = [], ""
    gpus = Counter(gpu_names() if device == "cuda" else [])
    parts = [f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical cores{memory}"]
    return "; ".join(parts + [f"{count} × {name}" if count > 1 else name for name, count in sorted(gpus.items())])
