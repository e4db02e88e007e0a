"""The page is whole, safe and says no more than the numbers do; a missing or damaged input is named and nothing is written."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from results_tree import DEFAULT, EVIL, FORMS, REPO, build, configuration, copied, dataset_named, form, write_comparison

from crfm_core import DataError
from crfm_core.experiment import selected_tables
from crfm_core.files import write_json
from crfm_core.manifest import read_manifest, write_manifest
from crfm_core.reporting import sections
from crfm_core.reporting.colours import Colours
from crfm_core.reporting.comparison import read_comparison
from crfm_core.reporting.figures import choose_tiles
from crfm_core.reporting.page import make_report
from crfm_core.reporting.score_tables import read_published
from crfm_core.reporting.sections import report_files

MAIN = ["real", "real-equal", "triattention", "crfm"]


def of_kind(arguments, kind, dataset="embedded"):
    """The files of a kind of one dataset."""
    return [Path(path) for path in arguments["experiment"].report_files(dataset)[kind].values()]


def table_of(arguments, name="main"):
    return Path(arguments["experiment"].results.table(name))


def text_of(page):
    """What a reader sees, without the pictures."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)))


def shown(page, name):
    """A section of the page, and what a reader sees of it."""
    part = page[page.index(f'<section id="{name}">') :]
    part = part[: part.index("</section>")]
    return part, text_of(part)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of the table main, with samples of which two are copies of training tiles."""
    arguments = build(tmp_path_factory.mktemp("report"), scale=f"tiny {EVIL}")
    path = of_kind(arguments, "generation")[1]
    write_json(path, json.loads(path.read_text()) | {"memorised": ["train-0-0", "train-1-2"], "cmmd": 1.234})
    make_report(**arguments)
    return arguments, arguments["page"].read_text()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The page of several tables over two datasets, one of which only one table compares on."""
    names, on = ["embedded", "embedded-25"], {"segmentors": ["segformer_tiny"], "baseline": "real-equal"}
    experiments = {
        "main": configuration().experiments["main"].model_dump(),
        "steps": on | {"title": "How many steps?", "recipes": ["triattention", "crfm-2", "crfm"], "baseline": "triattention"},
        "filters": on | {"title": "Which filter?", "recipes": ["real-equal", "agreement-pixel", "agreement", "hardness", "rare"]},
        "segmentors": on | {"title": "Another one?", "recipes": ["real-equal", "crfm"], "segmentors": ["segformer_tiny", "unet_tiny"]},
        "few": on | {"title": "What if there are fewer labels still?", "recipes": ["real-equal", "crfm"], "datasets": names},
    }
    datasets = [dataset_named(name) for name in names]
    arguments = build(
        tmp_path_factory.mktemp("wide"), datasets=datasets, experiments=experiments, tables="all", forms=None, comparison=None
    )
    make_report(**arguments)
    return arguments, arguments["page"].read_text()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A page of what is seldom: a sampler that searches for its steps, stops early, measures nothing afterwards and left notes; distances
    that were not measured; a mix without synthetic tiles; a comparison of one seed of noise; jobs with a GPU."""
    raw = yaml.safe_load((REPO / "config.yaml").read_text())
    searching = {"preset": "adaptive", "rectify": {"steps": 9, "trials": 3, "agreement": 0.95}, "critic_decoder": "models/taesd3"}
    samplers = raw["samplers"] | {"plain": raw["samplers"]["plain"] | {"guidance_scale": 2.5}, "crfm": raw["samplers"]["crfm"] | searching}
    controls = {name: control | {"caption_dropout": 0.1} for name, control in raw["controls"].items()}
    compared = raw["comparison"] | {"presets": ["default"]}
    arguments = build(tmp_path_factory.mktemp("odd"), samplers=samplers, controls=controls, forms=None, comparison=compared)
    root, synthetic = arguments["experiment"].results.folder("embedded"), of_kind(arguments, "synthetic")[1]
    table = read_manifest(synthetic)
    records = [json.loads(text)[: index % 4] for index, text in enumerate(table.corrections)]  # 0, 1, 2, 3, 0 ... of four
    table["corrections"] = [json.dumps([entry | {"loss_after": None} for entry in record]) for record in records]
    table["critic_loss_before"] = [2.0 if record else np.nan for record in records]
    table["critic_loss_after"] = np.nan
    table["note"] = ["no labelled pixel: not corrected" if index % 4 == 0 else "" for index in range(len(table))]
    write_manifest(synthetic, table)
    nothing = {"kind": "inception", "features": "InceptionV3", "missing": "no <weights>"} | dict.fromkeys(
        ("fid", "kid", "kid_sd", "subset")
    )
    nothing |= {"diversity": {"copies": None, "real": None}, "neighbours": [], "cmmd_missing": "no CLIP-like model"}
    for path in of_kind(arguments, "generation"):
        write_json(path, json.loads(path.read_text()) | nothing)
    mixed = read_manifest(root / "mixes" / "crfm.parquet")
    write_manifest(root / "mixes" / "crfm.parquet", mixed[mixed.source == "real"])
    write_comparison(root, {"default": [form([35], [50])]}, plain=([32], [42]))
    make_report(**arguments | {"gpu_stages": ["train_generator"]})
    return arguments["page"].read_text()


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_beside_it(report, wide):
    for _, page in (report, wide):
        targets = re.findall(r"(?:src|srcset|href|action|data)\s*=\s*[\"']?([^\"'>\s]*)", page)
        assert targets and all(target.startswith(("data:image/", "#")) for target in targets)
        anchors = {target[1:] for target in targets if target.startswith("#")}
        assert anchors <= set(re.findall(r'id="([^"]+)"', page)) and len(anchors) > 5
        assert "<script" not in page.lower() and "<link" not in page.lower() and "@import" not in page
        assert page.startswith("<!DOCTYPE html>") and not re.search(
            r"\bnan\b|\bNone\b", text_of(page.split("The configuration in full")[0])
        )


def test_every_element_that_is_opened_is_closed(wide):
    _, page = wide
    for name in ("section", "details", "table", "tr", "td", "th", "figure", "ul", "li", "aside", "div", "p"):
        assert len(re.findall(rf"<{name}[ >]", page)) == page.count(f"</{name}>"), name


def test_text_from_the_configuration_is_escaped(report):
    _, page = report
    assert EVIL not in page and "&lt;script&gt;" in page


def test_the_sections_come_in_the_order_in_which_one_asks(report):
    assert re.findall(r'<section id="(\w+)">', report[1]) == [
        "answer", "run", "scores", "agreement", "forms", "samples", "failures", "corrections", "curation", "data", "provenance",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the answer


def test_the_answer_comes_first_and_follows_from_the_intervals(report):
    _, answer = shown(report[1], "answer")
    assert "Did synthetic tiles help? Yes: crfm gains 3.0 points of mIoU over real-equal (95 % interval +2.6 to +3.3)" in answer
    assert "triattention reaches 70.0 mIoU (± 1.7 over 3 seeds): against real-equal it differs by +0.8 points of mIoU, which is" in answer
    assert "Not shown: +2.1 points of mIoU over plain sampling are within noise" in answer
    assert "What did it cost? 0.12 CPU-hours" in answer and "How sure is this?" in answer


def test_the_classes_of_the_answer_are_those_whose_intervals_leave_out_zero(report):
    frame = pd.read_csv(table_of(report[0])).set_index("recipe").loc["crfm"]
    classes = report[0]["experiment"].datasets["embedded"].classes
    gains = {name: frame[f"IoU_difference:{name}"] for name in classes if frame[f"IoU_low:{name}"] > 0}
    losses = [name for name in classes if frame[f"IoU_high:{name}"] < 0]
    headline = re.search(r"On which classes\? (.*?) against real-equal", shown(report[1], "answer")[1]).group(1)
    assert gains and all(f"{name} (+{gain:.1f})" in headline for name, gain in gains.items())
    assert ("loses" in headline) == bool(losses)
    assert not any(name in headline for name in classes if name not in gains and name not in losses)
    assert "7 intervals were looked at" in shown(report[1], "answer")[1]


def test_every_other_table_has_its_finding_in_the_answer(wide):
    _, answer = shown(wide[1], "answer")
    others = answer[answer.index("What the other tables say") : answer.index("How sure is this?")]
    assert "How many steps should be corrected? crfm" in others and "over triattention" in others or "from triattention" in others
    assert "embedded (6 real tiles): crfm gains 3.0" in others and "embedded-25 (5 real tiles): crfm gains 3.0 points" in others
    assert "segformer_tiny: crfm" in others and "unet_tiny: crfm" in others
    assert "Yes:" not in others and answer.count("Did synthetic tiles help?") == 1


def test_a_run_of_real_tiles_alone_with_one_seed_still_has_a_page(tmp_path):
    pair = {"title": "Longer", "recipes": ["real", "real-equal"], "segmentors": ["segformer_tiny"], "baseline": "real"}
    one = {"title": "Real only", "recipes": ["real"], "segmentors": ["segformer_tiny"]}
    changes = {"experiments": {"pair": pair, "one": one}, "tables": "all", "seeds": [0], "comparison": None}
    arguments = build(tmp_path, {"real": [66], "real-equal": [68]}, **changes)
    write_comparison(arguments["experiment"].results.folder("embedded"), FORMS)  # by an earlier configuration
    make_report(**arguments)
    page = arguments["page"].read_text()
    text = text_of(page)
    assert "too few to judge" in text and "one seed: no interval" in text and not re.search(r"\bnan\b", text)
    assert "Did synthetic tiles help? Not asked" not in text and "Open: real has no recipe with synthetic tiles beside it" in text
    assert "real reaches 66.0 mIoU; no other recipe is in this table." in text and "What is drawn in training recipe" in text
    assert "Which correction?" not in page and not any("forms" in path.name for path in arguments["figures"].iterdir())


def test_where_no_dataset_of_the_run_is_in_a_table_the_first_is_shown_in_full(tmp_path):
    experiments = {"few": {"title": "Few", "recipes": ["real"], "segmentors": ["segformer_tiny"], "datasets": ["embedded-50"]}}
    arguments = build(tmp_path, datasets=[dataset_named("embedded-50")], experiments=experiments, tables=["few"])
    make_report(**arguments)
    page = arguments["page"].read_text()
    assert 'id="others"' not in page and "train trained on 6" in shown(page, "data")[1]
    assert "Did synthetic tiles help? Not asked: no table compares recipes with a baseline" in text_of(page)


# ----------------------------------------------------------------------------------------------------------- the tables


def test_published_figures_never_stand_in_the_rows_of_ours(report):
    arguments, page = report
    published = yaml.safe_load((REPO / "configs" / "paper_results.yaml").read_text())["tables"]["main"]
    rows = [row for part in published for row in part["rows"].values()]
    numbers = {f"{row[score]:.2f}" for row in rows for score in ("OA", "mIoU", "mAcc")}
    apart = re.search(r'<aside class="theirs">.*?</aside>', page, flags=re.DOTALL).group()
    assert all(number in apart for number in numbers) and "not of this run" in apart
    assert "FUSU-4k , percent" in text_of(apart) and "TODSynth minus real only +1.60 +2.08 +2.22" in text_of(apart)
    assert "SynthEarth CLIP 5 75.35 47.53 58.91" in text_of(apart)
    assert not any(number in text_of(page.replace(apart, "")) for number in numbers)
    with table_of(arguments).open() as table:
        assert [row["recipe"] for row in csv.DictReader(table)] == MAIN
        assert not any(row["label"] in table_of(arguments).read_text() for row in rows)


def test_the_published_figures_are_those_of_the_notes():
    published = read_published(REPO / "configs" / "paper_results.yaml")
    assert set(published.tables) == {"main", "control_schemes", "crfm_steps"} and len(published.tables["main"][0].rows) == 6
    steps = published.tables["crfm_steps"][0]
    assert [row.FID for row in steps.rows.values()] == [35.85, 34.86, 38.65, 66.95] and steps.scores == ["mIoU", "mAcc", "FID"]
    ours = configuration().recipes
    assert all(name in ours for name in published.tables["control_schemes"][0].rows) and all(name in ours for name in steps.rows)


def test_each_table_says_what_makes_it_again(wide):
    arguments, page = wide
    for name in arguments["experiment"].tables:
        assert f"run {table_of(arguments, name)} --config tables=all" in page
    assert f"run {arguments['page']} --config tables=all" in page


def test_rows_tell_their_tiles_and_tables_of_several_datasets_stand_together(wide):
    _, scores = shown(wide[1], "scores")
    few = scores[scores.index("What if there are fewer labels still?") :]
    assert re.search(r"embedded real-equal 6 – 3 69\.2 ± 1\.3 – baseline", few)
    assert re.search(r"crfm 6 18 3 72\.1 ± 1\.3 \+3\.0 \(\+2\.6 to \+3\.3\) higher", few)
    assert re.search(r"embedded-25 real-equal 5 – 3", few) and "crfm 5 15 3" in few
    segmentors = scores[scores.index("Another one?") :]
    assert "segformer_tiny real-equal 6" in segmentors and "unet_tiny real-equal 6" in segmentors


def test_a_table_of_generation_shows_the_samples_beside_the_scores(report):
    _, scores = shown(report[1], "scores")
    head = "recipe samples Fréchet distance kernel distance judge: mIoU critic: mIoU"
    assert f"{head} triattention 18 12.35 0.0123 ± 0.0021 34.0 ± 0.5 54.0 ± 0.5 crfm 18" in scores
    assert "Distances in deepest features of the judge, unet_tiny on reference, seed 1, against 384 real tiles of reference" in scores


def test_recipes_that_share_a_figure_have_different_colours():
    settings = configuration(tables="all")
    for table in selected_tables(settings).values():
        assert len(set(Colours(settings).of_recipes(table.recipes).values())) == len(table.recipes)
    everything = [(recipe.control, recipe.sampler) for recipe in settings.recipes.values() if recipe.control]
    assert len(set(Colours(settings).of_samples(dict.fromkeys(everything)).values())) == 8  # more there are not


# ---------------------------------------------------------------------------------------------------------- the samples


def test_what_was_measured_of_samples_names_its_extractor_and_counts(report):
    _, text = shown(report[1], "agreement")
    assert "compare all samples with all real tiles in deepest features of the judge, unet_tiny on reference, seed 1" in text
    assert "plain 18 384 reference 12.35 0.0123 ± 0.0021 – 0.031 0.123 0" in text
    assert "crfm 18 384 reference 12.35 0.0123 ± 0.0021 1.23 0.031 0.123 2" in text
    assert "Memorised, crfm: train-0-0, train-1-2 of 18 samples" in text and "Memorised, plain" not in text
    assert "train-0-0 train-0 0.70" in text and "FID" not in text and "Only the judge (unet_tiny on reference) is evidence" in text


def test_what_was_not_measured_of_samples_is_said_with_the_reason(odd):
    _, text = shown(odd, "agreement")
    assert "Not measured for plain, crfm: no &lt;weights&gt;." in text and "Not measured for plain, crfm: no CLIP-like model." in text
    assert "FID and KID compare" in text and "crfm 18 384 reference – – – – 0" in text and "plain not measured" in text


def test_failures_are_those_the_judge_finds_worst(report):
    arguments, page = report
    part, text = shown(page, "failures")
    assert "crfm: the lowest 6 of 18 samples" in text and "train-0-0 (judge 3.0, critic 9.0), train-0-1 (judge 4.0, critic 9.0)" in text
    assert "train-1-2 (judge 8.0" in text and "train-2-0 (judge 9.0" not in text  # the seventh
    assert "embedded-failures-triattention-crfm.png" in part
    assert (arguments["figures"] / "embedded-failures-triattention-plain.svg").is_file()


def test_the_generators_loss_stands_with_and_without_masks(report):
    assert "triattention triattention 0.432 0.877 2" in text_of(report[1])


def test_every_number_names_its_file_and_every_figure_lies_in_the_folder(report):
    arguments, page = report
    assert all(path in page for path in report_files(arguments["experiment"]))
    found = {path.name for path in arguments["figures"].iterdir()}
    names = ["agreement", "samples", "corrections", "curation", "forms", "forms-steps"]
    names = [f"embedded-{name}" for name in names] + ["main-embedded-segformer_tiny-classes", "main-differences"]
    names += [f"embedded-failures-triattention-{sampler}" for sampler in ("plain", "crfm")]
    assert found == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert page.count("data:image/") == len(names) + 3 and "abababababab" in page  # three of the data sheet


def test_datasets_of_some_tables_alone_are_folded_away(wide):
    _, page = wide
    part, text = shown(page, "others")
    assert re.findall(r"<summary>(embedded\S*):", part) == ["embedded-25"] and 'class="fold" open' not in part
    assert not any("embedded-25" in shown(page, name)[1] for name in ("agreement", "samples", "curation", "data"))
    assert "train trained on 5 1" in text and "crfm sampled 15" in text


def test_many_samplers_share_sheets_of_few_columns(wide):
    part, _ = shown(wide[1], "samples")
    titles = re.findall(r'alt="Masks, real tiles and samples, one tile per row; columns: ([^"]+)"', part)
    assert len(titles) == 2 and part.index("Samples of the other tables") > part.index(titles[0])
    assert titles[0] == "mask, real tile, plain, plain, filtered, crfm, crfm, pixel, crfm, agreement-pixel"
    assert titles[1] == "mask, real tile, crfm-2, crfm-2, filtered"


# ------------------------------------------------------------------------------------------------------------- curation


def test_what_every_step_dropped_is_counted_with_its_reason(wide):
    _, text = shown(wide[1], "curation")
    assert "crfm sampled 18 – – – – filter pixel 18 100.0 %" in text and "background (0 %)" in text
    why = r"ignores pixels on which the critic(&#39;|')s loss exceeds 1\.25 times the mean loss of their class on real tiles"
    assert re.search(rf"filter pixel \([^)]*crfm[^)]*\): {why}", text)  # not all recipes have it, so they are named
    assert "agreement sampled 18 – – – – filter agreement 12 66.7 %" in text and "keeps the 67 % of the images on which the critic" in text
    assert "re-sampling hardness 12 66.7 %" in text and "keeps more versions of masks whose classes the critic finds hard" in text
    assert "one of the 2 classes with the highest loss on real tiles, or of which more than 80 %" in text
    assert "at most 3 for each of 6 real tiles, drawn among those left, whatever their copy" in text


def test_pixels_per_class_are_those_of_the_manifests(wide):
    arguments, page = wide
    folder = arguments["experiment"].results.folder("embedded")
    counts = [
        np.stack([np.asarray(pixels) for pixels in table.pixels]).sum(axis=0)
        for table in (
            read_manifest(folder / "synthetic/triattention/crfm/all.parquet"),
            read_manifest(folder / "filtered/triattention/crfm/agreement.parquet"),
            read_manifest(folder / "filtered/triattention/crfm/agreement-pixel.parquet"),
        )
    ]
    _, text = shown(page, "curation")
    steps = text[text.index("Every class at every step") :]
    part = steps[steps.index("agreement-pixel class") :]
    for index, name in enumerate(arguments["experiment"].datasets["embedded"].classes):
        before, after, last = (int(one[index]) for one in counts)
        left = "0 %" if not last else f"{100 * last / before:.1f} %"
        shares = f"{before:,} {after:,} {100 * after / before:.1f} % {last:,} {'0 %' if not last else f'{100 * last / after:.1f} %'}"
        assert re.search(rf"{name} {re.escape(shares)} {last:,} \S+( %)? {re.escape(left)}", part), (name, shares)


def test_both_meanings_of_three_to_one_are_told(wide):
    _, text = shown(wide[1], "curation")
    assert "real 6 0 – – – 100.0 % 0 %" in text
    assert "crfm 6 18 3 3.00 3 50.0 % 50.0 %" in text  # 6 tiles of weight 3 and 18 of weight 1
    assert "agreement 6 12 3 2.00 3 60.0 % 40.0 %" in text
    assert "pseudo-labelled" not in text, "no recipe has any"


def test_a_mix_that_lost_its_synthetic_tiles_is_pointed_out(odd):
    _, text = shown(odd, "curation")
    assert "The mix of crfm holds no synthetic tile: it was trained on its 6 real tiles alone." in text
    assert "mixed in 0 0 % 0 %" in text and "crfm 6 0 3 0.00 3 100.0 % 0 %" in text


# ----------------------------------------------------------------------------------------------------------------- data


def test_the_data_are_shown_with_their_licence_and_shares(report):
    arguments, page = report
    part, text = shown(page, "data")
    (sheet,) = of_kind(arguments, "data_sheet")
    assert all(str(sheet / name) in part for name in ("contact-train.png", "class_shares.svg", "tile_map.png", "data_sheet.json"))
    assert "contact-test.png" not in part and "embedded world" in part
    numbers = json.loads((sheet / "data_sheet.json").read_text())["splits"]
    assert "train trained on 6 1 16 × 16 0.30 100.0 %" in text and "test scored 4 1 16 × 16" in text
    for index, name in enumerate(arguments["experiment"].datasets["embedded"].classes):
        cells = [f"{100 * numbers[split]['shares'][index]:.1f} % {numbers[split]['shown'][index]}" for split in ("train", "test")]
        assert f"{name} {' '.join(cells)}" in text
    assert "ignored, of all pixels 0 % 6 0 % 4" in text


def test_time_per_stage_is_told_from_the_benchmark_files(report, odd):
    text = text_of(report[1])
    assert "train generator 1 7 min 0.11 812 MB" in text and "train segmentor 1 40 s 0.011 812 MB" in text
    text = text_of(odd)
    assert "What did it cost? 0.11 GPU-hours" in text and "train segmentor 1 40 s – 0.011 812 MB" in text


# --------------------------------------------------------------------------------------------------------- the sections


def test_a_section_is_one_file_and_one_entry(report, tmp_path, monkeypatch):
    """With a result of its own, which the workflow then makes for the report."""
    arguments = copied(report[0], tmp_path)
    experiment = arguments["experiment"]
    (tmp_path / "toy.py").write_text(
        'TITLE = "A toy"\n'
        'TEMPLATE = "<p>{{ results.dataset.name }}: {{ found }} in {{ settings.scale }}</p>"\n'
        "def show_dataset(report, results):\n"
        "    return {'found': (results.root / 'toy.txt').read_text()}\n"
    )
    (experiment.results.folder("embedded") / "toy.txt").write_text("<b>seven</b>")
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(tmp_path)])
    monkeypatch.setitem(sections.SECTIONS, "toy", lambda one: [f"{one.results.folder(name)}/toy.txt" for name in one.used_datasets])
    assert str(experiment.results.folder("embedded") / "toy.txt") in report_files(experiment)
    make_report(**arguments)
    part, text = shown(arguments["page"].read_text(), "toy")
    assert "<h2>A toy</h2>" in part and "embedded: &lt;b&gt;seven" in text


def test_every_section_has_its_module_and_every_module_its_entry():
    modules = {path.stem for path in Path(sections.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(sections.SECTIONS) == modules


def test_the_report_is_made_from_files_of_the_layout_each_once(wide):
    experiment = wide[0]["experiment"]
    paths = report_files(experiment)
    assert len(paths) == len(set(paths)) and all(experiment.results.find(path) for path in paths)
    assert {experiment.results.find(path).names.get("dataset") for path in paths} == {None, *experiment.used_datasets}


def test_the_entries_of_the_sections_import_nothing_that_takes_time():
    program = "import sys, crfm_core.reporting.sections; print([n for n in ('pandas', 'matplotlib', 'jinja2') if n in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert answer.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ bad input


def refuses(arguments, words):
    """make_report names the fault and writes nothing."""
    with pytest.raises(DataError, match=words):
        make_report(**arguments)
    assert not arguments["page"].exists() and not arguments["figures"].exists()


def test_a_data_sheet_without_a_picture_the_report_shows_is_named(report, tmp_path):
    arguments = copied(report[0], tmp_path)
    (sheet,) = of_kind(arguments, "data_sheet")
    (sheet / "tile_map.png").unlink()
    refuses(arguments, r"data_sheet/tile_map\.png: no such picture; delete its folder")
    found = json.loads((sheet / "data_sheet.json").read_text())
    write_json(sheet / "data_sheet.json", found | {"pictures": found["pictures"][1:]})
    refuses(arguments, r"data_sheet\.json: no picture of contact for train; delete the folder")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("agreement", {"lowest": ...}, "lowest: Field required; delete it and run the workflow again"),
        ("agreement", {"judge": {"OA": 1}}, r"judge\.mIoU: Field required"),
        ("agreement", {"lowest": [{"tile_id": "x", "judge": 1.0, "critic": 2.0}]}, "names 'x', which is not in .*all.parquet"),
        ("generation", {"real": ...}, "real: Field required"),
        ("generation", {"kind": "eyes"}, "kind: Input should be 'inception', 'clip' or 'judge'"),
    ],
)
def test_an_incomplete_measurement_is_named(report, tmp_path, kind, changes, words):
    arguments = copied(report[0], tmp_path)
    path = of_kind(arguments, kind)[1]
    content = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in content.items() if value is not ...})
    refuses(arguments, rf"{kind}/triattention/crfm\.json: {words}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("agreement", r"agreement/triattention/plain\.json: no such file"),
        ("filtered", r"filtered/triattention/plain/pixel\.parquet: no such"),
        ("synthetic", r"synthetic/triattention/plain/all\.parquet: no such"),
        ("reconstruction", r"agreement/reconstruction\.json: no such file"),
    ],
)
def test_a_file_that_is_not_there_is_named(report, tmp_path, kind, words):
    arguments = copied(report[0], tmp_path)
    of_kind(arguments, kind)[0].unlink()
    refuses(arguments, words)


def test_a_table_that_is_not_there_is_named(report, tmp_path):
    arguments = copied(report[0], tmp_path)
    table_of(arguments).unlink()
    refuses(arguments, r"tables/main\.csv: no such table")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda frame: frame[frame.recipe != "crfm"], "its rows are not those of experiments.main"),
        (lambda frame: frame.assign(dataset="elsewhere"), "no table has rows of dataset embedded"),
        (lambda frame: frame.drop(columns="IoU:road"), "columns missing: IoU:road"),
        (lambda frame: frame.iloc[:0], "no rows; delete it"),
    ],
)
def test_a_table_that_is_not_the_configured_one_is_refused(report, tmp_path, edit, words):
    arguments = copied(report[0], tmp_path)
    edit(pd.read_csv(table_of(arguments))).to_csv(table_of(arguments), index=False)
    refuses(arguments, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("source: x\ntables: {}", "has no table 'main', which experiments.main.paper names; it has: .none."),
        ("source: x\ntables: {main: [{dataset: d, rows: {real: {mIoU: 4}}}]}", r"tables\.main\.0\.rows\.real\.label: Field required"),
        ("source: [", "not valid YAML"),
    ],
)
def test_damaged_published_figures_are_named(report, tmp_path, content, words):
    path = tmp_path / "paper.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"paper\.yaml: {words}"):
        make_report(**report[0] | {"paper": path, "page": tmp_path / "r.html", "figures": tmp_path / "f"})


# -------------------------------------------------------------------------------------------------- which correction?


def test_the_forms_of_the_correction_stand_with_what_they_scored_and_did(report):
    _, section = shown(report[1], "forms")
    assert "the same 8 masks of the split held_out" in section and "noise seeds 0, 1, 2" in section
    # Judge: differences 3, 2, 4 to plain, so 3 -+ 4.3027 · 1 / sqrt(3); sd of 33, 34, 38: sqrt(14 / 2).
    assert "plain 0 42.0 ± 2.0 32.0 ± 2.0 – – baseline 52.0 ± 2.0 42.0 ± 2.0" in section
    assert "default 4 45.0 ± 2.6 35.0 ± 2.6 +3.00 +0.52 to +5.48 higher 63.0 ± 3.0 53.0 ± 3.0" in section
    assert "released 4 41.5 ± 2.2 31.5 ± 2.2 −0.50 −2.65 to +1.65 within noise" in section
    assert "plain 0 1.100 ± 0.100 0.0 – – – 1.00" in section
    assert "default 4 1.100 ± 0.100 4.0 25.0 % 30.0 % 0 % 1.80" in section
    assert "released 4 1.100 ± 0.100 4.0 25.0 % 0.0083 % 48.3 % 1.80" in section
    assert "default with 4 corrected steps: 2 of 24 samples: the critic&#39;s loss is not finite at step 1" in section


def test_one_seed_of_noise_gives_no_interval(odd):
    text = text_of(odd)
    assert "it differs by +3.0 points of mIoU in a single run, so there is no interval" in text
    assert "default 4 45.0 35.0 +3.00 – one seed: no interval 60.0 50.0" in text and not re.search(r"\bnan\b", text)


def without(key):
    def remove(path):
        found = json.loads(path.read_text())
        entry = found["forms"][0]
        for part in key[:-1]:
            entry = entry[part]
        del entry[key[-1]]
        write_json(path, found)

    return remove


def other_masks(path):
    write_json(path, json.loads(path.read_text()) | {"masks": 9})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_text('{"preset": "default", "forms": ['), "not valid JSON"),
        (without(["raised"]), r"forms\.0\.raised: Field required; delete it"),
        (without(["seeds", 1, "judge", "mIoU"]), r"forms\.0\.seeds\.1\.judge\.mIoU: Field required; delete it"),
        (other_masks, r"other masks, steps or seeds than .*plain\.json"),
    ],
)
def test_a_damaged_file_of_the_comparison_is_named(tmp_path, damage, words):
    paths = write_comparison(tmp_path, {"default": [form(*DEFAULT)]})
    damage(paths[1])
    with pytest.raises(DataError, match=rf"comparison/default\.json: {words}"):
        read_comparison(paths)


def test_a_comparison_needs_plain_sampling(tmp_path):
    with pytest.raises(DataError, match=r"comparison/plain\.json: not among the files"):
        read_comparison(write_comparison(tmp_path, {"default": [form(*DEFAULT)]})[1:])


# --------------------------------------------------------------------------------------------- what the correction did


def test_samples_that_were_done_early_and_losses_not_measured_are_told(odd):
    # 18 images with 0, 1, 2 and 3 corrections in turn: 25 of them, in three different steps.
    assert "crfm 3 1.4 2.000 not measured 30.0 % 0 %" in text_of(odd) and not re.search(r"\bnan\b", text_of(odd))


def test_notes_on_samples_are_counted(odd, report):
    assert "crfm: 5 of 18 samples: no labelled pixel: not corrected" in text_of(odd)
    assert "of 18 samples:" not in text_of(report[1])


def test_the_samplers_are_told_by_what_their_images_depend_on(odd, report):
    assert "plain 23 none (plain) guidance 2.5" in text_of(odd)
    assert (
        "first 9 steps, step size searched for, at most 0.3 (constant), 3 trials per step; a sample is done at 95 % agreement or after "
        "3 steps without gain, the critic looks through models/taesd3"
    ) in text_of(odd)
    fixed = "first 23 steps, step size 0.3 (constant), 1 per step, valid pixels, sum, normalise relative, no shrink, no clamp"
    assert f"plain 23 none (plain) – crfm 23 preset default, changed: steps {fixed}" in text_of(report[1])


# --------------------------------------------------------------------------------------------------------- small parts


def test_the_tiles_of_the_sheet_do_not_depend_on_the_order_of_rows(report):
    table = pd.read_parquet(of_kind(report[0], "tiles")[0])
    mixed = table.sample(frac=1, random_state=3)
    assert list(table.tile_id.iloc[choose_tiles(table, 3)]) == list(mixed.tile_id.iloc[choose_tiles(mixed, 3)])
