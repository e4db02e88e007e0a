"""Tiles reproduce their scene, keep its place on the ground, and bad input is refused with a message that helps."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform

from crfm_core import ConfigError, DataError
from crfm_core.data.rasters import read_label, read_rgb, write_raster
from crfm_core.data.scenes import list_scenes
from crfm_core.data.sources.embedded import CLASSES
from crfm_core.data.splits import check_disjoint
from crfm_core.data.tiling import tile_scene, tile_split
from crfm_core.manifest import TILE_COLUMNS, paths_of, read_manifest, write_manifest
from crfm_core.settings import Dataset, Selection

GRID = {"crs": "EPSG:32631", "transform": (0.3, 0, 400_000, 0, -0.3, 5_000_000)}


@pytest.fixture
def scene(tmp_path):
    """A georeferenced scene of 40x50 pixels with ids 0..2: its image and label."""
    rng = np.random.default_rng(0)
    write_raster(tmp_path / "a.tif", rng.integers(0, 256, (40, 50, 3), np.uint8), **GRID)
    write_raster(tmp_path / "a_label.tif", rng.integers(0, 3, (40, 50), np.uint8), **GRID)
    return tmp_path / "a.tif", tmp_path / "a_label.tif"


def ground(transform, col, row):
    a, b, c, d, e, f = transform
    return a * col + b * row + c, d * col + e * row + f


def world(tmp_path, **scenes):
    """A dataset of drawn scenes of 64 pixels and its scene manifest."""
    source = {"kind": "embedded", "scenes": scenes, "size": 64}
    dataset = Dataset(
        name="world", classes=list(CLASSES), palette=[(0, 0, 0)] * 7, source=source, tile={"size": 32}, train="train", test="test"
    )
    list_scenes(dataset, tmp_path, tmp_path / "scenes.parquet")
    return dataset, tmp_path / "scenes.parquet"


@settings(max_examples=8, deadline=None)
@given(st.integers(16, 40), st.integers(16, 40), st.integers(8, 16), st.booleans(), st.booleans())
def test_tiles_reproduce_the_scene_and_its_ground(tmp_path_factory, height, width, size, overlap, placed):
    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(height * width)
    image, label = rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 4, (height, width), np.uint8)
    # a turned grid, so that rows and columns both matter
    transform = (0.43, 0.25, 400_000, 0.25, -0.43, 5_000_000)
    grid = {"crs": "EPSG:32631", "transform": transform} if placed else {}
    suffix = ".tif" if placed else ".png"
    write_raster(folder / f"a{suffix}", image, **grid)
    write_raster(folder / f"b{suffix}", label, **grid)
    rows = tile_scene(folder / f"a{suffix}", folder / f"b{suffix}", folder / "train", size, size // 2 if overlap else None, num_classes=4)
    seen_image, seen_label = np.zeros_like(image), np.full_like(label, 99)
    for row in rows:
        top, left = row["row"], row["col"]
        tile = read_label(folder / row["label"])
        seen_image[top : top + size, left : left + size] = read_rgb(folder / row["image"])
        seen_label[top : top + size, left : left + size] = tile
        assert row["image"].startswith("train/images/") and row["image"].endswith(suffix)
        assert row["pixels"] == np.bincount(tile.ravel(), minlength=4).tolist() and row["classes"] == np.unique(tile).tolist()
        if placed:
            with rasterio.open(folder / row["image"]) as source:
                assert source.crs.to_wkt() == row["crs"]
                assert tuple(source.transform)[:6] == pytest.approx(row["transform"], abs=1e-6)
            assert ground(row["transform"], 3, 5) == pytest.approx(ground(transform, left + 3, top + 5), abs=1e-6)
        else:
            assert row["crs"] == "" and row["transform"] == []
    assert np.array_equal(seen_image, image) and np.array_equal(seen_label, label)


def test_ids_are_remapped_once_and_nodata_is_ignored(tmp_path, scene):
    image, _ = scene
    raw = np.repeat(np.array([[0], [1], [2], [7]], np.uint8), 10, 0).repeat(50, 1)
    with rasterio.open(
        tmp_path / "raw.tif", "w", driver="GTiff", height=40, width=50, count=1, dtype="uint8", nodata=7,
        crs="EPSG:32631", transform=Affine(*GRID["transform"]),
    ) as target:  # fmt: skip
        target.write(raw, 1)
    rows = tile_scene(image, tmp_path / "raw.tif", tmp_path / "tiles", 40, label_map={0: 255, 1: 0, 2: 1}, num_classes=2)
    tile = read_label(tmp_path / rows[0]["label"])
    assert [int(tile[y, 0]) for y in (5, 15, 25, 35)] == [255, 0, 1, 255]
    assert rows[0]["pixels"] == [400, 400] and rows[0]["classes"] == [0, 1]


def test_pixels_without_image_are_ignored_and_empty_tiles_left_out(tmp_path, scene):
    pixels = read_rgb(scene[0]) // 2 + 1
    pixels[:, :45] = 0
    profile = {"driver": "GTiff", "height": 40, "width": 50, "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(tmp_path / "hole.tif", "w", crs="EPSG:32631", transform=Affine(*GRID["transform"]), **profile) as target:
        target.write(np.moveaxis(pixels, -1, 0))
    rows = tile_scene(tmp_path / "hole.tif", scene[1], tmp_path / "tiles", 20, num_classes=3)
    assert {row["col"] for row in rows} == {30}
    assert (read_label(tmp_path / rows[0]["label"])[:, :15] == 255).all()


def _missing(tmp_path, image, label):
    return tmp_path / "none.tif", label


def _truncated(tmp_path, image, label):
    image.write_bytes(image.read_bytes()[:3000])
    return image, label


def _not_an_image(tmp_path, image, label):
    label.write_text("classes")
    return image, label


def _other_size(tmp_path, image, label):
    write_raster(label, np.zeros((40, 49), np.uint8))
    return image, label


def _unknown_id(tmp_path, image, label):
    ids = read_label(label)
    ids[21:23, 30] = 9
    write_raster(label, ids)
    return image, label


def _colour_label(tmp_path, image, label):
    return image, image


def _small(tmp_path, image, label):
    for path in (image, label):
        array = read_label(path) if path == label else read_rgb(path)
        write_raster(path, array[:19])
    return image, label


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "none.tif: no such file"),
        (_truncated, "a.tif: not a readable raster"),
        (_not_an_image, "a_label.tif: not a readable raster"),
        (_other_size, "a_label.tif: 49x40 pixels, but its image .*a.tif has 50x40"),
        (_unknown_id, r"a_label.tif: unknown label id 9 in 2 pixels, first at row 21, column 30; allowed are 0\.\.\.2 and 255.*label_map"),
        (_colour_label, "3 bands, expected one band of class ids"),
        (_small, "a.tif: 50x19 pixels, smaller than a tile of 20; lower tile.size"),
    ],
)
def test_a_bad_scene_is_refused_with_the_file_and_the_fault(tmp_path, scene, damage, message):
    with pytest.raises(DataError, match=message):
        tile_scene(*damage(tmp_path, *scene), tmp_path / "tiles", 20, num_classes=3)


def test_an_id_outside_the_label_map_is_refused(tmp_path, scene):
    with pytest.raises(DataError, match=r"unknown label id 2 in \d+ pixels.*those of label_map \(0, 1\)"):
        tile_scene(*scene, tmp_path / "tiles", 20, label_map={0: 0, 1: 1}, num_classes=3)


def test_a_stride_with_gaps_is_refused(tmp_path, scene):
    with pytest.raises(ConfigError, match="stride"):
        tile_scene(*scene, tmp_path / "tiles", 20, 21)


def test_a_split_becomes_a_manifest_that_is_the_same_twice(tmp_path):
    dataset, scenes = world(tmp_path, train=2, test=1)
    first = tile_split(scenes, dataset, "train", tmp_path / "tiles" / "train.parquet")
    again = tile_split(scenes, dataset, "train", tmp_path / "tiles" / "train.parquet")
    assert list(first.columns)[: len(TILE_COLUMNS)] == list(TILE_COLUMNS) and len(first) == 8 and list(first.digest) == list(again.digest)
    table = read_manifest(tmp_path / "tiles" / "train.parquet")
    assert (tmp_path / "tiles" / table.image[0]).is_file() and table.image[0] == "train/images/train-000_0_0.tif"
    assert all(sum(pixels) == 32 * 32 for pixels in table.pixels)


def test_a_selection_writes_its_tiles_alone_with_their_ids_which_give_the_same_again(tmp_path):
    dataset, scenes = world(tmp_path, train=3, test=1)
    every = tile_split(scenes, dataset, "train", tmp_path / "tiles" / "train.parquet")
    dataset = dataset.model_copy(update={"select": {"train": Selection(tiles=5, seed=1)}})
    some = tile_split(scenes, dataset, "train", tmp_path / "tiles" / "train.parquet")
    assert len(some) == 5 and set(some.digest) < set(every.digest)
    left = {path.name for path in (tmp_path / "tiles" / "train" / "images").iterdir()}
    assert left == {f"{tile_id}.tif" for tile_id in some.tile_id}, "tiles of the earlier run are gone"
    listed = tmp_path / "ids.txt"
    listed.write_text((tmp_path / "tiles" / "train.ids.txt").read_text())
    dataset = dataset.model_copy(update={"select": {"train": Selection(ids=str(listed))}})
    assert tile_split(scenes, dataset, "train", tmp_path / "again" / "train.parquet").equals(some)


@pytest.mark.parametrize("stride", [None, 16])
def test_the_rest_of_a_split_shares_no_pixel_with_the_tiles_that_the_split_keeps(tmp_path, stride):
    dataset, scenes = world(tmp_path, train=3, test=1)
    select = {"train": Selection(tiles=2, seed=1), "rest": Selection(rest_of="train", tiles=4)}
    dataset = dataset.model_copy(update={"select": select, "tile": dataset.tile.model_copy(update={"stride": stride})})
    kept, rest = (tile_split(scenes, dataset, split, tmp_path / "tiles" / f"{split}.parquet") for split in ("train", "rest"))
    assert len(kept) == 2 and len(rest) == 4 and set(rest.split) == {"rest"} and set(rest.scene) <= {f"train-00{n}" for n in range(3)}
    for one in kept.itertuples():
        beside = rest[rest.scene == one.scene]
        assert ((abs(beside.row - one.row) >= 32) | (abs(beside.col - one.col) >= 32)).all()
    check_disjoint([tmp_path / "tiles" / f"{split}.parquet" for split in ("train", "rest")])


def test_an_empty_split_is_refused(tmp_path):
    dataset, scenes = world(tmp_path, train=1, test=1)
    with pytest.raises(DataError, match="no scene in split 'more'"):
        tile_split(scenes, dataset, "more", tmp_path / "tiles" / "more.parquet")


@pytest.fixture
def manifests(tmp_path):
    dataset, scenes = world(tmp_path, train=1, test=1)
    paths = [tmp_path / "tiles" / f"{split}.parquet" for split in ("train", "test")]
    for path in paths:
        tile_split(scenes, dataset, path.stem, path)
    return paths


def _rewrite(path, **changes):
    table = read_manifest(path)
    for column, value in changes.items():
        table.at[0, column] = value
    write_manifest(path, table)


def test_splits_of_the_embedded_world_are_disjoint(manifests):
    check_disjoint(manifests)


def test_ground_in_coordinates_of_a_drawing_is_compared_where_the_drawing_is_the_same(manifests):
    drawing = 'LOCAL_CS["a drawing",UNIT["metre",1]]'
    _rewrite(manifests[1], crs=drawing)
    check_disjoint(manifests)
    here = read_manifest(manifests[1])["transform"][0]
    _rewrite(manifests[0], crs=drawing, transform=here)
    with pytest.raises(DataError, match="overlapping on the ground"):
        check_disjoint(manifests)


def test_splits_in_two_coordinate_systems_are_compared_on_the_ground(manifests):
    a, _, left, _, e, top = read_manifest(manifests[0])["transform"][0]
    (x0, x1), (y0, y1) = transform("EPSG:32631", "EPSG:3857", [left, left + 32 * a], [top, top + 32 * e])
    web = CRS.from_epsg(3857).to_wkt()
    _rewrite(manifests[1], crs=web, transform=[(x1 - x0) / 32, 0.0, x0, 0.0, (y1 - y0) / 32, y0])
    with pytest.raises(DataError, match=r"tile train-000_0_0 and .*tile test-000_0_0 are overlapping on the ground"):
        check_disjoint(manifests)


def test_splits_that_touch_are_disjoint(manifests):
    train = read_manifest(manifests[0]).iloc[0]
    beside = list(train["transform"])
    beside[2] -= 32 * beside[0]
    _rewrite(manifests[1], transform=beside)
    check_disjoint(manifests)


@pytest.mark.parametrize(
    ("columns", "how"),
    [(["tile_id", "scene"], "the same tile"), (["digest"], "identical files"), (["transform"], "overlapping on the ground")],
)
def test_splits_that_share_a_tile_are_refused_with_both_names(manifests, columns, how):
    train = read_manifest(manifests[0]).iloc[0]
    changes = {column: train[column] for column in columns}
    if "transform" in changes:
        changes["transform"] = [*changes["transform"][:5], changes["transform"][5] + 1.0]  # a part of the tile is enough
    _rewrite(manifests[1], **changes)
    name = read_manifest(manifests[1]).tile_id[0]
    with pytest.raises(DataError, match=rf"train.parquet: tile {train.tile_id} and .*test.parquet: tile {name} are {how}"):
        check_disjoint(manifests)


def test_processes_end_with_the_one_that_started_them_however_it_ends(tmp_path):
    rng = np.random.default_rng(0)
    write_raster(tmp_path / "a.tif", rng.integers(0, 256, (2000, 2000, 3), np.uint8), **GRID)
    write_raster(tmp_path / "b.tif", rng.integers(0, 3, (2000, 2000), np.uint8), **GRID)
    program = "from crfm_core.data.tiling import tile_scene; tile_scene('a.tif', 'b.tif', 'tiles', 32, 8, num_classes=3, processes=2)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path) as job:
        me = psutil.Process(job.pid)
        end = time.monotonic() + 300
        while not (tmp_path / "tiles" / "images").is_dir():
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        workers = me.children()
        assert len(workers) == 2
        job.kill()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2 and alive == []


def test_a_manifest_of_100000_tiles_is_written_read_and_compared_in_seconds(tmp_path):
    crs = CRS.from_epsg(32631).to_wkt()
    for split, east in (("train", 400_000.0), ("test", 500_000.0)):
        rows = [
            {
                "tile_id": f"{split}-{i // 1000:03d}_{i % 1000 // 32 * 512}_{i % 32 * 512}", "dataset": "big", "split": split,
                "scene": f"{split}-{i // 1000:03d}", "row": i % 1000 // 32 * 512, "col": i % 32 * 512, "width": 512, "height": 512,
                "image": f"{split}/images/{i}.tif", "label": f"{split}/labels/{i}.tif", "crs": crs,
                "transform": [0.3, 0.0, east + i % 400 * 153.6, 0.0, -0.3, 5e6 + i // 400 * 153.6], "classes": [0, 2, 5],
                "pixels": [9, 0, 5, 0, 0, 7, 0], "digest": f"{split}{i:059d}",
            }
            for i in range(100_000)
        ]  # fmt: skip
        (tmp_path / split / "images").mkdir(parents=True)
        for row in rows:
            (tmp_path / row["image"]).touch()
        begun = time.process_time()
        write_manifest(tmp_path / f"{split}.parquet", rows)
        table = read_manifest(tmp_path / f"{split}.parquet")
        paths = paths_of(tmp_path / f"{split}.parquet", table, "image", tmp_path)
        assert time.process_time() - begun < 5 and len(table) == len(set(paths)) == 100_000
    begun = time.process_time()
    check_disjoint([tmp_path / "train.parquet", tmp_path / "test.parquet"])
    assert time.process_time() - begun < 20  # about 2 s on a free core


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("room", [300, 3000])
def test_a_raster_that_the_disk_does_not_take_whole_is_an_error_and_leaves_nothing(tmp_path, suffix, room):
    program = f"""
import resource, signal, numpy
from crfm_core.data.rasters import write_raster
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))  # as a full disk: what is beyond is not written
image = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), numpy.uint8)
write_raster("image{suffix}", image, tags={{"seed": "1"}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and f"ResourceError: image{suffix}: could not be written whole" in done.stderr
    assert list(tmp_path.iterdir()) == []
