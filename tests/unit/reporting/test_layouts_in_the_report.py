"""What the report says of new layouts: how many of which kind, their classes, and their samples beside their own masks."""

from __future__ import annotations

import re

import yaml
from results_tree import REPO, build

from crfm_core.reporting.page import make_report


def page_of(folder, **layouts) -> str:
    raw = yaml.safe_load((REPO / "config.yaml").read_text())
    samplers = {name: one | {"layouts": layouts.get(name, "training")} for name, one in raw["samplers"].items()}
    augmented = {"rich": {"kind": "augmented", "shares": {"water": 0.2}}}
    arguments = build(folder, samplers=samplers, layouts=augmented, forms=None, comparison=None)
    make_report(**arguments)
    return arguments["page"].read_text()


def section(page: str) -> str:
    found = page[page.index('<section id="samples">') :]
    return found[: found.index("</section>")]


def test_new_layouts_are_counted_and_shown_with_their_samples(tmp_path):
    part = section(page_of(tmp_path, crfm="rich"))
    titles = re.findall(r'alt="([^"]+)"', part)
    assert titles[0].startswith("Masks, real tiles and samples, one tile per row") and "crfm" not in titles[0]
    assert titles[1].startswith("New layouts and samples, one per row; columns: mask, crfm")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r'src="[^"]+"', "", part)))
    assert "Masks are the new layouts rich, of which there is no real image." in text and "train-0-rich-0" in text
    assert re.search(r"training – 6 6 0 [\d.]+ %", text) and re.search(r"rich crfm 18 6 36 [\d.]+ %", text)
    assert "rich is augmented: masks of training tiles, turned and mirrored" in text and "class shares wanted: water 20 %" in text


def test_without_new_layouts_nothing_is_said_of_them(tmp_path):
    assert "New layouts" not in page_of(tmp_path)
