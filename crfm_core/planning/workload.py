"""How much work the jobs of a run are, and what they leave on the disk, from the configuration and the rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as parquet

from crfm_core.data.sources import open_source
from crfm_core.data.windows import window_offsets
from crfm_core.experiment import copies
from crfm_core.layout import Layout
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import Rates, Unknown, number_of
from crfm_core.settings import PLAIN, PRESETS, Control, Dataset, EmbeddedBase, RectifySettings, Segmentor, Selection, Settings


@dataclass(frozen=True)
class TileCount:
    """How many tiles a split has (None: not known), and how that is known."""

    tiles: int | None
    basis: str


@dataclass(frozen=True)
class JobSize:
    """The work of one job in units of configs/rates.yaml, on tiles of one side with networks of one name (None: of no name there), and
    the bytes it leaves in the results, images as if they were not compressed."""

    tile: int
    work: dict[str, float]
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
        tile = dataset.tile
        per_scene = len(window_offsets(expected.side, tile.size, tile.stride or tile.size, tile.edge)) ** 2
        return TileCount(round(expected.count * per_scene), expected.basis)

    def size_of(self, job: Job) -> JobSize:
        """The size of a job. Raises Unknown, saying why, where it is not known."""
        rate = self.rates.jobs.get(job.rule)
        if rate is None:
            raise Unknown(f"configs/rates.yaml has no jobs.{job.rule}")
        units = Units(self, job.names)
        disk = sum(units.count(name) * units.bytes_of(file) for name, file in rate.files.items())
        return JobSize(units.tile, {name: units.count(name) for name in rate.work}, units.network, disk)

    def checkpoint_bytes(self, control: str) -> float:
        """Bytes of the checkpoints that a training keeps until it ends: weights, two moments, averages. 0 where that is not known."""
        one = self.settings.controls[control]
        trained = number_of(self.rates.weights["trained"], one.scheme)
        if self.settings.base_model.kind == "embedded" or trained is None:
            return 0.0
        return (one.keep_checkpoints + 1) * 4e9 * self.scale * trained * (4 if one.ema else 3)


class Units:
    """What one job counts: a method for each unit that ``jobs`` in configs/rates.yaml has under ``work`` and ``files``."""

    def __init__(self, workload: Workload, names: Mapping[str, str]) -> None:
        self.workload, self.settings, self.names = workload, workload.settings, names
        self.tile = self.dataset.tile.size if "dataset" in names else 0

    def count(self, unit: str) -> float:
        """How many of this unit. Raises Unknown."""
        return getattr(self, unit)()

    @property
    def dataset(self) -> Dataset:
        return self.workload.datasets[self.names["dataset"]]

    @property
    def control(self) -> Control:
        compared = self.settings.comparison
        return self.settings.controls[compared.control if compared and "preset" in self.names else self.names["control"]]

    @property
    def segmentor(self) -> Segmentor:
        return self.settings.segmentors[self.names["segmentor"]]

    @property
    def network(self) -> str | None:
        """The control scheme or the architecture that works."""
        if "segmentor" in self.names:
            return self.segmentor.architecture
        return self.control.scheme if "control" in self.names or "preset" in self.names else None

    def jobs(self) -> int:
        return 1

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

    def captions(self) -> int:
        if self.settings.captions.kind == "vlm":
            raise Unknown("nothing was measured for captioning models")
        return self.tiles()

    def prompts(self) -> int:
        """Distinct prompts, as many as there can be, with the empty one."""
        captions, tiles = self.settings.captions, self.tiles()
        by_classes = captions.kind == "template" and "{classes}" in captions.template
        return 1 + (min(tiles, 2 ** len(self.dataset.classes) - 1) if by_classes else tiles)

    def autoencoder_images(self) -> int:
        base = self.settings.base_model
        return base.vae.steps * base.vae.batch_size if isinstance(base, EmbeddedBase) else 0

    def generator_images(self) -> float:
        """Images that a generator trains on, as often as they are drawn. A pass backward takes two forward ones; checkpointing adds one."""
        one = self.control
        return one.steps * one.accumulate * one.batch_size * one.processes * (4 / 3 if one.gradient_checkpointing else 1)

    def crops(self) -> int:
        """Tiles that a segmentor trains on, as often as they are drawn."""
        return self.settings.iterations(self.names["recipe"], self.names["segmentor"]) * self.segmentor.batch_size

    def scored_tiles(self) -> float:
        """Area that is predicted to score the test split, in tiles: all windows, scales and flips."""
        how, side = self.settings.evaluation, self.tile
        window = min(how.window or side, side) if how.mode == "slide" else side
        windows = len(window_offsets(side, window, how.stride or max(1, 2 * window // 3))) ** 2 * (window / side) ** 2
        views = sum(scale**2 for scale in how.scales) * (2 if how.flip else 1)
        return self._tiles(self.dataset.test) * windows * views

    def synthetic_tiles(self) -> int:
        return copies(self.settings, self.names["control"], self.names["sampler"]) * self._tiles(self.dataset.train)

    def synthetic_tiles_of_shard(self) -> float:
        return self.synthetic_tiles() / self.settings.shards

    def passes(self) -> float:
        """Passes of the network over one image."""
        return sum(images * passes for images, passes, _ in self._sampled())

    def decodings(self) -> float:
        """Passes of decoder and critic: 1.4 for an image and its mask, 2 for a correction, 1 more where its effect is measured or a step
        searched for."""
        count = 0.0
        for images, _, one in self._sampled():
            count += 1.4 * images
            if one:
                count += images * one.steps * (2 * one.inner_steps + (one.measure or one.search != "none"))
        return count

    def _sampled(self) -> Iterator[tuple[float, int, RectifySettings | None]]:
        """What is drawn: images, passes of the network for each, and the correction."""
        compared = self.settings.comparison
        if "preset" not in self.names or compared is None:
            sampler = self.settings.samplers[self.names["sampler"]]
            passes = sampler.num_steps * (2 if sampler.guidance_scale > 1 else 1)
            yield self.synthetic_tiles_of_shard(), passes, sampler.rectify
            return
        preset = self.names["preset"]
        images = min(compared.masks, self._tiles(self.dataset.held_out_split or "")) * len(compared.seeds)
        for steps in [0] if preset == PLAIN else compared.steps:
            yield images, compared.num_steps, PRESETS[preset](steps=steps) if steps else None

    # ------------------------------------------------------------------------------------------------------------ files

    def bytes_of(self, file: str) -> float:
        """Bytes of a kind of file. Raises Unknown."""
        rates, base, tile = self.workload.rates, self.settings.base_model, self.tile
        if file in (channels := {"tile": 4, "image": 3, "mask": 1}):
            return channels[file] * tile**2 + rates.bytes["file"]
        if file == "base_model" or (file == "generator" and isinstance(base, EmbeddedBase)):
            return rates.bytes[file]
        if file == "prompt":  # 77 + 256 tokens of 4096, and 2048 pooled
            return 0.0 if isinstance(base, EmbeddedBase) else (333 * 4096 + 2048) * (2 if self.settings.device == "cuda" else 4)
        if file == "latents":  # the posterior's mean and logarithm of its variance, and the mask's latent, flipped too, in half precision
            shape = (base.vae.latent_channels, 2 ** (len(base.vae.channels) - 1)) if isinstance(base, EmbeddedBase) else (16, 8)
            return 12 * shape[0] * (tile // shape[1]) ** 2
        if (count := number_of(rates.weights[file], self.network)) is None:
            raise Unknown(f"configs/rates.yaml has no weights.{file} of {self.network}")
        if file == "segmentor":  # the last weights, and the best where a split chooses them
            return 4e9 * count * (2 if self.dataset.val else 1)
        return 4e9 * self.workload.scale * (count + rates.billions("autoencoder"))


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
    if whole.tiles is None or selection.fraction is None:
        return whole
    return TileCount(max(1, round(selection.fraction * whole.tiles)), f"a share of {whole.tiles:,}")
