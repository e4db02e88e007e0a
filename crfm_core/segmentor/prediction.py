"""Predictions as rasters in their place on the ground: labels of tiles, of whole scenes, of a server's test images."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import torch
from rasterio.windows import Window
from tqdm import tqdm

from crfm_core import ConfigError, DataError
from crfm_core.data.grid import open_scene
from crfm_core.data.rasters import (
    IGNORE,
    IGNORED,
    STRIP,
    create_raster,
    encode_raster,
    has_holes,
    invalid_of,
    read_label,
    read_rgb,
    read_tags,
    rgb_of,
    scene_limits,
    write_raster,
)
from crfm_core.data.scenes import read_scenes
from crfm_core.data.sources import SceneSource
from crfm_core.data.windows import window_offsets
from crfm_core.files import atomic_path, exclusive, hash_of, inside, remove, require_disk, sha256_of, work_folder, write_bytes
from crfm_core.manifest import paths_of, read_manifest, relocate, write_manifest
from crfm_core.segmentor.critic import Critic, load_critic
from crfm_core.segmentor.evaluation import as_input, batches_of_one_size, class_maps, predict, read_ahead
from crfm_core.segmentor.sliding import Canvas, window_and_stride
from crfm_core.settings import Dataset, Evaluation, Tiling

#: Values per band that become 0 and 255.
Limits = tuple[Sequence[float], Sequence[float]]


def predict_tiles(
    checkpoint: Path | str,
    manifest: Path | str,
    root: Path | str,
    out: Path | str,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
    classes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Predict the labels of a manifest's tiles into the folder beside ``out`` that has its name, and write the manifest ``out`` last.

    A label is a raster of class ids like those of tiling: a GeoTIFF in the tile's place, or a PNG where the tile is one; what a tile
    shows beyond its scene is 255. A stopped run continues: a file is kept if it reads without error and was made by the same weights, in
    the same way and of the same tile (its tags say so); anything else in the folder is removed.

    Returns the manifest: the tiles' rows with the predictions as ``label``, and ``predicted_by``, the start of the checkpoint's hash.
    Labels that the tiles have are not read, and tiles of the split ``unlabelled`` have none.
    Raises DataError for a tile that cannot be read, WeightsError for a checkpoint that cannot, or is for other classes than ``classes``,
    ResourceError when the disk is full.
    """
    evaluation, out = evaluation or Evaluation(), Path(out)
    table, folder = read_manifest(manifest, labelled=False), out.with_suffix("")
    images, weights = paths_of(manifest, table, "image", root), sha256_of(checkpoint)
    made_by = [hash_of(weights, evaluation.result_keys(), digest) for digest in table.digest]
    require_disk(folder, int((table.width * table.height).sum()))
    with exclusive(folder):
        paths = [inside(folder, f"{tile_id}{image.suffix}") for tile_id, image in zip(table.tile_id, images, strict=True)]
        wanted = {path.name for path in paths} | {".lock"}
        for path in folder.iterdir():  # predictions of tiles that are gone, and fragments that a killed run left
            if path.name not in wanted:
                remove(path)
        missing = [row for row, path in enumerate(paths) if not is_whole(path, made_by[row])]
        print(f"{len(table)} tiles, {len(table) - len(missing)} of them predicted already", flush=True)
        if missing:
            critic = load_critic(checkpoint, device, classes)
            batches = read_ahead(batches_of_one_size(((row, read_rgb(images[row])) for row in missing), evaluation.batch_size))
            with tqdm(total=len(missing), desc="tiles", unit="tile", disable=None) as progress:
                for rows, pictures in batches:
                    for row, label in zip(rows, predict(critic, pictures, evaluation.batch_size, evaluation), strict=True):
                        write_prediction(paths[row], label, table.iloc[row], {"made_by": made_by[row], "checkpoint": weights[:12]})
                    progress.update(len(rows))
        entries = [predicted_row(table.iloc[row], images[row], paths[row], manifest, out) for row in range(len(table))]
        return write_manifest(out, [entry | {"predicted_by": weights[:12]} for entry in entries])


def is_whole(path: Path, made_by: str | None = None) -> bool:
    """Whether an earlier try left this prediction readable to its last pixel, and made by what its tag ``made_by`` must say."""
    try:
        return (made_by is None or read_tags(path).get("made_by") == made_by) and read_label(path) is not None
    except DataError:
        return False


def write_prediction(path: Path, label: np.ndarray, row: pd.Series, tags: Mapping[str, str]) -> None:
    """Write the label [H,W] that was predicted for a tile in the tile's place; what the tile shows beyond its scene becomes 255."""
    label[int(row.get("inner_height", len(label))) :] = IGNORE
    label[:, int(row.get("inner_width", label.shape[1])) :] = IGNORE
    tags = {**tags, "prediction_of": row.tile_id} | ({"licence": row.licence} if row.get("licence") else {})
    crs, transform = (row.crs, list(row["transform"])) if row.crs and path.suffix != ".png" else (None, None)
    write_raster(path, label, crs, transform, tags)


def predicted_row(row: pd.Series, image: Path, label: Path, manifest: Path | str, out: Path) -> dict:
    """The row of a tile of ``manifest`` with its predicted label, for the manifest ``out``."""
    pixels = np.bincount(read_label(label).ravel(), minlength=256)[: len(row.pixels)]
    return {
        **row.to_dict(),
        "image": relocate(row.image, manifest, out),
        "label": os.path.relpath(label, out.resolve().parent),
        "classes": np.flatnonzero(pixels).tolist(),
        "pixels": pixels.tolist(),
        "digest": sha256_of(image, label),
    }


def predict_scene(
    checkpoint: Path | str,
    scenes: Path | str,
    scene: str,
    dataset: Dataset,
    out: Path | str,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
) -> None:
    """Predict the labels of a whole scene of the manifest ``scenes`` as :func:`predict_raster` does; the scene's own label is not read.

    Raises DataError for a scene that the manifest does not have, and WeightsError for a checkpoint of other classes.
    """
    table = read_scenes(scenes, needed=["image"]).set_index("scene")
    if scene not in table.index:
        raise DataError(f"{scenes}: no scene {scene!r}; it has {', '.join(table.index[:8])}, ...")
    row = table.loc[scene]
    tags = {"checkpoint": sha256_of(checkpoint)[:12], "prediction_of": scene, "classes": ", ".join(dataset.classes)}
    if dataset.licence:
        tags["licence"] = dataset.licence
    critic = load_critic(checkpoint, device, dataset.classes)
    limits = (row.low, row.high) if dataset.tile.scale else None
    predict_raster(critic, row.image, out, dataset.tile, evaluation, limits, dataset.palette, tags)


def predict_raster(
    critic: Critic,
    image: Path | str,
    out: Path | str,
    tiling: Tiling,
    evaluation: Evaluation | None = None,
    limits: Limits | None = None,
    palette: Sequence[tuple[int, int, int]] = (),
    tags: Mapping[str, str] | None = None,
    strip: int = STRIP,
) -> None:
    """Write the class ids that a critic predicts for an image of any size, as a GeoTIFF in its place (.tif) or a PNG (.png).

    The image is read as tiling reads it (bands, scale, ground distance), in overlapping windows (:func:`label_rows`). A GeoTIFF is written
    row by row, so that a scene may be larger than memory; a PNG is held whole, one byte per pixel.

    Args:
        image: any raster GDAL reads; it needs no label.
        limits: the values per band that become 0 and 255, where ``tiling`` has a scale.
        palette: one colour per class, as the colour table of ``out``; 255, where the image has no data, is transparent.
        tags: text entries of a GeoTIFF.
        strip: rows written at once; they change nothing.

    Raises DataError for an unreadable image, ConfigError for windows that leave gaps, ResourceError when the disk does not take it all.
    """
    out, evaluation = Path(out), evaluation or Evaluation()
    # without a label the image stands in for it: nothing of it is read
    with open_scene(image, image, tiling.ground_distance) as (picture, _):
        options = {} if out.suffix == ".png" else {"nodata": IGNORE}
        with create_raster(out, 1, picture.width, picture.height, picture.crs, picture.transform, **options) as target:
            if palette:
                target.write_colormap(1, {index: (*colour, 255) for index, colour in enumerate(palette)} | {IGNORE: (*IGNORED, 0)})
            target.update_tags(**(tags or {}))
            top = 0
            for labels in in_strips(label_rows(critic, picture, tiling, evaluation, limits), strip):
                target.write(labels[None], window=Window(0, top, picture.width, len(labels)))
                top += len(labels)


@torch.no_grad()
def label_rows(
    critic: Critic, picture: rasterio.DatasetReader, tiling: Tiling, evaluation: Evaluation, limits: Limits | None = None
) -> Iterator[np.ndarray]:
    """The class ids that a critic predicts for an open image, from its top to its bottom: uint8 [rows, W], 255 where it has no data.

    Windows have the evaluation's side, or that of the tiles. Each is predicted by itself, with test-time augmentation where there is any,
    and its maps (:func:`class_maps`) are averaged with those of the windows that overlap it. At any time one row of windows is held:
    memory grows with the width of the image, not with its height. Windows without any data are left out.
    """
    window, stride = window_and_stride(evaluation, tiling.size)
    each = evaluation.model_copy(update={"mode": "whole"})
    height, width = min(window, picture.height), min(window, picture.width)
    tops, lefts = window_offsets(picture.height, height, stride), window_offsets(picture.width, width, stride)
    device = critic.mean.device
    canvas = Canvas((len(critic.classes),), height, picture.width, device)
    with tqdm(total=len(tops) * len(lefts), desc="windows", unit="window", disable=None) as progress:
        for top, following in zip(tops, [*tops[1:], picture.height], strict=True):
            row = Window(0, top, picture.width, height)
            nodata = invalid_of(picture, row, tiling.bands) if has_holes(picture) else np.zeros((height, picture.width), bool)
            filled = [left for left in lefts if not nodata[:, left : left + width].all()]
            for start in range(0, len(filled), evaluation.batch_size):
                batch = filled[start : start + evaluation.batch_size]
                images = np.stack([rgb_of(picture, Window(left, top, width, height), tiling.bands, limits) for left in batch])
                for left, maps in zip(batch, class_maps(critic, as_input(images, device), each), strict=True):
                    canvas.add(0, left, maps)
            labels = canvas.take(following - top).argmax(dim=0).to(torch.uint8).cpu().numpy()
            labels[nodata[: len(labels)]] = IGNORE
            yield labels
            progress.update(len(lefts))


def in_strips(parts: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Arrays [n, W] that follow each other, as arrays of ``rows`` rows; the last one may have fewer."""
    waiting = None
    for part in parts:
        waiting = part if waiting is None else np.concatenate([waiting, part])
        while len(waiting) >= rows:
            yield waiting[:rows]
            waiting = waiting[rows:]
    if waiting is not None and len(waiting):
        yield waiting


def zip_predictions(
    checkpoint: Path | str,
    source: SceneSource,
    out: Path | str,
    work: Path | str,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
) -> None:
    """Predict the images that a dataset's server scores, each as a whole scene is, and write ``out``: one zip file of PNGs for it.

    The same predictions give the same bytes. ``source`` says which images, and which of the server's classes each class is; a stopped
    run continues from the folder ``work``.

    Raises DataError when images are missing or two have one name, ConfigError for classes that are not the server's, WeightsError
    for a checkpoint of other classes.
    """
    dataset, tiling, evaluation = source.dataset, source.dataset.tile, evaluation or Evaluation()
    images, ids = source.submission_images(), source.submission_ids()
    if tiling.scale and tiling.scale.over == "dataset":
        raise ConfigError(f"tile.scale.over: {dataset.name} scales by its training scenes; set it to scene for images that are not listed")
    require_disk(Path(work).parent, 2 * sum(path.stat().st_size for path in images))
    content = [[path.name, path.stat().st_size] for path in images]
    how = evaluation.result_keys(), tiling.model_dump(mode="json"), ids.tolist(), content
    with work_folder(work, hash_of(sha256_of(checkpoint), *how)) as folder:
        missing = [path for path in images if not is_whole(folder / path.name)]
        if missing:
            critic = load_critic(checkpoint, device, dataset.classes)
            for path in tqdm(missing, desc="images", unit="image", disable=None):
                limits = scene_limits([path], [True], tiling.scale, tiling.bands)[0] if tiling.scale else None
                with open_scene(path, path, tiling.ground_distance) as (picture, _):
                    labels = np.concatenate(list(label_rows(critic, picture, tiling, evaluation, limits)))
                write_bytes(folder / path.name, encode_raster(".png", ids[labels]))
        with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:  # PNGs do not shrink
            for path in images:
                entry = zipfile.ZipInfo(path.name)  # says nothing of when it was written
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                archive.writestr(entry, (folder / path.name).read_bytes())
