"""The critic's labels of unlabelled tiles: thresholds by hand, counts, what a batch or a kill may not change, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hand_made_tiles import write_by_hand
from raw_datasets import describe
from segmentor_tiles import CLASSES, write_tiles
from segmentors import network_of, write_checkpoint

from crfm_core import DataError, WeightsError
from crfm_core.curation import pseudo_labels
from crfm_core.curation.pseudo_labels import confidence_of, label_tiles, levels_of, surest, thresholds_of
from crfm_core.data.rasters import read_label, read_rgb, read_tags, write_raster
from crfm_core.data.tiling import tile_scene
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.segmentor.critic import as_critic, load_critic
from crfm_core.segmentor.evaluation import as_input, class_maps, predict
from crfm_core.settings import Evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("critic") / "checkpoint.pth", network_of(0).state_dict())


def unlabelled(manifest: Path) -> Path:
    """Take the labels of a manifest's tiles away."""
    table = read_manifest(manifest)
    for path in paths_of(manifest, table, "label", manifest.parent):
        path.unlink()
    blank = [[] for _ in table.index], [[0] * len(CLASSES) for _ in table.index]
    write_manifest(manifest, table.assign(split="unlabelled", label="", classes=blank[0], pixels=blank[1]))
    return manifest


def run(checkpoint: Path, manifest: Path, out: Path, keep: float = 0.8, **how):
    evaluation = Evaluation(**how)
    return label_tiles(checkpoint, manifest, out.parent, out, out.with_name("unfinished"), keep, CLASSES, evaluation)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.name != ".lock"}


# ------------------------------------------------------------------------------------------------------------- thresholds


def test_the_threshold_of_a_class_keeps_the_surest_share_of_its_own_pixels():
    histogram = np.array([
        [0, 1, 2, 3, 4],  # 10 pixels; of the surest 8: 4 + 3 + 1 of the two at step 2
        [5, 0, 0, 0, 0],  # the critic is never sure of this class, and yet keeps some
        [0, 0, 0, 0, 0],  # predicted nowhere
        [1, 0, 0, 0, 4],  # 4 of 5 are just 80 %
    ])  # fmt: skip
    assert thresholds_of(histogram, 0.8).tolist() == [2, 0, 5, 4]
    assert thresholds_of(histogram, 0.4).tolist() == [4, 0, 5, 4]
    assert thresholds_of(histogram, 0.41).tolist() == [3, 0, 5, 4]
    assert thresholds_of(histogram, 1.0).tolist() == [1, 0, 5, 0]


def test_a_share_is_counted_exactly():
    """As floats, 0.07 · 100 is more than 7."""
    histogram = np.ones((1, 100), int)
    assert thresholds_of(histogram, 0.07).tolist() == [93]


def test_pixels_below_the_threshold_of_their_class_are_ignored():
    predicted = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    confidence = np.array([[500, 499, 20], [19, 65535, 65535]], np.uint16)
    thresholds = np.array([500, 20, 65536])
    assert surest((predicted, confidence), thresholds).tolist() == [[0, 255, 1], [255, 255, 255]]


def test_confidences_are_told_apart_where_a_critic_is_almost_certain():
    doubt = np.array([0.7, 0.5, 1e-3, 1e-9, 1.01e-9, 0.0], np.float32)
    levels = levels_of(doubt)
    assert (np.argsort(levels) == [0, 1, 2, 4, 3, 5]).all() and levels[-1] == 65535
    assert confidence_of(levels) == pytest.approx(1 - doubt.astype(float), abs=3e-4)


class SureAsRed(torch.nn.Module):
    """A network that finds the class that green names, with the probability that red names in hundredths."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        sure, label = images[:, 0] * 255 / 100, (images[:, 1] * 255).round().long()
        others = ((1 - sure) / 2)[:, None].expand(-1, 3, -1, -1).clone()
        return others.scatter_(1, label[:, None], sure[:, None]).log()


def test_labels_of_two_tiles_by_hand(tmp_path, monkeypatch, capsys):
    """Soil has the confidences 90, 80, 70, 60 and 50 %, of which the surest three are kept; water 55, 45 and 45 %, of which the last two
    are as sure as each other; wood is nowhere."""
    monkeypatch.setattr(pseudo_labels, "load_critic", lambda *_: as_critic(SureAsRed(), CLASSES))
    (tmp_path / "critic.pth").write_bytes(b"weights")
    pictures = [([90, 55, 60, 50], [0, 1, 0, 0]), ([80, 70, 45, 45], [0, 0, 1, 1])]
    images = [np.stack([np.array(one).reshape(2, 2) for one in (*picture, [0] * 4)], axis=-1) for picture in pictures]
    blank = np.zeros((2, 2), np.uint8)
    manifest = unlabelled(write_by_hand(tmp_path / "unlabelled.parquet", images, [blank, blank]))
    out = tmp_path / "pseudo_labels.parquet"
    table = run(tmp_path / "critic.pth", manifest, out, keep=0.6)
    labels = [read_label(path).tolist() for path in paths_of(out, table, "label", tmp_path)]
    assert labels == [[[0, 1], [255, 255]], [[0, 0], [1, 1]]]
    assert [list(row) for row in table.pixels] == [[1, 1, 0], [2, 2, 0]] and [list(row) for row in table.classes] == [[0, 1], [0, 1]]
    said = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[0] in CLASSES]
    assert said == [["soil", "5", "0.7000", "3"], ["water", "3", "0.4500", "3"], ["wood", "0", "–", "0"]]


# ------------------------------------------------------------------------------------------------------------------ tiles


def test_all_pixels_keep_the_most_likely_class_where_all_are_to_be_kept(tmp_path, checkpoint):
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 3)), tmp_path / "pseudo_labels.parquet"
    table = run(checkpoint, manifest, out, keep=1.0)
    images = np.stack([read_rgb(path) for path in paths_of(out, table, "image", tmp_path)])
    labels = np.stack([read_label(path) for path in paths_of(out, table, "label", tmp_path)])
    assert np.array_equal(labels, predict(load_critic(checkpoint), images))


@pytest.mark.parametrize("flip", [False, True])
def test_the_share_of_every_class_that_is_kept_is_the_surest_one(tmp_path, checkpoint, flip):
    """With and without test-time augmentation, whose maps are probabilities already."""
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 4)), tmp_path / "pseudo_labels.parquet"
    table = run(checkpoint, manifest, out, keep=0.7, flip=flip)
    images = np.stack([read_rgb(path) for path in paths_of(out, table, "image", tmp_path)])
    labels = np.stack([read_label(path) for path in paths_of(out, table, "label", tmp_path)])
    maps = class_maps(load_critic(checkpoint), as_input(images), Evaluation(flip=flip))
    sure, classes = ((maps if flip else maps.softmax(1)).max(1).values.numpy(), maps.argmax(1).numpy())
    shown = np.unique(classes)
    assert len(shown) > 1
    for index in shown:
        kept, left = (sure[(classes == index) & chosen] for chosen in (labels == index, labels == 255))
        assert kept.min() >= left.max() - 2e-5 and len(kept) / (len(kept) + len(left)) == pytest.approx(0.7, abs=0.01)
    assert ((labels == classes) | (labels == 255)).all()


def test_labels_lie_where_the_tiles_lie_and_the_manifest_counts_them(tmp_path, checkpoint):
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 5, georeferenced=True)), tmp_path / "pseudo_labels.parquet"
    before, returned = read_manifest(manifest, labelled=False), run(checkpoint, manifest, out)
    after = read_manifest(out)
    assert after.tile_id.tolist() == before.tile_id.tolist() == returned.tile_id.tolist()
    assert set(before) | {"source", "labelled_by"} == set(after) and set(after.source) == {"pseudo"}
    assert (after.labelled_by.str.len() == 12).all() and (after.digest != before.digest).all()
    assert [path.name for path in paths_of(out, after, "image", tmp_path)] == [f"t{index}.tif" for index in range(5)]
    for row, path in zip(after.itertuples(), paths_of(out, after, "label", tmp_path), strict=True):
        label = read_label(path)
        assert path.is_relative_to(tmp_path / "pseudo_labels") and describe(path)["transform"] == list(row.transform)
        assert row.pixels.tolist() == np.bincount(label[label != 255], minlength=3).tolist() and 0 < row.pixels.sum() < label.size
        assert row.classes.tolist() == [index for index in range(3) if (label == index).any()]
        assert read_tags(path)["prediction_of"] == row.tile_id


def test_what_tiles_show_beyond_their_scene_has_no_label_and_counts_for_no_threshold(tmp_path, checkpoint):
    picture = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    write_raster(tmp_path / "a.png", picture)
    write_raster(tmp_path / "b.png", np.zeros((20, 40), np.uint8))
    manifest, out = tmp_path / "unlabelled.parquet", tmp_path / "pseudo_labels.parquet"
    write_manifest(manifest, tile_scene(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "unlabelled", 32, edge="pad", num_classes=3))
    unlabelled(manifest)
    table = run(checkpoint, manifest, out, keep=1.0)
    assert sum(sum(row) for row in table.pixels) == 20 * 40
    for path in paths_of(out, table, "label", tmp_path):
        assert (read_label(path)[20:] == 255).all()


def test_pixels_without_a_picture_have_no_label_and_count_for_no_threshold(tmp_path, checkpoint):
    picture = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    picture[:, :10] = 0
    write_raster(tmp_path / "a.tif", picture)
    with rasterio.open(tmp_path / "a.tif", "r+") as raster:
        raster.nodata = 0
    manifest, out = tmp_path / "unlabelled.parquet", tmp_path / "pseudo_labels.parquet"
    write_manifest(manifest, tile_scene(tmp_path / "a.tif", None, tmp_path / "unlabelled", 32, num_classes=3))
    table = run(checkpoint, manifest, out, keep=1.0)
    (label,) = map(read_label, paths_of(out, table, "label", tmp_path))
    assert (label[:, :10] == 255).all() and (label[:, 10:] != 255).all() and sum(table.pixels[0]) == 32 * 22


def test_labels_do_not_depend_on_how_many_tiles_are_predicted_together(tmp_path, checkpoint):
    manifest = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 5))
    found = []
    for size in (1, 2, 16):
        table = run(checkpoint, manifest, tmp_path / f"batches{size}.parquet", batch_size=size)
        found.append(([list(row) for row in table.pixels], files_in(tmp_path / f"batches{size}")))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 5


@pytest.mark.parametrize(("step", "after"), [("_write", 3), ("_count", 0), ("write_prediction", 2), ("write_manifest", 0)])
def test_a_killed_run_goes_on_and_leaves_what_one_without_a_kill_does(tmp_path, checkpoint, monkeypatch, step, after):
    """In the first pass, between the two, in the second, and before the manifest."""
    manifest = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 6))
    whole = run(checkpoint, manifest, tmp_path / "whole.parquet", batch_size=2)
    out, calls, done = tmp_path / "killed.parquet", [], getattr(pseudo_labels, step)

    def kill(*arguments):
        calls.append(step)
        if len(calls) > after:
            raise KeyboardInterrupt
        return done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, step, kill)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, manifest, out, batch_size=2)
    assert not out.exists() and (tmp_path / "unfinished").is_dir()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "unfinished").rglob("*.npz")}
    if len(written) == 6:  # nothing is predicted again
        monkeypatch.setattr(pseudo_labels, "load_critic", lambda *_: pytest.fail("the critic is loaded"))
    again = run(checkpoint, manifest, out, batch_size=2)
    assert not (tmp_path / "unfinished").exists() and len(written) >= after
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")
    assert [list(row) for row in again.pixels] == [list(row) for row in whole.pixels] and again.digest.tolist() == whole.digest.tolist()


def test_a_damaged_guess_is_made_again(tmp_path, checkpoint, monkeypatch):
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 3)), tmp_path / "pseudo_labels.parquet"
    whole = run(checkpoint, manifest, tmp_path / "whole.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "_count", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, manifest, out)
    first, second, _ = sorted((tmp_path / "unfinished").rglob("*.npz"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-40])
    assert run(checkpoint, manifest, out).digest.tolist() == whole.digest.tolist()


def test_other_settings_leave_nothing_of_the_labels_before(tmp_path, checkpoint):
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 4)), tmp_path / "pseudo_labels.parquet"
    run(checkpoint, manifest, out, keep=1.0)
    stray = tmp_path / "pseudo_labels" / "zz" / "gone.png"
    stray.parent.mkdir()
    stray.write_bytes(b"a tile that is gone")
    again = run(checkpoint, manifest, out, keep=0.5)
    fresh = run(checkpoint, manifest, tmp_path / "fresh.parquet", keep=0.5)
    assert files_in(tmp_path / "pseudo_labels") == files_in(tmp_path / "fresh") and again.digest.tolist() == fresh.digest.tolist()


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_tiles_without_a_labelled_pixel_are_left_out_and_none_at_all_are_refused(tmp_path, checkpoint):
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 3)), tmp_path / "pseudo_labels.parquet"
    table = read_manifest(manifest, labelled=False)
    write_manifest(manifest, table.assign(inner_height=[32, 0, 32]))
    assert run(checkpoint, manifest, out).tile_id.tolist() == ["t0", "t2"]
    write_manifest(manifest, table.assign(inner_height=0, digest=["a", "b", "c"]))
    out.unlink()
    with pytest.raises(DataError, match=r"pseudo_labels\.parquet: no pixel of the 3 tiles of \S*unlabelled\.parquet has a label; give unl"):
        run(checkpoint, manifest, out)
    assert not out.exists()


def test_a_critic_of_other_classes_is_refused(tmp_path, checkpoint):
    manifest, out = unlabelled(write_tiles(tmp_path / "unlabelled.parquet", 1)), tmp_path / "pseudo_labels.parquet"
    with pytest.raises(WeightsError, match="classes"):
        label_tiles(checkpoint, manifest, tmp_path, out, tmp_path / "unfinished", 0.8, ["a", "b"])


def test_labels_are_written_below_the_datasets_folder_alone(tmp_path, checkpoint):
    manifest = unlabelled(write_tiles(tmp_path / "d" / "unlabelled.parquet", 1))
    with pytest.raises(DataError, match="leads outside"):
        label_tiles(checkpoint, manifest, tmp_path / "d", tmp_path / "out.parquet", tmp_path / "unfinished", 0.8, CLASSES)
    table = read_manifest(manifest, labelled=False)
    write_manifest(manifest, table.assign(tile_id="../../../../t"))
    with pytest.raises(DataError, match="leads outside"):
        run(checkpoint, manifest, tmp_path / "d" / "out.parquet")
