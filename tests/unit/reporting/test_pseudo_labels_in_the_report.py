"""What tables and report say of recipes with labels of the critic: their tiles, how often they are drawn, and their classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from results_tree import REPO, build

from crfm_core.manifest import read_manifest
from crfm_core.reporting.page import make_report
from crfm_core.reporting.tables import read_score_table


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    """The arguments of a report on real, synthetic and pseudo-labelled tiles, which is written."""
    raw = yaml.safe_load((REPO / "config.yaml").read_text())
    recipes = raw["recipes"] | {"pseudo": {"pseudo": True}, "both": raw["recipes"]["crfm"] | {"pseudo": True, "pseudo_weight": 2}}
    table = {"title": "Does it help?", "recipes": ["real-equal", "pseudo", "crfm", "both"], "baseline": "real-equal", "generation": True}
    experiments = {"main": table | {"segmentors": ["segformer_tiny"]}}
    tables = {"recipes": recipes, "experiments": experiments, "tables": ["main"], "forms": None, "comparison": None}
    arguments = build(tmp_path_factory.mktemp("pseudo"), **tables)
    make_report(**arguments)
    return arguments


def text_of(page: str, name: str) -> str:
    part = page[page.index(f'<section id="{name}">') :]
    part = re.sub(r'src="[^"]+"', "", part[: part.index("</section>")])
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", part))


def test_the_table_counts_pseudo_labelled_tiles_apart_from_synthetic_ones(built):
    csv = built["experiment"].results.table("main")
    frame = read_score_table(csv).set_index("recipe")
    assert frame.pseudo_tiles.to_dict() == {"real-equal": 0, "pseudo": 5, "crfm": 0, "both": 5}
    assert frame.synthetic_tiles.to_dict() == {"real-equal": 0, "pseudo": 0, "crfm": 18, "both": 18}
    assert frame.judge_mIoU.isna().to_dict() == {"real-equal": True, "pseudo": True, "crfm": False, "both": False}
    lines = Path(csv).with_suffix(".txt").read_text().splitlines()
    assert any(line.split()[:3] == ["both", "18", "5"] for line in lines) and max(map(len, lines)) <= 100


def test_the_report_tells_what_is_drawn_and_which_classes_the_labels_have(built):
    page = built["page"].read_text()
    drawn = text_of(page, "curation")
    total = 3 * 6 + 18 + 2 * 5
    assert f"both 6 18 3 3.0 3 5 2 {100 * 18 / total:.1f} % {100 * 18 / total:.1f} % {100 * 10 / total:.1f} %" in drawn.replace(
        "3.00", "3.0"
    )
    assert re.search(r"pseudo 6 0 – – 1 5 1 54\.5 % 0 % 45\.5 %", drawn) and "5 tiles, of whose pixels 100.0 % keep a label" in drawn
    table = read_manifest(built["experiment"].results.pseudo_labels("embedded"))
    pixels = sum(row[1] for row in table.pixels)
    shown = sum(row[1] > 0 for row in table.pixels)
    assert re.search(rf"building {pixels:,} [\d.]+ % [\d.]+ % {shown}\b", drawn)
    assert re.search(r"pseudo training split none – – – 1 all, weight 1 ", text_of(page, "run"))
    assert re.search(r"both training split triattention/crfm .* 3 3 all, weight 2 ", text_of(page, "run"))
    assert re.search(r"pseudo 6 – 5 3 ", text_of(page, "scores"))


def test_the_answer_holds_synthesis_against_the_best_recipe_without_it(built):
    answer = text_of(built["page"].read_text(), "answer")
    assert "pseudo" in answer and "both reaches" in answer
