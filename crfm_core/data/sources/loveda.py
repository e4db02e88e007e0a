"""LoveDA: its layout, its download from Zenodo, and the test images that its server scores."""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path

import numpy as np

from crfm_core import ConfigError, DataError
from crfm_core.data.archives import extract
from crfm_core.data.rasters import IGNORE
from crfm_core.data.sources import ExpectedScenes, FoundScene, SceneSource
from crfm_core.data.sources.folder import holds_images, pair_files
from crfm_core.data.transfers import fetch
from crfm_core.files import remove, write_json
from crfm_core.hub import FETCH_RECORD, read_record
from crfm_core.settings import FolderSplit

ZENODO_RECORD = "records/5706578"
#: Bytes and MD5 of the archives of that record as Zenodo lists them, by the folder that each becomes.
ARCHIVES = {
    "Train": (4_021_669_263, "de2b196043ed9b4af1690b3f9a7d558f"),
    "Val": (2_425_958_254, "84cae2577468ff0b5386758bb386d31d"),
    "Test": (3_126_023_212, "a489be0090465e01fb067795d24e6b47"),
}
AREAS = ("Urban", "Rural")
SCENE_SIDE = 1024  #: of a scene in pixels
SCENES = {"train": 2522, "val": 1669}
TEST_IMAGES = 1796
SERVER_IDS = range(1, 8)  #: of the labels; 0 is no data


class LoveDA(SceneSource):
    """LoveDA: land cover of urban and rural China.

    Features: 5,987 RGB scenes of 1024x1024 pixels at 0.3 m, urban and rural, of three cities.
    Format: PNG; ``{Train,Val}/{Urban,Rural}/{images_png,masks_png}/N.png`` and ``Test/{Urban,Rural}/images_png/N.png``.
    Classes: 0 no data, then background, building, road, water, barren, forest, agriculture.
    Splits: 2,522 scenes to train on, 1,669 to validate, and 1,796 to test on, whose labels only the server of its authors has.
    Licence: CC BY-NC-SA 4.0, academic use.
    Citation: Wang et al., "LoveDA: A Remote Sensing Land-Cover Dataset for Domain Adaptive Semantic Segmentation", NeurIPS 2021 Datasets
    and Benchmarks, arXiv 2110.08733; data at https://zenodo.org/records/5706578.

    ``CRFM_ZENODO`` replaces https://zenodo.org by a mirror. The server takes one zip file with a PNG per test image, ``N.png``, whose
    values 0...6 are the ids 1...7 of the labels less one.
    """

    parts: tuple[str, ...] = ("Train", "Val")  # folders that must be there

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """The labelled scenes, as splits train and val. DataError when an area is missing or a number is in both splits."""
        scenes = []
        for split, part in zip(SCENES, self.parts, strict=True):
            for area in AREAS:
                files = FolderSplit(images=f"{part}/{area}/images_png/*.png", labels=f"{part}/{area}/masks_png/*.png")
                scenes += [
                    FoundScene((area, *one.key), one.image, one.label, one.relative, split, area)
                    for one in pair_files(self.dataset.name, self.folder, split, files)
                ]
        repeated = [number for number, count in Counter(scene.image.stem for scene in scenes).items() if count > 1]
        if repeated:
            raise DataError(
                f"{self.folder}: {len(repeated)} scene numbers occur twice, such as {repeated[0]}.png; LoveDA numbers each scene once, "
                "so this copy mixes its splits: unpack Train.zip and Val.zip anew into an empty folder"
            )
        return scenes

    def expected(self, split: str) -> ExpectedScenes:
        return ExpectedScenes(SCENES[split], SCENE_SIDE, "published number of scenes")

    def lacking(self) -> list[str]:
        return [name for part in self.parts for name in _lacking(self.folder, part)]

    def download(self, work: Path, command: str) -> None:
        """Download and unpack the parts that are missing; an archive that the user put into the folder is used and left there."""
        for part in self.parts:
            if lacking := _lacking(self.folder, part):
                self._download(part, lacking, work, command)
            for leftover in (*work.glob(f"{part}.zip*"), work / part):
                remove(leftover)

    def _download(self, part: str, lacking: list[str], work: Path, command: str) -> None:
        folder, name, (size, md5) = self.folder, f"{part}.zip", ARCHIVES[part]
        if (folder / part).is_dir() and any((folder / part).iterdir()):
            raise DataError(
                f"source.root: {folder} has {part} but lacks {', '.join(lacking)}; complete it, or delete it to have it fetched"
            )
        archive = folder / name if (folder / name).is_file() else work / name
        base = os.environ.get("CRFM_ZENODO", "https://zenodo.org").rstrip("/")
        url = f"{base}/{ZENODO_RECORD}/files/{name}?download=1"
        fetch(url, archive, size=size, md5=md5, space=2, command=command)  # 2: PNGs do not shrink
        remove(work / part)
        extract(archive, work / part)
        if lacking := _lacking(work, part):
            raise DataError(f"{archive}: lacks {', '.join(lacking)}; it is not LoveDA's {name}")
        files = read_record(folder).get("files", {}) | {name: {"size": size, "md5": md5}}
        write_json(folder / FETCH_RECORD, {"repo": f"https://zenodo.org/{ZENODO_RECORD}", "files": files})
        (work / part).rename(folder / part)

    def download_bytes(self) -> float:
        return 2.0 * sum(ARCHIVES[part][0] for part in self.parts if _lacking(self.folder, part))

    def submission(self) -> LoveDA:
        """The test images."""
        other = copy.copy(self)
        other.parts = ("Test",)
        return other

    def submission_images(self) -> list[Path]:
        """The test images by number. DataError when an area has none, a name is no number, or a number occurs twice."""
        found: dict[int, Path] = {}
        for area in AREAS:
            folder = self.folder / "Test" / area / "images_png"
            paths = sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))
            if not paths:
                raise DataError(f"{folder}: no images (*.png); unpack Test.zip of https://zenodo.org/{ZENODO_RECORD} to {self.folder}")
            for path in paths:
                if not path.stem.isdecimal():
                    raise DataError(f"{path}: its name is no number, which LoveDA's server goes by; move it out of the folder")
                first = found.setdefault(int(path.stem), path)
                if first is not path:
                    raise DataError(
                        f"{path} and {first} have one number; this copy mixes splits: unpack Test.zip anew into an empty folder"
                    )
        print(f"{len(found)} images; the official test split has {TEST_IMAGES}", flush=True)
        return [found[number] for number in sorted(found)]

    def submission_ids(self) -> np.ndarray:
        """The server's id of each training id, uint8 [256]; background for ignored pixels, as every pixel must have a class.

        Raises ConfigError unless each of the server's classes is one class of the dataset.
        """
        dataset = self.dataset
        mapped = {raw: new for raw, new in (dataset.label_map or {}).items() if new != IGNORE}
        if sorted(mapped) != list(SERVER_IDS) or sorted(mapped.values()) != list(range(len(dataset.classes))):
            raise ConfigError(
                f"label_map: LoveDA's server scores the ids 1...7, each a class of its own, and {dataset.name} maps {mapped or 'none'} to "
                f"{len(dataset.classes)} classes; predict with a segmentor trained on {{0: 255, 1: 0, 2: 1, ..., 7: 6}}"
            )
        ids = np.zeros(256, np.uint8)
        for raw, new in mapped.items():
            ids[new] = int(raw) - SERVER_IDS[0]
        return ids


def _lacking(folder: Path, part: str) -> list[str]:
    """Folders of a part that hold no image."""
    kinds = ("images_png",) if part == "Test" else ("images_png", "masks_png")
    names = [f"{part}/{area}/{kind}" for area in AREAS for kind in kinds]
    return [name for name in names if not holds_images(folder / name)]
