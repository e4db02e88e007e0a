"""How much work the jobs of a run are, and what they leave on the disk: what they count, from the configuration, times the rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as parquet

from crfm_core.data.sources import open_source
from crfm_core.data.windows import window_offsets
from crfm_core.experiment import copies, iterations
from crfm_core.layout import Layout
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import Rates, Unknown, number_of
from crfm_core.settings import PLAIN, PRESETS, Dataset, EmbeddedSource, Filter, RectifySettings, Selection, Settings


@dataclass(frozen=True)
class TileCount:
    """How many tiles a split has (None: not known), and how that is known."""

    tiles: int | None
    basis: str


@dataclass(frozen=True)
class JobSize:
    """What one job counts by the names of configs/rates.yaml, on tiles of one side with networks of one name (None: of no name there),
    and the bytes it leaves in the results, images as if they were not compressed."""

    tile: int
    counts: dict[str, float]
    network: str | None
    disk: float


class Workload:
    """The sizes of a configuration's jobs.

    Args:
        settings, datasets: the configuration; datasets by name.
        uncut: (dataset, split) whose tiles are still to be cut: a manifest of theirs is out of date.
        scale: how many times as many weights the base model has as SD3.5-medium.
    """

    def __init__(
        self,
        settings: Settings,
        datasets: Mapping[str, Dataset],
        rates: Rates,
        uncut: frozenset[tuple[str, str]] = frozenset(),
        scale: float = 1.0,
    ) -> None:
        self.settings, self.datasets, self.rates, self.uncut, self.scale = settings, datasets, rates, uncut, scale
        self.results = Path(settings.results)

    def tile_count(self, name: str, split: str) -> TileCount:
        """The tiles of a split: those of its manifest, else what the configuration says."""
        manifest = Path(Layout(self.results).tiles(name, split))
        if (name, split) not in self.uncut and manifest.is_file():
            return TileCount(parquet.ParquetFile(manifest).metadata.num_rows, "cut")
        dataset = self.datasets[name]
        return _selected(dataset.select.get(split), self.before_selection(dataset, split), len(dataset.classes))

    def before_selection(self, dataset: Dataset, split: str) -> TileCount:
        """All tiles of a split."""
        expected = None if dataset.tile.ground_distance else open_source(dataset).expected(dataset.scenes_split(split))
        if expected is None:
            return TileCount(None, "unknown until they are cut")
        return TileCount(round(expected.count * _per_scene(dataset, expected.side)), expected.basis)

    def size_of(self, job: Job) -> JobSize:
        """The size of a job. Raises Unknown, saying why, where it is not known."""
        rate = self.rates.jobs.get(job.rule)
        if rate is None:
            raise Unknown(f"configs/rates.yaml has no jobs.{job.rule}")
        one = JobCounts(self, job.names)
        counts = {name: one.count(name) for name in rate.work}
        disk = sum(one.count(name) * one.bytes_of(file) for name, file in rate.files.items())
        return JobSize(one.tile, counts, one.network, disk)

    def checkpoint_bytes(self, control: str) -> float:
        """Bytes of the checkpoints that a training keeps until it ends: weights, two moments, averages. 0 where that is not known."""
        one = self.settings.controls[control]
        trained = number_of(self.rates.weights["trained"], one.scheme)
        if self.settings.base_model.kind == "embedded" or trained is None:
            return 0.0
        return (one.keep_checkpoints + 1) * 4e9 * self.scale * trained * (4 if one.ema else 3)


class JobCounts:
    """What one job counts: a method for each name that ``jobs`` in configs/rates.yaml has under ``work`` and ``files``."""

    def __init__(self, workload: Workload, names: Mapping[str, str]) -> None:
        self.workload, self.settings, self.names = workload, workload.settings, names
        self.dataset = workload.datasets.get(names.get("dataset", ""))
        self.tile = self.dataset.tile.size if self.dataset else 0
        self.embedded = self.settings.base_model.kind == "embedded"
        self.control = self.segmentor = None
        if "control" in names or "preset" in names:
            self.control = self.settings.controls[names.get("control") or self.settings.comparison.control]
        if "segmentor" in names:
            self.segmentor = self.settings.segmentors[names["segmentor"]]

    def count(self, name: str) -> float:
        """The count of this name. Raises Unknown."""
        return getattr(self, name)()

    @property
    def network(self) -> str | None:
        """The control scheme or the architecture that works."""
        return self.segmentor.architecture if self.segmentor else self.control.scheme if self.control else None

    def jobs(self) -> int:
        return 1

    # ------------------------------------------------------------------------------------------------------------ tiles

    def tiles(self) -> int:
        """Of the job's split, or of the training split."""
        return self._tiles(self.names.get("split", self.dataset.train))

    def _tiles(self, split: str) -> int:
        count = self.workload.tile_count(self.dataset.name, split)
        if count.tiles is None:
            raise Unknown(f"tiles of {self.dataset.name}, {split}: {count.basis}")
        return count.tiles

    def tiles_to_cut(self) -> int:
        """All tiles: a selection goes by what tiles show."""
        return self.workload.before_selection(self.dataset, self.names["split"]).tiles or self.tiles()

    def scenes(self) -> float:
        """Scenes that are drawn, in scenes of 256x256 pixels."""
        source = self.dataset.source
        if not isinstance(source, EmbeddedSource):
            raise Unknown("nothing was measured for a user's own scenes")
        return sum(source.scenes.values()) * (source.size / 256) ** 2

    def captions(self) -> int:
        if self.settings.captions.kind == "vlm":
            raise Unknown("nothing was measured for captioning models")
        return self.tiles()

    def prompts(self) -> int:
        """Distinct prompts, as many as there can be, with the empty one."""
        captions, tiles = self.settings.captions, self.tiles()
        by_classes = captions.kind == "template" and "{classes}" in captions.template
        return 1 + (min(tiles, 2 ** len(self.dataset.classes) - 1) if by_classes else tiles)

    def synthetic_tiles(self) -> int:
        return copies(self.settings, self.names["control"], self.names["sampler"]) * self._tiles(self.dataset.train)

    def tiles_for_critic(self) -> int:
        """Tiles of which a filter needs the critic's predictions."""
        return self.synthetic_tiles() if self._filter.NEEDS_CRITIC else 0

    def tiles_for_clip(self) -> int:
        """Tiles of which a filter needs the CLIP-like model's embeddings."""
        return self.synthetic_tiles() if self._filter.NEEDS_CLIP else 0

    def relabelled_tiles(self) -> int:
        """Tiles whose labels a filter writes anew."""
        return 0 if self._filter.DROPS_IMAGES else self.synthetic_tiles()

    @property
    def _filter(self) -> Filter:
        return self.settings.filters[self.names["filter"]]

    # --------------------------------------------------------------------------------------------------------- training

    def autoencoder_images(self) -> int:
        return self.settings.base_model.vae.steps * self.settings.base_model.vae.batch_size

    def generator_images(self) -> int:
        """Images that a generator trains on, as often as they are drawn."""
        return self.control.steps * self.control.accumulate * self.control.batch_size * self.control.processes

    def recomputed_images(self) -> int:
        """Of them those whose forward pass is computed twice."""
        return self.generator_images() if self.control.gradient_checkpointing else 0

    def crops(self) -> int:
        """Tiles that a segmentor trains on, as often as they are drawn."""
        return self._iterations * self.segmentor.batch_size

    @property
    def _iterations(self) -> int:
        return iterations(self.settings, self.names["recipe"], self.names["segmentor"])

    def validated_tiles(self) -> int:
        if not self.dataset.val:
            return 0
        times = -(-self._iterations // (self.segmentor.validate_every or -(-self._iterations // 10)))
        return times * self._tiles(self.dataset.val)

    def scored_tiles(self) -> float:
        """Area that is predicted to score the test split, in tiles: all windows, scales and flips."""
        how, side = self.settings.evaluation, self.tile
        window = min(how.window or side, side) if how.mode == "slide" else side
        windows = len(window_offsets(side, window, how.stride or max(1, 2 * window // 3))) ** 2 * (window / side) ** 2
        views = sum(scale**2 for scale in how.scales) * (2 if how.flip else 1)
        return self._tiles(self.dataset.test) * windows * views

    # --------------------------------------------------------------------------------------------------------- sampling

    def images(self) -> float:
        """Images of a shard, or of one form of the correction."""
        return sum(images for images, _, _ in self._sampled())

    def steps(self) -> float:
        """Passes of the network over one image."""
        return sum(images * steps for images, steps, _ in self._sampled())

    def corrections(self) -> float:
        """A search is counted as if it ran to the last step."""
        return sum(images * one.steps * one.inner_steps for images, _, one in self._sampled() if one)

    def losses(self) -> float:
        """The critic's losses after a correction: one per step, on average, where it is measured or the step size is searched for."""
        return sum(images * one.steps for images, _, one in self._sampled() if one and (one.measure or one.search != "none"))

    def _sampled(self) -> Iterator[tuple[float, int, RectifySettings | None]]:
        """What is drawn: images, passes of the network for each, and the correction."""
        settings, preset = self.settings, self.names.get("preset")
        if preset is None:
            sampler = settings.samplers[self.names["sampler"]]
            passes = sampler.num_steps * (2 if sampler.guidance_scale > 1 else 1)
            yield self.synthetic_tiles() / settings.shards, passes, sampler.rectify
            return
        images = min(settings.comparison.masks, self._tiles(self.dataset.held_out_split or "")) * len(settings.comparison.seeds)
        for steps in [0] if preset == PLAIN else settings.comparison.steps:
            yield images, settings.comparison.num_steps, PRESETS[preset](steps=steps) if steps else None

    # ------------------------------------------------------------------------------------------------------------ files

    def bytes_of(self, file: str) -> float:
        """Bytes of a kind of file. Raises Unknown."""
        weights, sizes = self.workload.rates.weights, self.workload.rates.bytes
        if file in (channels := {"scene": 4, "tile": 4, "image": 3, "mask": 1}):
            return channels[file] * (256 if file == "scene" else self.tile) ** 2 + sizes["file"]
        if file == "base_model" or (file == "generator" and self.embedded):
            return sizes[file]
        if file == "prompt":  # 77 + 256 tokens of 4096, and 2048 pooled
            return 0.0 if self.embedded else (333 * 4096 + 2048) * (2 if self.settings.device == "cuda" else 4)
        if file == "latents":  # the posterior's mean and logarithm of its variance, and the mask's latent, flipped too, in half precision
            vae = self.settings.base_model.vae if self.embedded else None
            return 12 * (vae.latent_channels * (self.tile // 2 ** (len(vae.channels) - 1)) ** 2 if vae else 16 * (self.tile // 8) ** 2)
        if (count := number_of(weights[file], self.network)) is None:
            raise Unknown(f"configs/rates.yaml has no weights.{file} of {self.network}")
        if file == "segmentor":  # the last weights, and the best where a split chooses them
            return 4e9 * count * (2 if self.dataset.val else 1)
        return 4e9 * self.workload.scale * (count + weights["autoencoder"])


def _per_scene(dataset: Dataset, side: int) -> int:
    """Tiles of a square scene."""
    tile = dataset.tile
    return len(window_offsets(side, tile.size, tile.stride or tile.size, tile.edge)) ** 2


def _selected(selection: Selection | None, whole: TileCount, classes: int) -> TileCount:
    if selection is None:
        return whole
    if selection.tiles:
        return TileCount(selection.tiles, "as selected")
    if selection.ids:
        try:
            return TileCount(sum(bool(line.strip()) for line in Path(selection.ids).read_text(encoding="utf-8").splitlines()), "as listed")
        except (OSError, UnicodeDecodeError):
            return TileCount(None, f"{selection.ids} cannot be read")
    if selection.n_shot:
        most = selection.n_shot * classes
        return TileCount(most if whole.tiles is None else min(most, whole.tiles), "at most, for few-shot")
    if whole.tiles is None:
        return whole
    return TileCount(max(1, round(selection.fraction * whole.tiles)), f"a share of {whole.tiles:,}")
