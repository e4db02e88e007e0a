"""How much each job of a run has to do, and leaves on the disk: counts of tiles, images and steps that follow from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet as parquet

from crfm_core.data.sources import open_source
from crfm_core.data.windows import window_offsets
from crfm_core.experiment import copies, iterations
from crfm_core.layout import Layout
from crfm_core.settings import (
    PLAIN,
    PRESETS,
    Dataset,
    EmbeddedBase,
    EmbeddedSource,
    Judge,
    RectifySettings,
    Selection,
    Settings,
)

#: Tiles that validation samples, its Euler steps, and the noise levels of its losses (:mod:`crfm_core.generator.validation`).
VALIDATED, VALIDATION_STEPS, LEVELS = 8, 23, 8

#: Rules whose jobs touch small files alone: their time is that of starting.
SMALL = ("check_splits", "gather_shards", "resample_tiles", "mix_tiles", "draw_data_sheet", "make_table", "make_report")


class Unknown(Exception):
    """Why the work of a job cannot be told; no fault of anyone's, so no error of the package."""


@dataclass(frozen=True)
class Job:
    """One job of the run: its rule, what its wildcards stand for, whether it is still to be done, and where its time is noted."""

    rule: str
    names: Mapping[str, str]
    pending: bool = True
    benchmark: Path | None = None


@dataclass(frozen=True)
class Count:
    """How many tiles a split has (None: not known), and how that is known."""

    tiles: int | None
    how: str


@dataclass
class Load:
    """What one job has to do: amounts by kind of work, such as ``step triattention``, done on tiles of one side; it is shared out over
    ``processes``. ``disk`` is what it leaves in the results, in bytes, images as if they were not compressed."""

    tile: int
    work: dict[str, float] = field(default_factory=dict)
    processes: int = 1
    disk: float = 0.0

    def add(self, kind: str, amount: float) -> None:
        self.work[kind] = self.work.get(kind, 0.0) + amount


class Workload:
    """The work of a configuration's jobs.

    Args:
        settings, datasets: the configuration; datasets by name.
        weights: numbers of weights in billions, as in configs/rates.yaml.
        bytes_of: bytes of the embedded models' folders, and of an image's file beside its pixels.
        results: the run's folder, where tiles that are cut already are counted.
        uncut: (dataset, split) whose tiles are still to be cut: what manifests of theirs say is past.
    """

    def __init__(
        self,
        settings: Settings,
        datasets: Mapping[str, Dataset],
        weights: Mapping,
        bytes_of: Mapping[str, float],
        results: Path,
        uncut: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self.settings, self.datasets, self.results, self.uncut = settings, datasets, results, uncut
        self.weights, self.bytes_of = weights, bytes_of

    # ------------------------------------------------------------------------------------------------------- tiles

    def count(self, name: str, split: str) -> Count:
        """The tiles of a split: those of its manifest, else what the configuration says."""
        manifest = Path(Layout(self.results).tiles(name, split))
        if (name, split) not in self.uncut and manifest.is_file():
            return Count(parquet.ParquetFile(manifest).metadata.num_rows, "cut")
        dataset = self.datasets[name]
        return _selected(dataset.select.get(split), self._whole(dataset, split), len(dataset.classes))

    def _whole(self, dataset: Dataset, split: str) -> Count:
        """All tiles of a split, before any selection."""
        expected = None if dataset.tile.ground_distance else open_source(dataset).expected(split)
        if expected is None:
            return Count(None, "unknown until they are cut")
        return Count(round(expected.count * _per_scene(dataset, expected.side)), expected.basis)

    def _tiles(self, name: str, split: str) -> int:
        count = self.count(name, split)
        if count.tiles is None:
            raise Unknown(f"tiles of {name}, {split}: {count.how}")
        return count.tiles

    def _training(self, name: str) -> int:
        return self._tiles(name, self.datasets[name].train)

    def _synthetic(self, names: Mapping[str, str]) -> int:
        return copies(self.settings, names["control"], names["sampler"]) * self._training(names["dataset"])

    # -------------------------------------------------------------------------------------------------------- jobs

    def of(self, job: Job) -> Load:
        """The work of a job. Raises Unknown, saying why, where it cannot be told."""
        name = job.names.get("dataset")
        load = Load(self.datasets[name].tile.size if name else 0)
        if job.rule in SMALL:
            return load
        describe = getattr(self, f"_on_{job.rule}", None)
        if describe is None:
            raise Unknown("takes as long as the network does" if job.rule.startswith("fetch_") else "nothing was measured")
        describe(load, job.names)
        return load

    def _on_list_scenes(self, load: Load, names: Mapping[str, str]) -> None:
        source = self.datasets[names["dataset"]].source
        if not isinstance(source, EmbeddedSource):
            raise Unknown("nothing was measured for scenes that are given")
        scenes = sum(source.scenes.values())
        load.add("draw_scene", scenes * (source.size / 256) ** 2)
        load.disk = scenes * self._image_bytes(source.size, 4)

    def _on_tile_scenes(self, load: Load, names: Mapping[str, str]) -> None:
        kept = self._tiles(names["dataset"], names["split"])
        all_of_them = self._whole(self.datasets[names["dataset"]], names["split"]).tiles
        load.add("cut", all_of_them or kept)  # a selection goes by what tiles show, so it is made of all
        load.disk = kept * self._image_bytes(load.tile, 4)

    def _on_caption_tiles(self, load: Load, names: Mapping[str, str]) -> None:
        if self.settings.captions.kind == "vlm":
            raise Unknown("nothing was measured for models that caption")
        load.add("caption", self._tiles(names["dataset"], names["split"]))

    def _on_encode_prompts(self, load: Load, names: Mapping[str, str]) -> None:
        prompts = self._prompts(names["dataset"], names["split"])
        load.add("prompt", prompts)
        if not self._embedded:  # 77 + 256 tokens of 4096 and 2048 pooled
            load.disk = prompts * (333 * 4096 + 2048) * (2 if self.settings.device == "cuda" else 4)

    def _prompts(self, name: str, split: str) -> int:
        """Distinct prompts, with the empty one; before there are captions, as many as there can be."""
        captions = Path(Layout(self.results).captions(name, split))
        if (name, split) not in self.uncut and captions.is_file():
            return pd.read_parquet(captions, columns=["caption"]).caption.nunique() + 1
        tiles = self._tiles(name, split)
        plain = self.settings.captions.kind == "template" and "{classes}" in self.settings.captions.template
        return 1 + (min(tiles, 2 ** len(self.datasets[name].classes) - 1) if plain else tiles)

    @property
    def _embedded(self) -> bool:
        return isinstance(self.settings.base_model, EmbeddedBase)

    def _on_build_base_model(self, load: Load, names: Mapping[str, str]) -> None:
        vae = self.settings.base_model.vae
        load.add("autoencoder", vae.steps * vae.batch_size)
        load.disk = self.bytes_of["base_model"]

    def _on_check_base_model(self, load: Load, names: Mapping[str, str]) -> None:
        """Reads nothing but headers."""

    def _on_encode_latents(self, load: Load, names: Mapping[str, str]) -> None:
        tiles = self._training(names["dataset"])
        load.add("encode", 4 * tiles)  # image and mask, as they are and flipped
        # posterior's mean and logarithm of its variance, and the mask's latent, in half precision
        load.disk = 12 * tiles * self._latent_size(load.tile)

    def _latent_size(self, tile: int) -> int:
        if self._embedded:
            vae = self.settings.base_model.vae
            return vae.latent_channels * (tile // 2 ** (len(vae.channels) - 1)) ** 2
        return 16 * (tile // 8) ** 2

    def _on_train_generator(self, load: Load, names: Mapping[str, str]) -> None:
        control = self.settings.controls[names["control"]]
        kind = "train_checkpointing" if control.gradient_checkpointing and not self._embedded else "train"
        load.add(f"{kind} {control.scheme}", control.steps * control.accumulate * control.batch_size * control.processes)
        load.processes = control.processes
        whole = 4e9 * (self.weights["generator"][control.scheme] + self.weights["autoencoder"])
        load.disk = self.bytes_of["generator"] if self._embedded else whole

    def checkpoints(self, control: str) -> float:
        """Bytes of the checkpoints that a training keeps beside its results until it ends: weights, two moments, averages."""
        if self._embedded:
            return 0.0
        one = self.settings.controls[control]
        return (one.keep_checkpoints + 1) * 4e9 * self.weights["trained"][one.scheme] * (4 if one.ema else 3)

    def _on_sample_validation(self, load: Load, names: Mapping[str, str]) -> None:
        scheme = self.settings.controls[names["control"]].scheme
        load.add(f"step {scheme}", VALIDATED * (VALIDATION_STEPS + 2 * LEVELS))
        load.add("decode", VALIDATED)
        load.add("encode", 3 * VALIDATED)

    def _on_train_segmentor(self, load: Load, names: Mapping[str, str]) -> None:
        segmentor, dataset = self.settings.segmentors[names["segmentor"]], self.datasets[names["dataset"]]
        kind, count = self._architecture(names["segmentor"]), iterations(self.settings, names["recipe"], names["segmentor"])
        load.add(f"fit {kind}", count * segmentor.batch_size)
        if dataset.val:
            looks = -(-count // (segmentor.validate_every or -(-count // 10)))
            load.add(f"judge {kind}", looks * self._tiles(dataset.name, dataset.val))
        load.processes = segmentor.processes
        load.disk = 4e9 * self.weights["segmentor"].get(kind, 0) * (2 if dataset.val else 1)

    def _architecture(self, segmentor: str) -> str:
        architecture = self.settings.segmentors[segmentor].architecture
        if architecture is None:
            raise Unknown("nothing was measured for networks of other files")
        return architecture

    def _judged(self, load: Load, judge: Judge, tiles: float) -> None:
        if judge.path:
            raise Unknown("nothing was measured for a critic or judge from elsewhere")
        load.add(f"judge {self._architecture(judge.segmentor)}", tiles)

    def _on_evaluate_segmentor(self, load: Load, names: Mapping[str, str]) -> None:
        dataset, how = self.datasets[names["dataset"]], self.settings.evaluation
        window = min(how.window or load.tile, load.tile) if how.mode == "slide" else load.tile
        windows = len(window_offsets(load.tile, window, how.stride or max(1, 2 * window // 3))) ** 2 * (window / load.tile) ** 2
        views = sum(scale**2 for scale in how.scales) * (2 if how.flip else 1)
        load.add(f"judge {self._architecture(names['segmentor'])}", self._tiles(dataset.name, dataset.test) * windows * views)

    def _on_measure_class_losses(self, load: Load, names: Mapping[str, str]) -> None:
        self._judged(load, self.settings.critic, self._tiles(names["dataset"], names["split"]))

    def _on_filter_pixels(self, load: Load, names: Mapping[str, str]) -> None:
        tiles = self._synthetic(names)
        self._judged(load, self.settings.critic, tiles)
        load.disk = tiles * self._image_bytes(load.tile, 1)

    def _on_filter_images(self, load: Load, names: Mapping[str, str]) -> None:
        if self.settings.filters[names["filter"]].kind == "clip":
            load.add("features clip", self._synthetic(names))
        else:
            self._judged(load, self.settings.critic, self._synthetic(names))

    def _on_measure_agreement(self, load: Load, names: Mapping[str, str]) -> None:
        for judge in (self.settings.critic, self.settings.judge):
            self._judged(load, judge, self._synthetic(names))

    def _on_measure_reconstruction(self, load: Load, names: Mapping[str, str]) -> None:
        tiles = self._training(names["dataset"])
        load.add("encode", tiles)
        load.add("decode", tiles)
        for judge in (self.settings.critic, self.settings.judge):
            self._judged(load, judge, 2 * tiles)

    def _on_measure_generation(self, load: Load, names: Mapping[str, str]) -> None:
        how, dataset = self.settings.generation, self.datasets[names["dataset"]]
        tiles = self._synthetic(names) + self._tiles(dataset.name, how.split or dataset.train)
        if how.features == "judge":
            self._judged(load, self.settings.judge, tiles)
        else:
            load.add(f"features {how.features}", tiles)
        if how.cmmd:
            load.add("features clip", tiles)

    # ---------------------------------------------------------------------------------------------------- sampling

    def _on_synthesise_shard(self, load: Load, names: Mapping[str, str]) -> None:
        sampler = self.settings.samplers[names["sampler"]]
        images = self._synthetic(names) / self.settings.shards
        passes = 2 if sampler.guidance_scale > 1 else 1
        self._sampled(load, names["control"], images, sampler.num_steps * passes, sampler.rectification)
        load.disk = images * self._image_bytes(load.tile, 3)

    def _on_compare_corrections(self, load: Load, names: Mapping[str, str]) -> None:
        comparison, dataset = self.settings.comparison, self.datasets[names["dataset"]]
        images = min(comparison.masks, self._tiles(dataset.name, dataset.test)) * len(comparison.seeds)
        plain = names["preset"] == PLAIN
        for steps in [0] if plain else comparison.steps:
            correction = None if plain else PRESETS[names["preset"]](steps=steps)
            self._sampled(load, comparison.control, images, comparison.num_steps, correction)
            for judge in (self.settings.critic, self.settings.judge):
                self._judged(load, judge, images)

    def _sampled(self, load: Load, control: str, images: float, steps: int, correction: RectifySettings | None) -> None:
        """Images drawn in so many passes of the network. A search looks once per step on average (docs/results-and-benchmarks.md) and stops
        early: counted is a look at every step."""
        load.add(f"step {self.settings.controls[control].scheme}", images * steps)
        load.add("encode", images)
        load.add("decode", images)
        if correction:
            load.add("gradient", images * correction.steps * correction.inner_steps)
            if correction.measure or correction.search != "none":
                load.add("look", images * correction.steps)

    def _image_bytes(self, side: int, channels: int) -> float:
        return channels * side**2 + self.bytes_of["image"]


def _per_scene(dataset: Dataset, side: int) -> int:
    """Tiles of a square scene."""
    tile = dataset.tile
    return len(window_offsets(side, tile.size, tile.stride or tile.size, tile.edge)) ** 2


def _selected(selection: Selection | None, whole: Count, classes: int) -> Count:
    if selection is None:
        return whole
    if selection.tiles:
        return Count(selection.tiles, "as selected")
    if selection.ids:
        try:
            return Count(sum(bool(line.strip()) for line in Path(selection.ids).read_text(encoding="utf-8").splitlines()), "as listed")
        except (OSError, UnicodeDecodeError):
            return Count(None, f"{selection.ids} cannot be read")
    if selection.n_shot:
        most = selection.n_shot * classes
        return Count(most if whole.tiles is None else min(most, whole.tiles), "at most, for few-shot")
    if whole.tiles is None:
        return whole
    return Count(max(1, round(selection.fraction * whole.tiles)), f"a share of {whole.tiles:,}")
