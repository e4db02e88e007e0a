"""The tables' statistics are right, and what cannot be computed is said and not made up."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from results_tree import agreement, configuration, draw_tile, generation, write_scores

from crfm_core import DataError
from crfm_core.curation.mixing import mix
from crfm_core.files import write_json
from crfm_core.manifest import write_manifest
from crfm_core.metrics.confusion import ConfusionMatrix
from crfm_core.reporting.tables import make_table, paired_difference, read_score_table, unpaired_difference
from crfm_core.settings import Table

RECIPES = configuration().recipes


def write_mix(results, dataset, recipe, real=4, synthetic=8):
    """The mix of a recipe, with tiles that nothing reads."""
    rng, folder = np.random.default_rng(0), results / dataset
    tiles = folder / "tiles" / "train.parquet"
    row = draw_tile(folder / "tiles", "t", rng, 2, "train", dataset)
    write_manifest(tiles, [row | {"tile_id": f"t{i}"} for i in range(real)])
    made = folder / "synthetic" / "all.parquet"
    write_manifest(made, [row | {"tile_id": f"s{i}", "copy": 0} for i in range(max(1, synthetic))])
    out = folder / "mixes" / f"{recipe}.parquet"
    mix(tiles, made, out, synthetic / real if RECIPES[recipe].control else 0)
    return out


def write_samples(results, dataset, recipe, **changes):
    """What was measured of a recipe's samples."""
    control, sampler = RECIPES[recipe].control, RECIPES[recipe].sampler
    paths = [results / dataset / kind / control / f"{sampler}.json" for kind in ("generation", "agreement")]
    write_json(paths[0], generation(12, [], **changes))
    write_json(paths[1], agreement(34.0, 12, []))
    return paths


def table_of(results, miou, classes=("a", "b"), datasets=("d",), **changes):
    """Make a table of {recipe: [mIoU per seed]}, or of {(dataset, segmentor, recipe): the same}; the paths of its files."""
    runs = miou if isinstance(next(iter(miou)), tuple) else {(d, "m", recipe): values for d in datasets for recipe, values in miou.items()}
    recipes, segmentors = (list(dict.fromkeys(key[index] for key in runs)) for index in (2, 1))
    table = Table(title="Does it help?", recipes=recipes, segmentors=segmentors, **{"baseline": "real-equal", **changes})
    scores = [p for (d, s, r), values in runs.items() for p in write_scores(results, d, classes, {r: values}, s)]
    mixes = [write_mix(results, d, r) for d in datasets for r in recipes]
    samples = [p for d in datasets for r in recipes if RECIPES[r].control for p in write_samples(results, d, r)] if table.generation else []
    seeds = list(range(len(next(iter(runs.values())))))
    make(results, table, scores, mixes, samples, datasets, seeds)
    return results / "tables" / "main.csv", results / "tables" / "main.txt"


def make(results, table, scores, mixes, samples=(), datasets=("d",), seeds=(0,)):
    csv = results / "tables" / "main.csv"
    given = (list(scores), list(mixes), list(samples), table, RECIPES, list(datasets), list(seeds), "embedded", "0123456789abcdef", results)
    return make_table(*given, csv, csv.with_suffix(".txt"))


def changed(path, **changes):
    write_json(path, {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value != "gone"})


# ----------------------------------------------------------------------------------------------------------- statistics


def test_spread_and_interval_equal_a_hand_computation(tmp_path):
    path, _ = table_of(tmp_path, {"real-equal": [68, 69, 70], "crfm": [70, 70, 73]})
    row = read_score_table(path).set_index("recipe").loc["crfm"]
    assert row.mIoU == 71 and row.mIoU_sd == pytest.approx(3**0.5)  # deviations -1, -1, 2: sqrt(6 / 2)
    half = 4.302652729911275 * 1 / 3**0.5  # t(0.975, 2) · sd of the differences 2, 1, 3 / sqrt(n)
    assert row.mIoU_difference == 2
    assert [row.mIoU_low, row.mIoU_high] == pytest.approx([2 - half, 2 + half])
    assert row.n == 3 and row.seeds == "0 1 2" and row.configuration == "0123456789ab" and row.scale == "embedded"
    assert row.mF1 == pytest.approx(80) and row.mF1_difference == pytest.approx(2)  # the fixture's mF1 is mIoU + 9


def test_each_class_has_its_paired_difference_and_interval(tmp_path):
    miou = {"real-equal": [68, 69, 70], "crfm": [70, 70, 73]}
    path, _ = table_of(tmp_path, miou)
    ious = {  # before: 10, 20, 30 and after: 13, 25, 31 of class a: 3, 5, 1, so 3 -+ 4.3027 · 2 / sqrt(3)
        recipe: [tmp_path / "d" / "segmentors" / recipe / "m" / f"seed{seed}" / "scores.json" for seed in range(3)] for recipe in miou
    }
    for recipe, values in (("real-equal", [10, 20, 30]), ("crfm", [13, 25, 31])):
        for scores, value in zip(ious[recipe], values, strict=True):
            changed(scores, IoU=[value, 50])
    table = Table(title="t", recipes=list(miou), segmentors=["m"], baseline="real-equal")
    mixes = [tmp_path / "d" / "mixes" / f"{recipe}.parquet" for recipe in miou]
    make(tmp_path, table, [p for paths in ious.values() for p in paths], mixes, seeds=[0, 1, 2])
    row = read_score_table(path).set_index("recipe").loc["crfm"]
    half = 4.302652729911275 * 2 / 3**0.5
    assert row["IoU_difference:a"] == 3 and row["IoU:a"] == 23 and row["IoU_sd:a"] == pytest.approx(84**0.5)
    assert [row["IoU_low:a"], row["IoU_high:a"]] == pytest.approx([3 - half, 3 + half])
    assert [row["IoU_difference:b"], row["IoU_low:b"], row["IoU_high:b"]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([70, 70, 73], "within noise"), ([72, 73.1, 74], "higher"), ([60, 61.1, 62], "lower"), ([68, 69, 70], "within noise")],
)
def test_a_difference_is_called_what_its_interval_allows(tmp_path, values, verdict):
    path, text = table_of(tmp_path, {"real-equal": [68, 69, 70], "crfm": values})
    assert dict(zip(read_score_table(path).recipe, read_score_table(path).verdict, strict=True)) == {
        "real-equal": "baseline",
        "crfm": verdict,
    }
    assert verdict in text.read_text()


def test_paired_differences_see_what_unpaired_ones_do_not():
    a, b = [60, 65, 70], [59, 64.1, 68.9]
    assert paired_difference(a, b).verdict == "higher"
    assert unpaired_difference(a, b).verdict == "within noise"


def test_the_unpaired_interval_is_that_of_welch():
    gap = unpaired_difference([10.0, 12.0, 14.0], [9.0, 9.5, 10.0])
    # Welch by hand: se = sqrt(4/3 + 0.25/3), freedom = se^4 / ((4/3)^2/2 + (0.25/3)^2/2) = 2.2490, t(0.975) = 3.8798
    assert gap.mean == 2.5
    assert gap.high - gap.mean == pytest.approx(3.8798 * (4.25 / 3) ** 0.5, rel=2e-3)


def test_a_difference_is_taken_within_one_dataset_and_segmentor(tmp_path):
    levels = {("d", "m"): 60, ("d", "n"): 70, ("e", "m"): 20, ("e", "n"): 30}
    runs = {(*key, "real-equal"): [level, level + 1] for key, level in levels.items()}
    runs |= {(*key, "crfm"): [level + gain, level + gain + 1] for gain, (key, level) in enumerate(levels.items(), 1)}
    path, text = table_of(tmp_path, runs, datasets=("d", "e"))
    frame = read_score_table(path)
    assert list(zip(frame.dataset, frame.segmentor, frame.recipe, strict=True)) == [
        (*key, recipe) for key in levels for recipe in ("real-equal", "crfm")
    ]
    assert frame[frame.recipe == "crfm"].mIoU_difference.tolist() == [1, 2, 3, 4]
    assert all(f"dataset {d}, segmentor {s}, 4 real tiles" in text.read_text() for d, s in levels)


# ------------------------------------------------------------------------------------------------- what cannot be computed


def test_one_seed_has_neither_spread_nor_interval(tmp_path):
    path, text = table_of(tmp_path, {"real-equal": [68], "crfm": [70]})
    row = read_score_table(path).set_index("recipe").loc["crfm"]
    assert row.verdict == "one seed: no interval" and np.isnan(row.mIoU_sd) and np.isnan(row.mIoU_low) and np.isnan(row["IoU_low:a"])
    assert "70.0 " in text.read_text() and "±" not in text.read_text().split("recipe")[1]
    assert "one seed (0), so no spread and no interval" in text.read_text()


def test_a_single_recipe_is_a_table(tmp_path):
    path, text = table_of(tmp_path, {"real": [50, 60]}, baseline=None)
    assert read_score_table(path).mIoU.tolist() == [55] and read_score_table(path).verdict.tolist() == [""]
    assert "against" not in text.read_text()


def test_a_class_that_never_occurs_has_no_iou_and_spoils_no_mean(tmp_path):
    path, _ = table_of(tmp_path, {"real-equal": [50, 60], "crfm": [55, 66]})
    scores = sorted(tmp_path.glob("d/segmentors/*/m/seed*/scores.json"))
    for one in scores:
        changed(one, IoU=[None, json.loads(one.read_text())["IoU"][1]])
    table = Table(title="t", recipes=["real-equal", "crfm"], segmentors=["m"], baseline="real-equal")
    frame = make(tmp_path, table, scores, sorted(tmp_path.glob("d/mixes/*.parquet")), seeds=[0, 1])
    assert frame[["IoU:a", "IoU_difference:a", "IoU_low:a"]].isna().all(axis=None) and (frame["IoU:b"] > 0).all()
    assert frame.verdict[1] == "within noise" and read_score_table(path)["IoU_difference:b"].notna().tolist() == [False, True]


def test_a_score_that_is_undefined_for_one_seed_is_called_so(tmp_path):
    table_of(tmp_path, {"real-equal": [50, 60], "crfm": [55, 66]})
    scores = sorted(tmp_path.glob("d/segmentors/*/m/seed*/scores.json"))
    changed(scores[0], mIoU=None, mF1=None)  # crfm, seed 0
    table = Table(title="t", recipes=["real-equal", "crfm"], segmentors=["m"], baseline="real-equal")
    frame = make(tmp_path, table, scores, sorted(tmp_path.glob("d/mixes/*.parquet")), seeds=[0, 1])
    assert frame.verdict.tolist() == ["baseline", "undefined score"] and np.isnan(frame.mIoU[1]) and frame.OA[1] == 70.5
    assert "undefined score" in (tmp_path / "tables" / "main.txt").read_text()


# ------------------------------------------------------------------------------------------------------- tiles and samples


def test_tiles_of_the_mixes_are_counted(tmp_path):
    path, text = table_of(tmp_path, {"real-equal": [50, 60], "crfm": [55, 66]})
    frame = read_score_table(path)
    assert frame.real_tiles.tolist() == [4, 4] and frame.synthetic_tiles.tolist() == [0, 8] and frame.test_tiles.tolist() == [192, 192]
    assert "pseudo_tiles" not in frame, "no recipe has any"
    assert any(line.split()[:2] == ["crfm", "8"] for line in text.read_text().splitlines())


def test_samples_stand_beside_the_scores_and_their_distances_name_the_extractor(tmp_path):
    path, text = table_of(tmp_path, {"real-equal": [50, 60], "crfm": [55, 66]}, generation=True)
    real, crfm = (row for _, row in read_score_table(path).iterrows())
    assert crfm.frechet_distance == 12.345 and crfm.kernel_distance_sd == 0.0021 and crfm.compared_with == "reference"
    assert (crfm.judge_mIoU, crfm.judge_mIoU_sd, crfm.critic_mIoU) == (34.0, 0.5, 54.0)
    assert "unet_tiny on reference" in crfm.features and real.features == "" and np.isnan(real.frechet_distance)
    shown = text.read_text()
    assert "Fréchet" in shown and "FID" not in shown and "unet_tiny on reference" in shown and "0.0123 ± 0.0021" in shown


WHY = "no weights: " + "the server is away, " * 9 + "try again"


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        ({"kind": "inception", "features": "last pooling of InceptionV3"}, ["FID", "KID", "12.35", "0.0123 ± 0.0021"], "Fréchet"),
        ({"fid": None, "kid": None, "kid_sd": None, "missing": WHY}, ["no distance: no weights", "try again"], "12.35"),
        ({"kid_sd": None}, ["12.35             0.0123  "], "0.0021"),
    ],
)
def test_what_the_distances_are_and_why_there_are_none_is_told(tmp_path, changes, words, absent):
    miou = {"real-equal": [50, 60], "crfm": [55, 66]}
    path, text = table_of(tmp_path, miou, generation=True)
    table = Table(title="t", recipes=list(miou), segmentors=["m"], baseline="real-equal", generation=True)
    samples = write_samples(tmp_path, "d", "crfm", **changes)
    make(tmp_path, table, tmp_path.glob("d/segmentors/*/m/*/scores.json"), tmp_path.glob("d/mixes/*"), samples, seeds=[0, 1])
    shown = text.read_text()
    assert all(word in shown for word in words) and absent not in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert read_score_table(path).generation_missing.tolist() == ["", changes.get("missing", "")]


# -------------------------------------------------------------------------------------------------------------- bad input


def test_a_missing_score_is_named(tmp_path):
    path, text = table_of(tmp_path, {"real": [50, 60]}, baseline=None)
    scores = sorted(tmp_path.glob("d/segmentors/*/m/seed*/scores.json"))
    for out in (path, text, scores[1]):
        out.unlink()
    table = Table(title="t", recipes=["real"], segmentors=["m"])
    with pytest.raises(DataError, match=r"real/m/seed1/scores\.json: no such file"):
        make(tmp_path, table, scores, tmp_path.glob("d/mixes/*"), seeds=[0, 1])
    with pytest.raises(DataError, match=r"real/m/seed1/scores\.json: not among the files given"):
        make(tmp_path, table, scores[:1], tmp_path.glob("d/mixes/*"), seeds=[0, 1])
    assert not path.exists() and not text.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mIoU": "gone"}, "mIoU: Field required"),
        ({"mAcc": "high"}, "mAcc: Input should be a valid number"),
        ({"IoU": [50.0]}, "all of it: Value error, IoU has 1 entries for 2 classes"),
        ({"tiles": "gone"}, "tiles: Field required"),
    ],
)
def test_incomplete_scores_are_named(tmp_path, changes, words):
    table_of(tmp_path, {"real": [50]}, baseline=None)
    (scores,) = tmp_path.glob("d/segmentors/*/m/seed*/scores.json")
    changed(scores, **changes)
    with pytest.raises(DataError, match=rf"real/m/seed0/scores\.json: {words}"):
        make(tmp_path, Table(title="t", recipes=["real"], segmentors=["m"]), [scores], tmp_path.glob("d/mixes/*"))


def test_scores_of_other_classes_are_named(tmp_path):
    table_of(tmp_path, {"real": [50, 51]}, baseline=None)
    scores = sorted(tmp_path.glob("d/segmentors/*/m/seed*/scores.json"))
    changed(scores[1], classes=["a", "c"])
    with pytest.raises(DataError, match=r"seed1/scores\.json: is of other classes than .*seed0/scores\.json"):
        make(tmp_path, Table(title="t", recipes=["real"], segmentors=["m"]), scores, tmp_path.glob("d/mixes/*"), seeds=[0, 1])


def test_incomplete_measurements_of_samples_are_named(tmp_path):
    miou = {"real-equal": [50], "crfm": [55]}
    table_of(tmp_path, miou, generation=True)
    table = Table(title="t", recipes=list(miou), segmentors=["m"], baseline="real-equal", generation=True)
    samples = write_samples(tmp_path, "d", "crfm")
    scores, mixes = list(tmp_path.glob("d/segmentors/*/m/*/scores.json")), list(tmp_path.glob("d/mixes/*"))
    with pytest.raises(DataError, match=r"generation/triattention/crfm\.json: not among the files given"):
        make(tmp_path, table, scores, mixes, samples[1:])
    changed(samples[0], diversity="gone")
    with pytest.raises(DataError, match=r"generation/triattention/crfm\.json: diversity: Field required"):
        make(tmp_path, table, scores, mixes, samples)


def test_a_mix_without_weights_is_named(tmp_path):
    table_of(tmp_path, {"real": [50]}, baseline=None)
    path = tmp_path / "d" / "mixes" / "real.parquet"
    pd.read_parquet(path).drop(columns="weight").to_parquet(path)
    with pytest.raises(DataError, match=r"mixes/real\.parquet: columns missing: weight; delete it"):
        make(tmp_path, Table(title="t", recipes=["real"], segmentors=["m"]), tmp_path.glob("d/segmentors/*/m/*/scores.json"), [path])


def test_a_damaged_table_is_named(tmp_path):
    path, _ = table_of(tmp_path, {"real": [50]}, baseline=None)
    read_score_table(path).drop(columns=["real_tiles"]).to_csv(path, index=False)
    with pytest.raises(DataError, match=r"main\.csv: columns missing: real_tiles; delete it and build it again"):
        read_score_table(path)
    path.write_text('a,b\n"1')
    with pytest.raises(DataError, match=r"main\.csv: (not a table|columns missing)"):
        read_score_table(path)


# --------------------------------------------------------------------------------------------------------------- the text


def test_the_text_table_fits_a_terminal(tmp_path):
    names = ["real-equal", "crfm-ascending", "agreement-pixel"]
    _, text = table_of(tmp_path, dict(zip(names, [[100, 68.5, 12.3], [1, 99, 70], [3, 2, 1]], strict=True)), generation=True)
    lines = text.read_text().splitlines()
    assert max(map(len, lines)) <= 100 and any(line.startswith("agreement-pixel") for line in lines)


def test_scores_of_a_confusion_matrix_are_what_the_table_reads(tmp_path):
    found = ConfusionMatrix(2).update(np.array([0, 1, 1]), np.array([0, 1, 0])).scores()
    path = tmp_path / "d" / "segmentors" / "real" / "m" / "seed0" / "scores.json"
    write_json(path, found | {"classes": ["a", "b"], "tiles": 1})
    frame = make(tmp_path, Table(title="t", recipes=["real"], segmentors=["m"]), [path], [write_mix(tmp_path, "d", "real")])
    assert frame.mIoU[0] == found["mIoU"] == 50 and frame["IoU:a"][0] == 50 and frame.mF1[0] == found["mF1"]
