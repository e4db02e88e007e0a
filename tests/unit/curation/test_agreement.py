"""Whether synthetic tiles agree with their masks: scores by copy, and the tiles that agree least."""

from __future__ import annotations

from statistics import mean, stdev

import numpy as np
import pytest
import torch
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError
from crfm_core.curation.agreement import LOWEST, agreement_by_copy, held_out_scores
from crfm_core.data.rasters import read_rgb, write_raster
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.evaluation import agreement
from crfm_core.segmentor.mmseg.networks import build_model


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return Critic(build_model("segformer_tiny", len(CLASSES)), CLASSES)


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


def test_critic_and_judge_are_scored_on_held_out_tiles_with_what_the_end_of_their_training_gained(tmp_path, critic, judge):
    held_out = write_tiles(tmp_path / "held_out.parquet", 5)
    trained, elsewhere = tmp_path / "trained.pth", tmp_path / "elsewhere.pth"
    torch.save({"state_dict": {}, "meta": {"held_out": [[6, 70.0], [8, 70.25]]}}, trained)
    torch.save({"state_dict": {}, "meta": {}}, elsewhere)
    scores = held_out_scores({"critic": critic, "judge": judge}, {"critic": trained, "judge": elsewhere}, held_out, tmp_path, batch_size=2)
    assert scores["critic"]["last_quarter"] == 0.25 and scores["judge"]["last_quarter"] is None
    for who, one in (("critic", critic), ("judge", judge)):
        assert scores[who]["tiles"] == 5
        assert scores[who]["mIoU"] == pytest.approx(agreement(one, held_out, tmp_path)["mIoU"])
