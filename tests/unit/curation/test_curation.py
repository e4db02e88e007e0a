"""Filtering synthetic labels, mixing real with synthetic tiles, and whether those agree with their masks."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from raw_datasets import describe
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError
from crfm_core.curation.agreement import LOWEST, agreement_by_copy
from crfm_core.curation.class_losses import class_losses
from crfm_core.curation.filters import filter_manifest, filter_pixels
from crfm_core.curation.mixing import mix
from crfm_core.data.rasters import read_label, read_rgb, write_raster
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.dataset import WeightedDraws
from crfm_core.segmentor.evaluation import agreement, as_input
from crfm_core.segmentor.mmseg.networks import build_model


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return Critic(build_model("segformer_tiny", len(CLASSES)), CLASSES)


def test_a_pixel_is_dropped_above_the_margin_times_its_class_and_not_at_it():
    loss = np.array([[1.25, 1.2500001, 5.0, 9.0], [2.4, 2.6, 9.0, 0.0]])
    labels = np.array([[0, 0, 255, 2], [1, 1, 3, 0]], dtype=np.uint8)
    expected = np.array([[0, 255, 255, 2], [1, 255, 3, 0]], dtype=np.uint8)
    means = [1.0, 2.0, None, float("nan")]
    assert (filter_pixels(loss, labels, means, 1.25) == expected).all()
    in_torch = filter_pixels(torch.tensor(loss), torch.tensor(labels), means, 1.25)
    assert in_torch.dtype == torch.uint8
    assert (in_torch.numpy() == expected).all()


def test_class_losses_are_means_over_pooled_pixels_and_absent_classes_have_none(tmp_path, critic, capsys):
    manifest = write_tiles(tmp_path / "real.parquet", 5)
    table = read_manifest(manifest)
    images, labels = paths_of(manifest, table, "image", tmp_path), paths_of(manifest, table, "label", tmp_path)
    result = class_losses(critic, manifest, tmp_path, batch_size=2)
    x, y = as_input(np.stack([read_rgb(p) for p in images])), torch.tensor(np.stack([read_label(p) for p in labels])).long()
    loss = F.cross_entropy(critic(x), y, ignore_index=255, reduction="none")
    assert result["pixels"] == [int((y == c).sum()) for c in range(3)]
    assert result["losses"] == pytest.approx([float(loss[y == c].mean()) for c in range(3)], rel=1e-5)
    four = Critic(build_model("segformer_tiny", 4), [*CLASSES, "snow"])
    assert class_losses(four, manifest, tmp_path)["losses"][3] is None
    assert "no real pixels of snow" in capsys.readouterr().out


def test_filtered_tiles_keep_image_and_georeference_and_say_what_was_kept(tmp_path, critic):
    manifest = write_tiles(tmp_path / "synthetic" / "all.parquet", 3, georeferenced=True)
    out = tmp_path / "filtered" / "margin.parquet"
    means = class_losses(critic, manifest, tmp_path)["losses"]
    before, after = read_manifest(manifest), filter_manifest(manifest, tmp_path, critic, [means[0], 0.0, None], 1.0, out)
    assert paths_of(out, after, "image", tmp_path) == paths_of(manifest, before, "image", tmp_path)
    for row, old, old_label in zip(
        after.to_dict("records"), before.to_dict("records"), paths_of(manifest, before, "label", tmp_path), strict=True
    ):
        path = out.parent / row["label"]
        assert describe(path)["transform"] == list(old["transform"])
        assert describe(path)["crs"]
        label = read_label(path)
        assert row["pixels"] == [int((label == c).sum()) for c in range(3)]
        assert row["pixels"][1] == 0
        assert row["pixels"][2] == old["pixels"][2]
        assert row["classes"] == [c for c in range(3) if row["pixels"][c]]
        assert row["kept"] == sum(row["pixels"]) / sum(old["pixels"])
        assert row["digest"] != old["digest"]
        assert ((label == read_label(old_label)) | (label == 255)).all()
    soil = [sum(table.pixels.map(lambda pixels: pixels[0])) for table in (before, after)]
    assert 0 < soil[1] < soil[0]


def test_agreement_of_each_tile_and_of_all_come_from_the_same_pixels(tmp_path, critic):
    one = write_tiles(tmp_path / "one.parquet", 1)
    scores = agreement(critic, one, tmp_path)
    assert scores["per_tile"] == [scores["mIoU"]]


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(1)
    return Critic(build_model("unet_tiny", len(CLASSES)), CLASSES)


def test_scores_by_copy_and_the_lowest_tiles_come_from_one_look_at_the_images(tmp_path, critic, judge, monkeypatch):
    manifest = write_tiles(tmp_path / "all.parquet", 15, copy=[i % 3 for i in range(15)])
    table = read_manifest(manifest)
    for path in paths_of(manifest, table, "label", tmp_path)[4:6]:
        write_raster(path, np.full((32, 32), 255, np.uint8))  # two tiles without labelled pixels
    seen = []
    monkeypatch.setattr("crfm_core.segmentor.evaluation.read_rgb", lambda path: seen.append(path.name) or read_rgb(path))
    scores = agreement_by_copy({"critic": critic, "judge": judge}, manifest, tmp_path, batch_size=4)
    assert sorted(seen) == sorted(f"{tile}.png" for tile in table.tile_id), "each image is read once"
    assert scores["tiles"] == 15
    single = {}
    for who, one in (("critic", critic), ("judge", judge)):
        single[who] = dict(zip(table.tile_id, agreement(one, manifest, tmp_path)["per_tile"], strict=True))
        copies = []
        for copy in range(3):
            part = tmp_path / f"{who}-{copy}.parquet"
            write_manifest(part, table[table["copy"] == copy])
            whole = agreement(one, part, tmp_path)
            copies.append({name: whole[name] for name in ("OA", "mIoU", "mAcc")})
        assert scores[who]["copies"] == [pytest.approx(each) for each in copies]
        for name in ("OA", "mIoU", "mAcc"):
            values = [each[name] for each in copies]
            assert (scores[who][name], scores[who][f"{name}_sd"]) == (pytest.approx(mean(values)), pytest.approx(stdev(values)))
    order = sorted((value, tile) for tile, value in single["judge"].items() if value is not None)
    assert [tile["tile_id"] for tile in scores["lowest"]] == [tile for _, tile in order][:LOWEST] and LOWEST == 12
    assert all(
        {**tile} == {"tile_id": tile["tile_id"], **{who: single[who][tile["tile_id"]] for who in single}} for tile in scores["lowest"]
    )


def test_one_copy_has_no_spread_and_a_label_of_another_dataset_is_named(tmp_path, critic):
    manifest = write_tiles(tmp_path / "all.parquet", 2, copy=[0, 0])
    scores = agreement_by_copy({"critic": critic}, manifest, tmp_path)
    assert scores["critic"]["mIoU_sd"] is None and len(scores["lowest"]) == 2
    write_raster(paths_of(manifest, read_manifest(manifest), "label", tmp_path)[1], np.full((32, 32), 7, np.uint8))
    with pytest.raises(DataError, match=r"all\.parquet: row t1: label ids span 7\.\.\.7"):
        agreement_by_copy({"critic": critic}, manifest, tmp_path)


def test_a_mix_has_the_counts_and_weights_asked_for(tmp_path):
    real = write_tiles(tmp_path / "tiles" / "train.parquet", 4, prefix="r")
    copies = [2, 1, 0] * 6
    synthetic = write_tiles(tmp_path / "synthetic" / "all.parquet", 18, prefix="s", copy=copies)
    table = mix(real, synthetic, tmp_path / "mixes" / "m.parquet", synthetic_per_real=3, real_weight=4, seed=1)
    assert table.source.tolist() == ["real"] * 4 + ["synthetic"] * 12
    assert table.weight.tolist() == [4.0] * 4 + [1.0] * 12
    assert sorted(table["copy"].dropna()) == [0] * 6 + [1] * 6
    for column in ("image", "label"):
        assert all(path.is_file() for path in paths_of(tmp_path / "mixes" / "m.parquet", table, column, tmp_path))


def test_a_mix_depends_on_its_seed_only_and_a_smaller_one_is_part_of_a_larger(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic.parquet", 12, prefix="s")
    again, same, larger, other = (
        mix(real, synthetic, tmp_path / f"{name}.parquet", share, seed=seed).tile_id.tolist()
        for name, share, seed in (("again", 2, 0), ("same", 2, 0), ("larger", 3, 0), ("other", 2, 1))
    )
    assert again == same
    assert larger[:9] == same
    assert other != same


def test_a_mix_of_real_tiles_alone_needs_nothing_synthetic(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3)
    assert len(mix(real, None, tmp_path / "mix.parquet")) == 3


def test_too_few_synthetic_tiles_are_an_error_that_names_the_counts(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic.parquet", 5, prefix="s")
    with pytest.raises(DataError, match=r"5 synthetic tiles, and 2 for each of 3 real ones are 6; make more copies"):
        mix(real, synthetic, tmp_path / "mix.parquet", synthetic_per_real=2)
    with pytest.raises(DataError, match="needs 3 synthetic tiles, and no synthetic manifest is given; give one"):
        mix(real, None, tmp_path / "mix.parquet", synthetic_per_real=1)


def test_what_a_filter_of_images_has_left_is_mixed_in_up_to_what_is_asked_for(tmp_path, capsys):
    real = write_tiles(tmp_path / "real.parquet", 4, prefix="r")
    few = write_tiles(tmp_path / "few.parquet", 5, prefix="s")
    table = mix(real, few, tmp_path / "mix.parquet", synthetic_per_real=2, real_weight=2, exactly=False, classes=CLASSES)
    assert Counter(table.source) == {"real": 4, "synthetic": 5}
    said = capsys.readouterr().out
    assert "4 real tiles, 5 of 8 wanted synthetic tiles" in said
    assert "a real tile is drawn 2 times as often as a synthetic one: 61.5 % of all draws are real" in said
    counts = [str(sum(pixels[c] for pixels in read_manifest(few).pixels)) for c in range(3)]
    assert [line.split()[:4] for line in said.splitlines()[-3:]] == [[n, c, c, "0.0"] for n, c in zip(CLASSES, counts, strict=True)]
    many = write_tiles(tmp_path / "many.parquet", 12, prefix="s")
    assert Counter(mix(real, many, tmp_path / "mix.parquet", 2, exactly=False).source) == {"real": 4, "synthetic": 8}


def test_what_a_resampling_favoured_stays_favoured_when_not_all_is_wanted(tmp_path):
    """Of a mask with six versions and thirty with one, taking first copies first would leave the six out."""
    real = write_tiles(tmp_path / "real.parquet", 18, prefix="r", size=8)
    synthetic = write_tiles(tmp_path / "s.parquet", 36, prefix="s", size=8, copy=[0] * 30 + list(range(1, 7)))
    in_turn = mix(real, synthetic, tmp_path / "mix.parquet", 1)
    drawn = mix(real, synthetic, tmp_path / "mix.parquet", 1, exactly=False)
    assert (in_turn["copy"].dropna() == 0).all() and (drawn["copy"].dropna() > 0).sum() >= 2
    assert drawn.tile_id.tolist() == mix(real, synthetic, tmp_path / "mix.parquet", 1, exactly=False).tile_id.tolist()


def test_a_mix_without_any_synthetic_tile_left_is_an_error_with_the_remedy(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "s.parquet", 3, prefix="s")
    table = read_manifest(synthetic)
    write_manifest(synthetic, table.assign(pixels=[[0, 0, 0]] * 3))
    with pytest.raises(DataError, match=r"rare\.parquet: none of the 3 synthetic tiles of \S*s\.parquet has a labelled pixel left; keep"):
        mix(real, synthetic, tmp_path / "rare.parquet", 1, exactly=False)
    table.iloc[:0].to_parquet(synthetic)
    with pytest.raises(DataError, match=r"rare\.parquet: no synthetic tile is left in \S*s\.parquet; keep more by the recipe's filter"):
        mix(real, synthetic, tmp_path / "rare.parquet", 1, exactly=False)
    assert not (tmp_path / "rare.parquet").exists()


def test_columns_of_synthetic_tiles_alone_are_empty_for_real_ones_and_unharmed(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 2, prefix="r", licence=["CC BY"] * 2)
    seeds = [2**62 + 1, 2**53 + 1]  # no float holds them
    own = {"copy": [0, 1], "kept": [0.5, 1.0], "agreement": [3.5, float("nan")], "caption": ["a", "b"], "note": ["", "x"]}
    synthetic = write_tiles(tmp_path / "s.parquet", 2, prefix="s", licence=["CC BY"] * 2, shown=[[1, 2], []], **own)
    write_manifest(synthetic, read_manifest(synthetic).assign(seed=seeds))
    mix(real, synthetic, tmp_path / "mixes" / "m.parquet", 1, real_weight=3, seed=4)
    table = read_manifest(tmp_path / "mixes" / "m.parquet").sort_values("tile_id")
    assert table.tile_id.tolist() == ["r0", "r1", "s0", "s1"] and table.licence.tolist() == ["CC BY"] * 4
    assert table.seed.dropna().tolist() == seeds and table["copy"].dropna().tolist() == [0, 1]
    assert table[[*own, "seed", "shown"]].iloc[:2].isna().all(axis=None)
    assert table.kept.tolist()[2:] == [0.5, 1.0] and table.caption.tolist()[2:] == ["a", "b"] and table.note.tolist()[2:] == ["", "x"]
    assert [list(shown) for shown in table.shown[2:]] == [[1, 2], []]
    assert table.weight.tolist() == [3, 3, 1, 1] and table["transform"].map(len).tolist() == [0] * 4


@pytest.mark.parametrize(("per_real", "weight"), [(3, 4), (1, 11), (3, 3), (2, 1), (5, 2.5)])
def test_a_real_tile_is_drawn_exactly_as_often_as_its_weight_says(tmp_path, per_real, weight):
    real = write_tiles(tmp_path / "real.parquet", 4, prefix="r", size=8)
    synthetic = write_tiles(tmp_path / "s.parquet", 4 * per_real, prefix="s", size=8)
    table = mix(real, synthetic, tmp_path / "mix.parquet", per_real, weight)
    draws = WeightedDraws(table.weight.to_numpy(), seed=0)
    rounds = 4  # so that a weight of 2.5 comes out even, too
    drawn = Counter(draw.row for draw in islice(draws, rounds * len(draws)))
    assert len(draws) == table.weight.sum()
    synthetic_draws = [drawn[row] for row in table.index[table.source == "synthetic"]]
    real_draws = [drawn[row] for row in table.index[table.source == "real"]]
    assert synthetic_draws == [rounds] * 4 * per_real
    assert sum(real_draws) == weight * 4 * rounds
    if weight == int(weight):
        assert real_draws == [weight * rounds] * 4
    else:
        assert all(weight * rounds - rounds / 2 <= count <= weight * rounds + rounds / 2 for count in real_draws)


def test_a_mix_of_other_classes_is_refused(tmp_path):
    real, synthetic = write_tiles(tmp_path / "r.parquet", 1, prefix="r"), write_tiles(tmp_path / "s.parquet", 1, prefix="s")
    with pytest.raises(DataError, match="row s0: pixels of another number of classes than 2"):
        mix(real, synthetic, tmp_path / "mix.parquet", 1, classes=CLASSES[:2])
    assert isinstance(mix(real, synthetic, tmp_path / "mix.parquet", 1), pd.DataFrame)
