"""Tiles put back together are the scene, bit by bit, whatever its depth and the rule at its edge; GDAL agrees on their place."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine

from crfm_core import DataError
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.data.tiling import mosaic, tile_scene
from crfm_core.manifest import write_manifest

CRS = "EPSG:32631"
#: A turned grid, so that rows and columns both matter.
TRANSFORM = Affine(0.43, 0.25, 400_000, 0.25, -0.43, 5_000_000)


def write(path, bands, placed, **profile):
    """A raster of bands [n,H,W] of any depth."""
    place = {"crs": CRS, "transform": TRANSFORM} if placed else {}
    driver = "PNG" if path.suffix == ".png" else "GTiff"
    size = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    with rasterio.open(path, "w", driver=driver, **size, **place, **profile) as target:
        target.write(bands)
    return path


def pixels(rng, dtype, count, height, width):
    if dtype == "float32":
        return rng.normal(0, 3, (count, height, width)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (count, height, width), dtype, endpoint=True)


def as_bytes(bands, limits):
    """What tiling makes of a whole scene: uint8 [H,W,3]."""
    if limits is not None:
        low, high = (np.array(limit)[:, None, None] for limit in limits)
        bands = np.round(255 * np.clip((bands.astype(np.float64) - low) / (high - low), 0, 1)).astype(np.uint8)
    return np.moveaxis(bands if len(bands) == 3 else np.repeat(bands, 3, 0), 0, -1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_mosaic_of_the_tiles_is_the_scene_for_every_depth_edge_rule_and_stride(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("scene")
    size = data.draw(st.integers(5, 16), "size")
    edge = data.draw(st.sampled_from(["shift", "pad", "drop"]), "edge")
    height, width = (data.draw(st.integers(size if edge == "shift" else 1, 40), side) for side in ("height", "width"))
    stride = data.draw(st.integers(1 if max(height, width) < 24 else 4, size), "stride")
    dtype = data.draw(st.sampled_from(["uint8", "uint16", "int16", "float32"]), "dtype")
    label_dtype = data.draw(st.sampled_from(["uint8", "uint16", "int32", "float32"]), "label_dtype")
    bands, placed = data.draw(st.sampled_from([1, 3]), "bands"), data.draw(st.booleans(), "placed")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    picture, ids = pixels(rng, dtype, bands, height, width), rng.integers(0, 4, (1, height, width)).astype(label_dtype)
    limits = None if dtype == "uint8" else tuple(np.quantile(picture.astype(float), q, axis=(1, 2)).tolist() for q in (0.02, 0.98))
    if limits and any(low >= high for low, high in zip(*limits, strict=True)):
        limits = ([-1.0] * bands, [1.0] * bands)
    image, label = write(folder / "a.tif", picture, placed), write(folder / "b.tif", ids, placed)

    rows = tile_scene(image, label, folder / "train", size, stride, edge=edge, limits=limits, num_classes=4)
    if not rows:
        assert edge == "drop" and (height < size or width < size)
        return
    write_manifest(folder / "train.parquet", rows)
    scene, mask = as_bytes(picture, limits), ids[0].astype(np.uint8)
    if edge == "drop":  # what no whole tile reaches is not there
        reach = [(length - size) // stride * stride + size for length in (height, width)]
        beyond = np.ones((height, width), bool)
        beyond[: reach[0], : reach[1]] = False
        scene, mask = np.where(beyond[..., None], 0, scene), np.where(beyond, 255, mask)
    for kind, read, expected in (("image", read_rgb, scene), ("label", read_label, mask)):
        out = folder / f"{kind}{'.tif' if placed else '.png'}"
        mosaic(folder / "train.parquet", folder, "a", kind, out)
        assert np.array_equal(read(out), expected)
        if placed:
            with rasterio.open(out) as ours, rasterio.open(image) as theirs:
                assert ours.crs == theirs.crs and ours.transform.almost_equals(theirs.transform, 1e-6)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_scene_of_many_tiles_is_the_same_with_any_number_of_processes(tmp_path, processes):
    rng = np.random.default_rng(0)
    image = write(tmp_path / "a.tif", pixels(rng, "uint8", 3, 200, 230), True)
    label = write(tmp_path / "b.tif", rng.integers(0, 3, (1, 200, 230)).astype(np.uint8), True)
    rows = tile_scene(image, label, tmp_path / "train", 16, num_classes=3, processes=processes)
    alone = tile_scene(image, label, tmp_path / "alone" / "train", 16, num_classes=3)
    assert len(rows) == 13 * 15 and rows == alone


def test_a_mosaic_of_an_unknown_scene_is_refused(tmp_path):
    image = write(tmp_path / "a.tif", np.zeros((3, 8, 8), np.uint8), True)
    label = write(tmp_path / "b.tif", np.zeros((1, 8, 8), np.uint8), True)
    write_manifest(tmp_path / "train.parquet", tile_scene(image, label, tmp_path / "train", 8, num_classes=2))
    with pytest.raises(DataError, match=r"train\.parquet: no tile of scene 'b'; it has a, "):
        mosaic(tmp_path / "train.parquet", tmp_path, "b", "image", tmp_path / "b_again.tif")


# ---------------------------------------------------------------------------------------------------- GDAL as the referee


@pytest.mark.skipif(not shutil.which("gdal_translate"), reason="needs gdal_translate (Debian package gdal-bin)")
@pytest.mark.parametrize("edge", ["shift", "drop"])
@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32631", Affine(0.3, 0, 400_000.15, 0, -0.3, 5_000_000.05)),
        ("EPSG:2953", Affine(0.5, 0, 2_332_263.6711, 0, -0.5, 7_599_627.628)),
        ("EPSG:4326", Affine(1e-5, 0, -66.51, 0, -0.7e-5, 46.53)),
        ("EPSG:32631", TRANSFORM),
    ],
    ids=["utm", "stereographic", "degrees", "turned"],
)
def test_pixels_crs_and_transform_of_each_tile_are_those_of_gdal_translate(tmp_path, crs, transform, edge):
    rng = np.random.default_rng(1)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=3, height=70, width=90, dtype="uint8", crs=crs, transform=transform
    ) as target:
        target.write(rng.integers(0, 256, (3, 70, 90), np.uint8))
    with rasterio.open(
        tmp_path / "b.tif", "w", driver="GTiff", count=1, height=70, width=90, dtype="uint8", crs=crs, transform=transform
    ) as target:
        target.write(rng.integers(0, 3, (1, 70, 90)).astype(np.uint8))
    rows = tile_scene(tmp_path / "a.tif", tmp_path / "b.tif", tmp_path / "train", 32, 24, edge=edge, num_classes=3)
    assert len(rows) >= 6
    for row in rows:
        window = ["-srcwin", str(row["col"]), str(row["row"]), "32", "32"]
        subprocess.run(["gdal_translate", "-q", *window, tmp_path / "a.tif", tmp_path / "referee.tif"], check=True)
        ours, theirs = (
            json.loads(subprocess.run(["gdalinfo", "-json", path], check=True, capture_output=True, text=True).stdout)
            for path in (tmp_path / row["image"], tmp_path / "referee.tif")
        )
        assert ours["geoTransform"] == pytest.approx(theirs["geoTransform"], rel=1e-12, abs=1e-9)
        assert ours["coordinateSystem"]["wkt"] == theirs["coordinateSystem"]["wkt"]
        assert np.array_equal(read_rgb(tmp_path / row["image"]), read_rgb(tmp_path / "referee.tif"))
