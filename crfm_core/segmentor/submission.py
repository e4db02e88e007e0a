"""Predictions for a benchmark's own server, which alone knows the labels of its test images."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crfm_core import ConfigError
from crfm_core.data.grid import open_scene
from crfm_core.data.rasters import encode_raster
from crfm_core.data.scaling import scene_limits
from crfm_core.data.sources import SceneSource
from crfm_core.files import atomic_path, hash_of, require_disk, sha256_of, work_folder, write_bytes
from crfm_core.segmentor.critic import Critic, load_critic
from crfm_core.segmentor.prediction import is_whole, label_rows
from crfm_core.settings import Dataset, Evaluation


def zip_predictions(
    checkpoint: Path | str,
    source: SceneSource,
    out: Path | str,
    work: Path | str,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
) -> None:
    """Predict the images that a dataset's server scores, and write ``out``: one zip file of PNGs for it, the same bytes for the same
    predictions.

    Each image is predicted as a whole scene is, see :func:`crfm_core.segmentor.prediction.label_rows`.

    Args:
        source: says which images, and which of the server's classes each class is.
        work: folder that holds predictions while the zip is not there; a stopped run continues from it.

    Raises DataError when images are missing or two have one name, ConfigError for classes that are not the server's, WeightsError
    for a checkpoint of other classes.
    """
    dataset = source.dataset
    evaluation = evaluation or Evaluation()
    images, ids = source.submission_images(), source.submission_ids()
    if dataset.tile.scale and dataset.tile.scale.over == "dataset":
        raise ConfigError(f"tile.scale.over: {dataset.name} scales by its training scenes; set it to scene for images that are not listed")
    require_disk(Path(work).parent, 2 * sum(path.stat().st_size for path in images))
    how = evaluation.result_keys()
    content = [[path.name, path.stat().st_size] for path in images]
    with work_folder(work, hash_of(sha256_of(checkpoint), how, dataset.tile.model_dump(mode="json"), ids.tolist(), content)) as folder:
        missing = [path for path in images if not is_whole(folder / path.name)]
        if missing:
            critic = load_critic(checkpoint, device, dataset.classes)
            for path in tqdm(missing, desc="images", unit="image", disable=None):
                write_bytes(folder / path.name, encode_raster(".png", ids[_labels(critic, path, dataset, evaluation)]))
        with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:  # PNGs do not shrink
            for path in images:
                archive.writestr(_entry(path.name), (folder / path.name).read_bytes())


def _labels(critic: Critic, image: Path, dataset: Dataset, evaluation: Evaluation) -> np.ndarray:
    tiling = dataset.tile
    limits: tuple[Sequence[float], Sequence[float]] | None = None
    if tiling.scale:
        limits = scene_limits([image], [True], tiling.scale, tiling.bands)[0]
    with open_scene(image, image, tiling.ground_distance) as (picture, _):
        return np.concatenate(list(label_rows(critic, picture, tiling, evaluation, limits)))


def _entry(name: str) -> zipfile.ZipInfo:
    """A member that says nothing of when and where it was written."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry
