"""How much work the jobs of a run are, and what they leave on the disk, from the configuration and the rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as parquet

from crfm_core.data.sources import open_source
from crfm_core.data.windows import window_offsets
from crfm_core.experiment import copies, layout_copies
from crfm_core.generator.held_out import LEVELS, MOST_HELD_OUT, held_out_count
from crfm_core.layout import Layout
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import Rates, Unit, Unknown, number_of
from crfm_core.settings import (
    PLAIN,
    PRESETS,
    PSEUDO,
    UNLABELLED,
    Control,
    Dataset,
    EmbeddedBase,
    EmbeddedSource,
    RectifySettings,
    Selection,
    Settings,
)  # fmt: skip


@dataclass(frozen=True)
class TileCount:
    """How many tiles a split has (None: not known), and how that is known."""

    tiles: int | None
    basis: str


class Workload:
    """The work and the files of a configuration's jobs.

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

    def seconds_of(self, job: Job, gpu: str | None = None) -> tuple[float | None, str]:
        """Seconds of a job by the rates alone, on a core or on GPUs of a known name, and their basis; None where they are not known."""
        rate = self.rates.jobs.get(job.rule)
        if rate is None:
            return None, "not known"
        seconds, basis = self.rates.start if rate.start is None else rate.start, "scaled"
        try:
            count = self.count(rate.unit, job)
            if count and (rate.seconds is not None or rate.tflop is not None):
                each, basis = self.rates.seconds(rate, self._keys(job), self.settings, self._tile(job), gpu)
                seconds += each * count / job.processes(self.settings)
        except Unknown:
            return None, "not known"
        return seconds, basis

    def bytes_of(self, job: Job) -> float | None:
        """Bytes that a job leaves in the results, images as if they were not compressed; None where they are not known."""
        rate = self.rates.jobs.get(job.rule)
        if rate is None:
            return None
        of_unit, of_pixel = number_of(rate.bytes, self._keys(job)), number_of(rate.pixel_bytes, self._keys(job))
        if of_unit is None or of_pixel is None:
            return None
        scale = self.scale if job.rule == "train_generator" and not isinstance(self.settings.base_model, EmbeddedBase) else 1.0
        try:
            return scale * self.count(rate.files, job) * (of_unit + of_pixel * self._tile(job) ** 2)
        except Unknown:
            return None

    def checkpoint_bytes(self, control: str) -> float:
        """Bytes of the checkpoints that a training keeps until it ends: weights, two moments, averages, best weights. 0 where it is not
        known."""
        one = self.settings.controls[control]
        trained = self.rates.weights.trained.get(one.scheme, 0.0)
        if isinstance(self.settings.base_model, EmbeddedBase):
            return 0.0
        return (one.keep_checkpoints + 1) * 4e9 * self.scale * trained * (3 + bool(one.ema) + bool(one.validate_every))

    def tile_count(self, name: str, split: str) -> TileCount:
        """The tiles of a split: those of its manifest, else what the configuration says."""
        manifest = Path(Layout(self.results).tiles(name, split))
        if (name, split) not in self.uncut and manifest.is_file():
            return TileCount(parquet.ParquetFile(manifest).metadata.num_rows, "cut")
        dataset = self.datasets[name]
        return _selected(dataset.select.get(split), self.before_selection(dataset, split), len(dataset.classes))

    def before_selection(self, dataset: Dataset, split: str) -> TileCount:
        """All tiles of a split."""
        source = open_source(dataset)
        found = source.expected_unlabelled() if split == UNLABELLED else source.expected(dataset.scenes_split(split))
        expected = None if dataset.tile.ground_distance else found
        if expected is None:
            return TileCount(None, "unknown until they are cut")
        tile = dataset.tile
        per_scene = len(window_offsets(expected.side, tile.size, tile.stride or tile.size, tile.edge)) ** 2
        return TileCount(round(expected.count * per_scene), expected.basis)

    def count(self, unit: Unit, job: Job) -> float:
        """How many units of work, or of files, a job is. Raises Unknown."""
        settings, base, names = self.settings, self.settings.base_model, job.names
        if unit == "jobs":
            return 1
        if unit == "autoencoder_images":
            return base.vae.steps * base.vae.batch_size if isinstance(base, EmbeddedBase) else 0
        if unit == "passes":
            return self._passes(job)
        if unit == "generator_images":
            return self._generator_images(self._control(job), self.datasets[names["dataset"]])
        if unit == "crops":
            return settings.iterations(names["recipe"], names["segmentor"]) * settings.segmentors[names["segmentor"]].batch_size
        dataset = self.datasets[names["dataset"]]
        if unit == "drawn_scenes":
            if not isinstance(dataset.source, EmbeddedSource):
                raise Unknown("nothing was measured for scenes of others")
            scenes = sum(dataset.source.scenes.values()) + (dataset.source.unlabelled or 0)
            return scenes * (dataset.source.size / 256) ** 2
        if unit == "segmentor_files":  # the last weights, and the best where a split chooses them
            return 2 if dataset.val else 1
        if unit == "scored_tiles":
            return self._known_tiles(dataset, dataset.test) * self._scored_area(dataset.tile.size)
        if unit == "unlabelled_tiles":
            return self._known_tiles(dataset, UNLABELLED)
        name = names.get("split", names.get("set", dataset.train))
        layouts = names.get("layouts", names.get("split"))
        if layouts in settings.layouts:  # masks that are drawn, captioned, and whose prompts are encoded
            tiles = layout_copies(settings, layouts) * self._known_tiles(dataset, dataset.train)
        else:
            tiles = self._known_tiles(dataset, UNLABELLED if name == PSEUDO else name)
        if unit == "tiles_to_cut":  # all of them: a selection goes by what tiles show
            return self.before_selection(dataset, names["split"]).tiles or tiles
        if unit == "captions" and settings.captions.kind == "vlm" and layouts not in settings.layouts:
            raise Unknown("nothing was measured for captioning models")
        if unit == "prompts":  # distinct ones, as many as there can be, with the empty one
            if names.get("split") == UNLABELLED and settings.captions.kind != "vlm":
                return 2
            by_template = settings.captions.kind == "template" or layouts in settings.layouts
            by_classes = by_template and "{classes}" in settings.captions.template
            return 1 + (min(tiles, 2 ** len(dataset.classes) - 1) if by_classes else tiles)
        if unit in ("synthetic_tiles", "shard_images"):
            drawn = copies(settings, names["control"], names["sampler"]) * tiles
            return drawn if unit == "synthetic_tiles" else drawn / settings.shards
        return tiles

    def _generator_images(self, one: Control, dataset: Dataset) -> float:
        """Images of a training. A pass backward takes two forward ones; checkpointing adds one, a look at a held-out tile takes one for
        each noise level, in every process, and once more with the mask left out where the loss is the lowest so far."""
        images = one.steps * one.accumulate * one.batch_size * one.processes * (4 / 3 if one.gradient_checkpointing else 1)
        if not one.validate_every:
            return images
        tiles = self.tile_count(dataset.name, dataset.val or dataset.train).tiles or MOST_HELD_OUT
        looked_at = min(tiles, MOST_HELD_OUT) if dataset.val else held_out_count(tiles, one.validation_share)
        return images + math.ceil(one.steps / one.validate_every) * looked_at * 2 * LEVELS / 3 * one.processes

    def _tile(self, job: Job) -> int:
        return self.datasets[job.names["dataset"]].tile.size if "dataset" in job.names else 0

    def _control(self, job: Job) -> Control:
        compared = self.settings.comparison
        return self.settings.controls[compared.control if compared and "preset" in job.names else job.names["control"]]

    def _keys(self, job: Job) -> list[str]:
        """The names under which the rates may have a job's numbers, the first one before others."""
        if "segmentor" in job.names:
            return [self.settings.segmentors[job.names["segmentor"]].architecture or ""]
        if isinstance(self.settings.base_model, EmbeddedBase):
            return ["embedded"]
        has_control = "control" in job.names or "preset" in job.names
        return [*([self._control(job).scheme] if has_control else []), self.settings.device, "full"]

    def _known_tiles(self, dataset: Dataset, split: str) -> int:
        count = self.tile_count(dataset.name, split)
        if count.tiles is None:
            raise Unknown(f"tiles of {dataset.name}, {split}: {count.basis}")
        return count.tiles

    def _scored_area(self, side: int) -> float:
        """Area that is predicted to score a tile, in tiles: all windows, scales and flips."""
        how = self.settings.evaluation
        window = min(how.window or side, side) if how.mode == "slide" else side
        windows = len(window_offsets(side, window, how.stride or max(1, 2 * window // 3))) ** 2 * (window / side) ** 2
        return windows * sum(scale**2 for scale in how.scales) * (2 if how.flip else 1)

    def _passes(self, job: Job) -> float:
        """Passes of the network over one image; a correction takes as long as several, encoding and decoding an image half a correction."""
        each = number_of(self.rates.correction_passes, self._keys(job))
        if each is None:
            raise Unknown("configs/rates.yaml has no correction_passes of these networks")
        count = 0.0
        for images, passes, rectify in self._sampled(job):
            corrections = rectify.steps * rectify.inner_steps if rectify else 0
            count += images * (passes + each * (corrections + 0.5))
        return count

    def _sampled(self, job: Job) -> Iterator[tuple[float, int, RectifySettings | None]]:
        """What is drawn: images, passes of the network for each, and the correction."""
        compared, preset = self.settings.comparison, job.names.get("preset")
        if preset is None or compared is None:
            sampler = self.settings.samplers[job.names["sampler"]]
            passes = 1 + (sampler.guidance_scale > 1) + (sampler.mask_guidance_scale > 1)
            yield self.count("shard_images", job), sampler.num_steps * passes, sampler.rectify
            return
        dataset = self.datasets[job.names["dataset"]]
        images = min(compared.masks, self._known_tiles(dataset, dataset.held_out_split or "")) * len(compared.seeds)
        for steps in [0] if preset == PLAIN else compared.steps:
            yield images, compared.num_steps, PRESETS[preset](steps=steps) if steps else None


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
