"""Where every result lies: the one module that builds the paths of results, or takes them apart.

A kind of result is one line of :class:`Layout`. Its names may be those of one result or wildcards of the workflow:

>>> Layout("results").tiles("embedded", "train")
'results/embedded/tiles/train.parquet'
>>> Layout("results").tiles("{dataset}", "{split}")
'results/{dataset}/tiles/{split}.parquet'
>>> Layout.tiles.names("/data/results/embedded/tiles/train.parquet")
{'dataset': 'embedded', 'split': 'train'}
>>> Layout.tiles.root("/data/results/embedded/tiles/train.parquet")
PosixPath('/data/results/embedded')
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

from crfm_core import DataError

#: What wildcards stand for: names of the configuration, but for these.
NAME = "[A-Za-z0-9_-]+"
WILDCARDS = {"scene": r"[^/]+", "job": r".+", "files": "source|test_images", "model": "(?:base|caption|clip)_model"}


@dataclass(frozen=True)
class Result:
    """A path taken apart: its kind, the folder of all results, and what its wildcards stand for."""

    kind: str
    results: Path
    names: dict[str, str]

    @property
    def root(self) -> Path:
        """The folder of the dataset's results, which no path of a manifest may leave."""
        return self.results / self.names["dataset"]


class Kind:
    """One kind of result: a pattern below the folder of all results. As an attribute of a layout, the function that names its paths."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.wildcards = re.findall(r"{(\w+)}", pattern)
        names = re.sub(r"\\{(\w+)\\}", lambda found: f"(?P<{found[1]}>{WILDCARDS.get(found[1], NAME)})", re.escape(pattern))
        self._regex = re.compile(r"(?:(?P<_results>.*)/)?" + names)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layout: None, owner: type) -> Kind: ...
    @overload
    def __get__(self, layout: Layout, owner: type) -> Callable[..., str]: ...
    def __get__(self, layout: Layout | None, owner: type) -> Kind | Callable[..., str]:
        return self if layout is None else partial(self.path, layout.results)

    def path(self, results: Path | str, *names: object) -> str:
        """The path below the folder ``results``; ``names`` in the order of the wildcards."""
        return f"{results}/" + self.pattern.format(**dict(zip(self.wildcards, names, strict=True)))

    def parse(self, path: Path | str) -> Result:
        """Take a path of this kind apart, wherever the results lie. Raises DataError when it is none."""
        found = self._regex.fullmatch(str(path))
        if not found:
            raise DataError(f"{path}: is not where the {self.name.replace('_', ' ')} of a run lies; expected RESULTS/{self.pattern}")
        names = found.groupdict()
        return Result(self.name, Path(names.pop("_results") or "."), names)

    def names(self, path: Path | str) -> dict[str, str]:
        """What the wildcards stand for in a path of this kind."""
        return self.parse(path).names

    def root(self, path: Path | str) -> Path:
        """The folder of the dataset's results, from a path of this kind."""
        return self.parse(path).root


class Layout:
    """Paths of the results below one folder; :meth:`find` is the inverse."""

    def __init__(self, results: Path | str) -> None:
        self.results = results

    # what is fetched or given: notes that say where it lies
    model_note = Kind("{model}.json")
    weights_note = Kind("weights/{weights}.json")
    source_note = Kind("{dataset}/{files}.json")
    # data
    scenes = Kind("{dataset}/scenes.parquet")
    tiles = Kind("{dataset}/tiles/{split}.parquet")
    disjoint = Kind("{dataset}/tiles/disjoint.json")
    mosaic = Kind("{dataset}/mosaics/{split}/{scene}-{kind}.{suffix}")
    data_sheet = Kind("{dataset}/data_sheet")
    captions = Kind("{dataset}/captions/{split}.parquet")
    prompts = Kind("{dataset}/prompts/{split}.json")
    pseudo_labels = Kind("{dataset}/pseudo_labels.parquet")
    layouts = Kind("{dataset}/layouts/{layouts}.parquet")
    # generator
    base_model = Kind("{dataset}/base_model")
    latents = Kind("{dataset}/latents/{mask_code}.safetensors")
    set_latents = Kind("{dataset}/latents/{set}/{mask_code}.safetensors")
    generator = Kind("{dataset}/generators/{control}")
    unfinished_generator = Kind("{dataset}/generators/{control}.unfinished")
    training_checkpoint = Kind("{dataset}/generators/{control}.unfinished/checkpoint-{step}.pt")
    validation_picture = Kind("{dataset}/validation/{control}/{checkpoint}.png")
    validation = Kind("{dataset}/validation/{control}/{checkpoint}.json")
    exported = Kind("{dataset}/exports/{control}")
    # segmentors
    checkpoint = Kind("{dataset}/segmentors/{recipe}/{segmentor}/seed{seed}/checkpoint.pth")
    scores = Kind("{dataset}/segmentors/{recipe}/{segmentor}/seed{seed}/scores.json")
    predictions = Kind("{dataset}/predictions/{recipe}/{segmentor}/seed{seed}/{split}.parquet")
    predicted_scene = Kind("{dataset}/predicted_scenes/{recipe}/{segmentor}/seed{seed}/{scene}.{suffix}")
    submission = Kind("{dataset}/submissions/{recipe}/{segmentor}/seed{seed}.zip")
    # synthesis
    shard = Kind("{dataset}/synthetic/{control}/{sampler}/shard-{shard}-of-{shards}.parquet")
    synthetic = Kind("{dataset}/synthetic/{control}/{sampler}/all.parquet")
    synthetic_images = Kind("{dataset}/synthetic/{control}/{sampler}/images")
    synthetic_scene = Kind("{dataset}/synthetic_scenes/{control}/{sampler}/{scene}.tif")
    comparison = Kind("{dataset}/comparison/{preset}.json")
    generation = Kind("{dataset}/generation/{control}/{sampler}.json")
    agreement = Kind("{dataset}/agreement/{control}/{sampler}.json")
    reconstruction = Kind("{dataset}/agreement/reconstruction.json")
    # curation
    class_losses = Kind("{dataset}/class_losses/{split}.json")
    filtered = Kind("{dataset}/filtered/{control}/{sampler}/{filter}.parquet")
    resampled = Kind("{dataset}/resampled/{control}/{sampler}/{filter}/{resampling}.parquet")
    mix = Kind("{dataset}/mixes/{recipe}.parquet")
    # report
    table = Kind("tables/{table}.csv")
    table_text = Kind("tables/{table}.txt")
    figures = Kind("figures")
    report = Kind("report.html")
    # of every job: what it said, and its time and memory
    log = Kind("logs/{job}.log")
    benchmark = Kind("benchmarks/{job}.tsv")
    benchmarks = Kind("benchmarks")

    def folder(self, dataset: str) -> Path:
        """The folder of one dataset's results."""
        return Path(self.results) / dataset

    def find(self, path: Path | str) -> Result:
        """The kind and names of a path. Raises DataError when it is no result of this layout."""
        for kind in KINDS.values():
            found = kind._regex.fullmatch(str(path))
            if found and Path(found["_results"] or ".") == Path(self.results):
                return kind.parse(path)
        raise DataError(f"{path}: is no result below {self.results}")


#: All kinds by name.
KINDS = {name: one for name, one in vars(Layout).items() if isinstance(one, Kind)}
