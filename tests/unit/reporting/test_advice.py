"""What the first screen ranks and advises follows from the figures of the run, and each figure is named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from results_tree import MIOU, build, configuration

from crfm_core.reporting.advice import masks_read, next_steps
from crfm_core.reporting.costs import recipe_seconds
from crfm_core.reporting.measurements import GeneratorLoss, HeldOutScores
from crfm_core.reporting.page import Report
from crfm_core.reporting.rendering import Pictures
from crfm_core.reporting.sections.answer import leading_group, ranking

RECIPES = configuration().recipes | {"ceiling": configuration().recipes["real"].model_copy(update={"split": "reference"})}


def rows_of(**miou):
    rows = [
        {
            "recipe": name.replace("_", "-"),
            "baseline": "real-equal",
            "seeds": "0 1 2"[: 2 * len(values) - 1],
            "real_tiles": 48,
            "mIoU": np.mean(values),
        }
        | {f"mIoU_seed{seed}": value for seed, value in enumerate(values)}
        | {"IoU:road": np.mean(values) + 5, "IoU:water": np.mean(values) ** 2 / 70}
        for name, values in miou.items()
    ]
    return pd.DataFrame(rows)


def scores(miou, last_quarter=0.1):
    return HeldOutScores(OA=miou, mIoU=miou, mAcc=miou, tiles=32, last_quarter=last_quarter)


def results_of(loss=0.4, without=0.8, judge=82.0, critic=80.0, gained=0.1, samples=75.0, unlabelled=True):
    held_out = SimpleNamespace(judge=scores(judge), critic=scores(critic, gained))
    return SimpleNamespace(
        validation={"triattention": GeneratorLoss(loss=loss, loss_mask_ignored=without, tiles=["a"])},
        reconstruction=SimpleNamespace(held_out=held_out),
        agreement={("triattention", "crfm"): SimpleNamespace(judge=SimpleNamespace(mIoU=samples))},
        dataset=SimpleNamespace(name="own", has_unlabelled=unlabelled),
        name_of=lambda pair: pair[1],
    )


def advice(results=None, **miou):
    miou = miou or {"real_equal": [70, 71, 72], "crfm": [73, 74, 75.2]}
    return next_steps(rows_of(**miou), ["road", "water"], RECIPES, results or results_of())


def test_labels_come_first_with_the_gap_to_what_more_of_them_give_and_the_classes_that_gain():
    found = advice(real_equal=[70, 71, 72], crfm=[73, 74, 75.2], ceiling=[80, 81, 82.1])
    assert found.headline == "Labels: 7.0 points of mIoU are still to be had, most on water and road"
    assert found.sentences[0].startswith("ceiling, with 48 labelled tiles, is 7.0 points above crfm (95 % interval")
    single = advice(real_equal=[70], ceiling=[77.0])
    assert single.headline.startswith("Labels: 7.0 points") and "above real-equal (a single run)" in single.sentences[0]
    assert "add little" in advice(real_equal=[70, 71, 72], ceiling=[70, 71.2, 71.9]).headline


@pytest.mark.parametrize(
    ("changes", "headline", "sentence"),
    [
        ({"loss": 0.7}, "A generator that reads its masks", "on held-out tiles its loss is 0.70 with them and 0.80 without"),
        ({"samples": 60.0}, "Samples that show their masks", "crfm samples show their masks at 60.0 mIoU, real tiles theirs at 82.0"),
        ({"gained": 0.6}, "A better critic", "has not converged: the last quarter of its training gained 0.6 points"),
        ({"critic": 70.0}, "A better critic", "The critic scores 70.0 mIoU on held-out tiles, the judge 82.0"),
        ({"unlabelled": False}, "Unlabelled imagery", "own names no unlabelled scenes"),
        ({}, "Nothing stands out: more seeds would narrow the intervals", ""),
    ],
)
def test_each_weakness_of_the_run_is_named_with_its_figures(changes, headline, sentence):
    found = advice(results_of(**changes))
    assert found.headline == headline and sentence in " ".join(found.sentences)


def test_masks_are_read_when_they_lower_the_held_out_loss_clearly():
    assert masks_read(0.5, 0.8) and not masks_read(0.7, 0.8) and not masks_read(0.9, 0.8)


def test_recipes_are_ranked_by_their_means_and_what_they_take(tmp_path):
    arguments = build(tmp_path)
    folder = tmp_path / "results" / "benchmarks" / "embedded"
    times = {f"train_segmentor-crfm-segformer_tiny-{seed}": 10 + seed for seed in (0, 1, 2)} | {"build_base_model": 100}
    times |= {"train_segmentor-real-segformer_tiny-0": 5, "train_generator-triattention": 200}
    times |= {f"synthesise_shard-triattention-crfm-{shard}-of-2": 30 for shard in (1, 2)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, seconds in times.items():
        (folder / f"{name}.tsv").write_text(f"s\tcpu_time\tmax_rss\n{seconds}\t{seconds}\t1\n")
    experiment = arguments["experiment"]
    assert recipe_seconds(experiment, "embedded", "crfm", "segformer_tiny") == 11 + 100 + 5 + 200 + 60
    assert np.isnan(recipe_seconds(experiment, "embedded", "real-equal", "segformer_tiny")), "its trainings left no time"

    (tmp_path / "figures").mkdir(exist_ok=True)
    report = Report(
        **{**{k: v for k, v in arguments.items() if k != "figures"}, "pictures": Pictures(tmp_path / "figures", tmp_path / "figures")}
    )
    ranked = ranking(report, *leading_group("embedded", report.tables, report.settings))
    assert [line.row.recipe for line in ranked.lines] == sorted(MIOU, key=lambda name: -np.mean(MIOU[name]))
    assert [line.place for line in ranked.lines] == [1, 2, 3, 4] and ranked.rival == "real-equal"
    assert [line.gap is None for line in ranked.lines] == [line.row.recipe == "real-equal" for line in ranked.lines]
