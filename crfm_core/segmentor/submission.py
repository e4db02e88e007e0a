"""Predictions for a benchmark's own server, which alone knows the labels of its test split: LoveDA's.

LoveDA (Wang et al., arXiv 2110.08733) takes one zip file with a PNG per image of Test/, ``{number}.png``, whose values 0...6 are
background, building, road, water, barren, forest, agriculture: the ids 1...7 of its labels less one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crfm_core import ConfigError, DataError
from crfm_core.data.adapters.loveda import AREAS
from crfm_core.data.grid import open_scene
from crfm_core.data.rasters import IGNORE, encode_raster, read_label
from crfm_core.data.scaling import scene_limits
from crfm_core.files import atomic_path, hash_of, require_disk, sha256_of, work_folder, write_bytes
from crfm_core.segmentor.critic import Critic, load_critic
from crfm_core.segmentor.prediction import label_rows
from crfm_core.settings import Dataset, Evaluation

#: Ids of LoveDA's labels that its server scores; 0 is no data.
SCORED = range(1, 8)
IMAGES = 1796  #: in the official test split


def zip_predictions(
    checkpoint: Path | str,
    root: Path | str,
    dataset: Dataset,
    out: Path | str,
    work: Path | str,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
) -> None:
    """Predict LoveDA's official test images, and write ``out``: one zip file for its server, of the same bytes for the same predictions.

    Each image is looked at as a whole scene is, see :func:`crfm_core.segmentor.prediction.label_rows`.

    Args:
        root: folder that holds ``Test/{Urban,Rural}/images_png/*.png``.
        dataset: of kind loveda; its ``label_map`` says which of the server's classes each class is.
        work: folder that holds what is predicted while the zip is not there; a stopped run continues from it.

    Raises DataError when images are missing or two have one number, ConfigError for classes that are not the server's, WeightsError
    for a checkpoint of other classes.
    """
    evaluation = evaluation or Evaluation()
    images, ids = official_images(Path(root)), server_ids(dataset)
    if dataset.tile.scale and dataset.tile.scale.over == "dataset":
        raise ConfigError(f"tile.scale.over: {dataset.name} scales by its training scenes; set it to scene for images that are not listed")
    print(f"{len(images)} images; the official test split has {IMAGES}", flush=True)
    require_disk(Path(work).parent, 2 * sum(path.stat().st_size for path in images))
    how = evaluation.result_keys()
    content = [[path.name, path.stat().st_size] for path in images]
    with work_folder(work, hash_of(sha256_of(checkpoint), how, dataset.tile.model_dump(mode="json"), ids.tolist(), content)) as folder:
        missing = [path for path in images if not _finished(folder / path.name)]
        if missing:
            critic = load_critic(checkpoint, device, dataset.classes)
            for path in tqdm(missing, desc="images", unit="image", disable=None):
                write_bytes(folder / path.name, encode_raster(".png", ids[_labels(critic, path, dataset, evaluation)]))
        with atomic_path(out) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:  # PNGs do not shrink
            for path in images:
                archive.writestr(_entry(path.name), (folder / path.name).read_bytes())


def official_images(root: Path) -> list[Path]:
    """The images of LoveDA's test split, by number. DataError when an area has none, a name is no number, or a number occurs twice."""
    found: dict[int, Path] = {}
    for area in AREAS:
        folder = root / "Test" / area / "images_png"
        paths = sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))
        if not paths:
            raise DataError(
                f"{folder}: no images (*.png); unpack Test.zip of LoveDA's record (https://zenodo.org/records/5706578) to {root}, "
                "which fetching leaves out as it has no labels"
            )
        for path in paths:
            if not path.stem.isdecimal():
                raise DataError(f"{path}: its name is no number, which LoveDA's server goes by; move it out of the folder")
            first = found.setdefault(int(path.stem), path)
            if first is not path:
                raise DataError(f"{path} and {first} have one number; this copy mixes splits: unpack Test.zip anew into an empty folder")
    return [found[number] for number in sorted(found)]


def server_ids(dataset: Dataset) -> np.ndarray:
    """The server's id of each training id, uint8 [256]; background for ignored pixels, as every pixel must have a class.

    Raises ConfigError unless each of the server's classes is one class of the dataset.
    """
    classes = range(len(dataset.classes))
    mapped = {raw: new for raw, new in (dataset.label_map or {}).items() if new != IGNORE}
    if sorted(mapped) != list(SCORED) or sorted(mapped.values()) != list(classes):
        raise ConfigError(
            f"label_map: LoveDA's server scores the ids 1...7, each a class of its own, and {dataset.name} maps {mapped or 'none'} to "
            f"{len(classes)} classes; predict with a segmentor trained on {{0: 255, 1: 0, 2: 1, ..., 7: 6}}"
        )
    ids = np.zeros(256, np.uint8)
    for raw, new in mapped.items():
        ids[new] = raw - SCORED[0]
    return ids


def _finished(path: Path) -> bool:
    """Whether an earlier try left this prediction whole."""
    try:
        return read_label(path) is not None
    except DataError:
        return False


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
