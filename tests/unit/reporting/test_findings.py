"""The sentences of the report follow from the numbers: noise is not called a gain, and what is not known is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from results_tree import DEFAULT, agreement, configuration, form, write_comparison

from crfm_core.planning.durations import hours
from crfm_core.reporting.comparison import best_form, read_comparison
from crfm_core.reporting.costs import cost_finding, read_costs
from crfm_core.reporting.findings import against_baseline, caveats, of_classes, of_rectification, rectified_pairs, without_baseline
from crfm_core.reporting.measurements import SamplesAgreement
from crfm_core.reporting.tables import paired_difference

SETTINGS = configuration()
CLASSES = ["road", "water", "forest", "barren"]


def rows_of(miou, baseline="real-equal", iou=None):
    """A table's rows from {recipe: [mIoU per seed]}; ``iou`` maps a recipe to {class: [IoU per seed]}."""
    seeds = range(len(next(iter(miou.values()))))
    rows = []
    for recipe, values in miou.items():
        row = {"recipe": recipe, "baseline": baseline, "n": len(values), "seeds": " ".join(map(str, seeds)), "verdict": "baseline"}
        row |= {"mIoU": np.mean(values), "mIoU_sd": np.std(values, ddof=1) if len(values) > 1 else np.nan}
        row |= {f"mIoU_seed{seed}": value for seed, value in zip(seeds, values, strict=True)}
        if baseline and recipe != baseline:
            gap = paired_difference(values, miou[baseline])
            row |= {"mIoU_difference": gap.mean, "mIoU_low": gap.low, "mIoU_high": gap.high, "verdict": gap.verdict}
            for name, ours in (iou or {}).get(recipe, {}).items():
                gap = paired_difference(ours, iou[baseline][name])
                row |= {f"IoU_difference:{name}": gap.mean, f"IoU_low:{name}": gap.low, f"IoU_high:{name}": gap.high}
        rows.append(row)
    return pd.DataFrame(rows)


BASE = [68, 69, 70]
GAIN, LOSS, NOISE, UNDEFINED = [72, 73.1, 74], [60, 61.1, 62], [69, 68, 71.3], [np.nan, 70, 71]
WILD_GAIN, WILD_LOSS = [70, 99, 75], [65, 40, 60]  # larger, and within noise


# ------------------------------------------------------------------------------------------------------ against a baseline


OVER = "crfm gains 4.0 points of mIoU over real-equal (95 % interval +3.9 to +4.2)"
UNDER = "crfm loses 8.0 points of mIoU against real-equal (95 % interval −8.1 to −7.8)"
WITHIN = "crfm differs from real-equal by +0.4 points of mIoU, which is within noise (95 % interval −2.7 to +3.5)"


@pytest.mark.parametrize(
    ("others", "headline", "tone"),
    [
        ({"crfm": GAIN, "triattention": NOISE}, f"Yes: {OVER}", "good"),
        ({"crfm": LOSS}, f"No: {UNDER}", "bad"),
        ({"crfm": LOSS, "triattention": NOISE}, f"No: {UNDER}, and none gains beyond noise", "bad"),
        ({"crfm": GAIN, "triattention": LOSS}, f"It depends: {OVER}, triattention loses 8.0 points of mIoU against real-equal", "open"),
        ({"crfm": LOSS, "triattention": WILD_LOSS}, f"No: {UNDER}, and none gains beyond noise", "bad"),
        ({"crfm": LOSS, "triattention": WILD_GAIN}, f"No: {UNDER}, and none gains beyond noise", "bad"),
        ({"crfm": GAIN, "triattention": WILD_GAIN}, f"Yes: {OVER}", "good"),
        ({"crfm": NOISE}, f"Not shown: {WITHIN}", "open"),
        ({"crfm": NOISE, "triattention": [68, 68, 71]}, f"Not shown: {WITHIN}, as is every other difference", "open"),
        ({"crfm": UNDEFINED}, "Open: real-equal has no defined difference to any recipe", "open"),
        ({"real": GAIN}, "Open: real-equal has no recipe with synthetic tiles beside it", "open"),
        ({"real": GAIN, "crfm": GAIN}, "Not shown: crfm differs from real by +0.0 points", "open"),
    ],
)
def test_the_answer_is_what_the_intervals_allow(others, headline, tone):
    finding = against_baseline(rows_of({"real-equal": BASE, **others}), "Did it help?", SETTINGS.recipes)
    assert finding.headline.startswith(headline) and finding.tone == tone
    assert finding.headline.endswith(finding.statement) and finding.question == "Did it help?"
    assert ("every other difference" in finding.headline) == ("every other difference" in headline)


def test_noise_is_not_called_a_gain():
    finding = against_baseline(rows_of({"real-equal": BASE, "triattention": NOISE, "crfm": [70, 69, 70]}), "?", SETTINGS.recipes)
    assert not any(" gains " in sentence for sentence in (finding.headline, *finding.sentences))
    assert "triattention reaches 69.4 mIoU (± 1.7 over 3 seeds): against real-equal it differs by +0.4" in " ".join(finding.sentences)


def test_more_real_training_decides_nothing_and_is_told_beside():
    finding = against_baseline(rows_of({"real-equal": BASE, "real": LOSS, "crfm": NOISE}), "?", SETTINGS.recipes)
    assert finding.headline.startswith("Not shown: crfm")
    assert finding.sentences[-1].startswith("For comparison, real, also without synthetic tiles, loses 8.0 points")


def test_synthesis_has_to_beat_the_best_without_it_but_not_labels_that_are_not_to_be_had():
    recipes = SETTINGS.recipes | {"ceiling": SETTINGS.recipes["real"].model_copy(update={"split": "reference"})}
    rows = rows_of({"real-equal": BASE, "real": GAIN, "crfm": [70, 71.1, 72], "ceiling": [80, 81, 82.1]})
    finding = against_baseline(rows, "?", recipes)
    assert finding.headline.startswith("No: crfm loses 2.0 points of mIoU against real (95 % interval")
    assert finding.sentences[0] == "The best recipe without synthetic tiles, real, reaches 73.0 mIoU (± 1.0 over 3 seeds)."
    assert finding.sentences[-1].startswith("For comparison, ceiling, with labels that are not to be had, gains 8.0 points")


@pytest.mark.parametrize("values", [GAIN, LOSS, NOISE])
def test_against_synthetic_tiles_the_answer_is_neither_yes_nor_no(values):
    finding = against_baseline(rows_of({"triattention": BASE, "crfm": values, "real": NOISE}, "triattention"), "Which?", SETTINGS.recipes)
    assert finding.tone == "open" and finding.headline == finding.statement and finding.headline.split()[0] in ("crfm", "real")
    assert any(sentence.startswith("real reaches") for sentence in finding.sentences)


def test_one_seed_gives_no_answer_and_says_so():
    rows = rows_of({"real-equal": [68], "crfm": [70], "triattention": [69]})
    finding = against_baseline(rows, "?", SETTINGS.recipes)
    assert finding.headline == "Open: crfm differs from real-equal by +2.0 points of mIoU, and a single seed gives no interval"
    assert "in a single run, so there is no interval" in finding.sentences[1]
    assert any("too few to judge" in note for note in caveats(configuration(seeds=[0]), True, 3))
    assert not any("one in twenty" in note for note in caveats(configuration(seeds=[0]), True, 3))


def test_without_a_baseline_nothing_is_compared():
    assert against_baseline(rows_of({"crfm": BASE, "real": LOSS}, ""), "?", SETTINGS.recipes) is None
    assert against_baseline(rows_of({"crfm": BASE}, "crfm"), "?", SETTINGS.recipes) is None
    said = without_baseline(rows_of({"crfm": BASE, "real": LOSS}, ""))
    assert said == "crfm has the highest mean, 69.0 mIoU (± 1.0 over 3 seeds); without a baseline there is no interval to judge it by"
    assert without_baseline(rows_of({"crfm": [70]}, "")) == "crfm reaches 70.0 mIoU; no other recipe is in this table"
    assert without_baseline(rows_of({"crfm": UNDEFINED, "real": UNDEFINED}, "")) == "crfm and real have no defined mIoU"


# --------------------------------------------------------------------------------------------------------------- per class

NEUTRAL = dict.fromkeys(CLASSES, BASE)


def classes_of(changes, recipe="crfm", seeds=3):
    """What is said of one recipe's classes; those not named are as in the baseline, but for noise."""
    ious = dict.fromkeys(CLASSES, NOISE) | changes
    iou = {"real-equal": {name: values[:seeds] for name, values in NEUTRAL.items()}, recipe: {n: v[:seeds] for n, v in ious.items()}}
    return of_classes(rows_of({"real-equal": BASE[:seeds], recipe: GAIN[:seeds]}, iou=iou), CLASSES, SETTINGS.recipes)


IN = "against real-equal, in points of IoU;"


@pytest.mark.parametrize(
    ("changes", "headline", "tone"),
    [
        (
            {"water": GAIN, "road": [70, 71.1, 72]},
            f"crfm gains on water (+4.0) and road (+2.0) {IN} forest and barren within noise",
            "good",
        ),
        ({"water": LOSS}, f"crfm loses on water (−8.0) {IN} road, forest and barren within noise", "bad"),
        ({"water": GAIN, "road": LOSS}, f"crfm gains on water (+4.0) and loses on road (−8.0) {IN} forest and barren within", "open"),
        ({}, "On none by more than noise: crfm against real-equal", "open"),
        (dict.fromkeys(CLASSES, UNDEFINED), "Open: no class has a defined IoU", "open"),
    ],
)
def test_classes_with_gains_and_losses_beyond_noise_are_named(changes, headline, tone):
    finding = classes_of(changes)
    assert finding.headline.startswith(headline) and finding.tone == tone


def test_the_intervals_of_the_classes_are_counted():
    assert "4 intervals were looked at, one per class; even if nothing differed, about 0.2 of them" in classes_of({}).sentences[-1]
    partly = classes_of({"road": UNDEFINED})
    assert partly.sentences[-2].startswith("3 intervals were looked at")
    assert partly.sentences[-1].startswith("No difference is defined for road: some run has no pixel")


def test_classes_of_one_seed_have_no_verdict():
    finding = classes_of({"water": GAIN}, seeds=1)
    assert finding.headline == "Open: a single seed gives no interval for any class" and "water (+4.0)" in finding.sentences[0]


def test_the_best_recipe_with_synthetic_tiles_speaks_for_the_classes():
    iou = dict.fromkeys(("real-equal", "real", "triattention", "crfm"), NEUTRAL)
    miou = {"real-equal": BASE, "real": [80, 81, 82], "triattention": NOISE, "crfm": [69, 70, 71]}
    assert "crfm" in of_classes(rows_of(miou, iou=iou), CLASSES, SETTINGS.recipes).headline
    assert of_classes(rows_of({"real-equal": BASE, "real": NOISE}, iou=iou), CLASSES, SETTINGS.recipes) is None


# ----------------------------------------------------------------------------------------------------------- the correction


def test_the_correction_is_judged_by_recipes_that_differ_in_nothing_else():
    assert rectified_pairs(SETTINGS, ["real", "triattention", "crfm", "unfiltered"]) == [("triattention", "crfm")]


@pytest.mark.parametrize(
    ("values", "headline", "tone"),
    [
        (GAIN, "Yes: it adds 4.0 points of mIoU to plain sampling", "good"),
        (LOSS, "No: it costs 8.0 points of mIoU against plain sampling", "bad"),
        (NOISE, "Not shown: +0.4 points of mIoU over plain sampling are within noise", "open"),
        (UNDEFINED, "Open: the scores are not defined", "open"),
    ],
)
def test_what_the_correction_adds_is_said_as_the_numbers_have_it(values, headline, tone):
    seen = {("triattention", "plain"): agreement(34.0, 12, []), ("triattention", "crfm"): agreement(40.0, 12, [])}
    seen = {key: SamplesAgreement.model_validate(found) for key, found in seen.items()}
    rows = rows_of({"triattention": BASE, "crfm": values}, "triattention")
    finding = of_rectification(rows, "triattention", "crfm", SETTINGS, seen)
    assert (finding.headline, finding.tone) == (headline, tone)
    assert "crfm gains 6.0 points of mIoU" in finding.sentences[1] and "no evidence" in finding.sentences[2]
    assert len(of_rectification(rows, "triattention", "crfm", SETTINGS, {}).sentences) == 1


# ------------------------------------------------------------------------------------------------- the best form

HIGHEST = "default with 4 corrected steps has the highest mIoU by the judge"
NONE = "No form has a higher mIoU by the judge than plain sampling (32.0): the closest, default with 4 corrected steps,"


@pytest.mark.parametrize(
    ("judge", "headline", "tone"),
    [
        ([33, 34, 38], f"{HIGHEST}, 35.0: against plain sampling (32.0) it gains 3.0 points of mIoU (95 % interval +0.5 to +5.5)", "good"),
        ([32, 31, 35], f"{HIGHEST}, 32.7: against plain sampling (32.0) it differs by +0.7 points of mIoU, which is within noise", "open"),
        ([30, 32, 34], f"{NONE} differs by +0.0 points of mIoU, which is within noise", "open"),
        ([31, 31, 33], f"{NONE} differs by −0.3 points of mIoU, which is within noise", "open"),
        ([27, 28.9, 31.1], f"{NONE} loses 3.0 points of mIoU (95 % interval −3.2 to −2.8)", "bad"),
        ([None, 40, 40], "Open: no form has a defined mIoU by the judge", "open"),
    ],
)
def test_the_best_form_is_said_as_the_numbers_have_it(tmp_path, judge, headline, tone):
    entry = form([0, 0, 0], DEFAULT[1])
    for seed, value in zip(entry["seeds"], judge, strict=True):
        seed["judge"]["mIoU"] = value
    finding = best_form(read_comparison(write_comparison(tmp_path, {"default": [entry]})))
    assert finding.headline.startswith(headline) and finding.tone == tone


@pytest.mark.parametrize(
    ("critic", "words"),
    [
        (
            [50, 53, 56],
            "change by +11.0 points, 8.0 points more than by the judge (95 % interval +5.5 to +10.5): the samples were optimised",
        ),
        ([43, 44, 49], "change by +3.3 points; the judge sees the same change within noise"),
        ([40, 42, 44], "change by +0.0 points."),
    ],
)
def test_the_critics_own_gain_is_called_larger_only_where_it_is(tmp_path, critic, words):
    (sentence,) = best_form(read_comparison(write_comparison(tmp_path, {"default": [form(DEFAULT[0], critic)]}))).sentences
    assert words in sentence and ("optimised against" in sentence) == (critic == DEFAULT[1])


@pytest.mark.parametrize(
    ("second", "words"),
    [([33, 34.5, 37], "Within noise of it: default with 4 corrected steps."), ([23, 24, 28], "Every other form is below it by more")],
)
def test_forms_that_the_seeds_cannot_tell_from_the_best_are_named(tmp_path, second, words):
    forms = {"default": [form(*DEFAULT, steps=2), form(second, DEFAULT[1])], "adaptive": [form([20, 21, 25.1], DEFAULT[1])]}
    finding = best_form(read_comparison(write_comparison(tmp_path, forms)))
    assert finding.headline.startswith("default with 2 corrected steps") and finding.sentences[-1].startswith(words)


# -------------------------------------------------------------------------------------------------------------------- cost

HEADER = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


def write_benchmarks(folder, **jobs):
    """Files of jobs, each of (seconds, cpu seconds)."""
    folder.mkdir()
    for name, (seconds, cpu) in jobs.items():
        (folder / f"{name.replace('__', '-')}.tsv").write_text(f"{HEADER}{seconds}\t0:0:0\t100\t-\t-\t-\t-\t-\t90\t{cpu}\n")
    return folder


def test_cost_is_counted_in_cpu_hours_without_gpus(tmp_path):
    folder = write_benchmarks(tmp_path / "b", train_generator__crfm=(3600, 7200), filter_tiles__a=(36, "-"), make_report=(999, 999))
    stages = read_costs(folder, [], SETTINGS)
    finding = cost_finding(stages)
    assert finding.headline == "2.0 CPU-hours" and "2 jobs took 1 h 01 min" in finding.sentences[0]
    assert finding.sentences[-1] == "Most of it: train generator (100 %)."


def test_cost_is_counted_in_gpu_hours_where_jobs_hold_gpus(tmp_path):
    raw = SETTINGS.model_dump(mode="json")
    segmentors = raw["segmentors"] | {"tiny": raw["segmentors"]["unet_tiny"] | {"processes": 8}}
    settings = configuration(controls=raw["controls"] | {"siamese": raw["controls"]["siamese"] | {"processes": 4}}, segmentors=segmentors)
    jobs = {"train_generator__siamese": (3600, 10), "train_segmentor__real-equal__tiny__0": (3600, 10)}
    jobs |= {"train_segmentor__real__unet_tiny__1": (3600, 10), "tile_scenes__train": (3600, 7200)}
    stages = read_costs(write_benchmarks(tmp_path / "b", **jobs), ["train_generator", "train_segmentor"], settings)
    assert {stage.name: stage.gpu / 3600 for stage in stages} == {"train generator": 4, "train segmentor": 9, "tile scenes": 0}
    finding = cost_finding(stages)
    assert finding.headline == "13 GPU-hours" and "2.0 CPU-hours" in finding.sentences[1]
    assert finding.sentences[-1] == "Most of it: train segmentor (69 %) and train generator (31 %)."


def test_a_cost_that_is_not_known_is_said_so(tmp_path):
    assert cost_finding(read_costs(tmp_path / "none", [], SETTINGS)).headline == "Not known: no stage has left its time"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0"), (36, "0.01"), (860, "0.24"), (3599, "1.0"), (35900, "10"), (432000, "120")])
def test_hours_have_two_digits_that_matter(seconds, text):
    assert hours(seconds) == text


def test_samplers_that_differ_in_more_than_the_correction_are_no_pair():
    more = SETTINGS.samplers["crfm"].model_copy(update={"num_steps": 50})
    settings = SETTINGS.model_copy(update={"samplers": SETTINGS.samplers | {"crfm": more}})
    assert rectified_pairs(settings, ["triattention", "crfm"]) == []
