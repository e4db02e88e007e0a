"""The comparison of the correction's forms: all draw the same masks from the same noise, and what is written is what they did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from prompt_files import write_prompts
from segmentor_tiles import write_tiles
from tiny_models import TinyCritic, tiny_pipeline
from torch.nn import functional as F

from crfm_core import ConfigError
from crfm_core.data.rasters import read_label, write_raster
from crfm_core.files import read_json, seed_of
from crfm_core.metrics.confusion import OVERALL_SCORES, ConfusionMatrix
from crfm_core.reporting.comparison import read_comparison
from crfm_core.sampling.comparison import compare_corrections
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.sampler import OpenedSampler
from crfm_core.segmentor.critic import Critic, as_critic
from crfm_core.settings import Comparison, Sampler
from crfm_core.text.encoders import PromptCache, prompt_key

STEPS = 4
MASKS = 3
SEEDS = [0, 7]


def tiny_segmentor(seed: int) -> Critic:
    network = TinyCritic()
    network.c3.weight.data = torch.randn(network.c3.weight.shape, generator=torch.Generator().manual_seed(seed))
    return as_critic(network, network.classes)


@dataclass
class Bench:
    """What a comparison needs, tiny, with masks of 16x16 pixels; remembers the noise that was asked for."""

    root: Path
    pipeline: MaskToImagePipeline = field(default_factory=tiny_pipeline)
    critic: Critic = field(default_factory=lambda: tiny_segmentor(1))
    judge: Critic = field(default_factory=lambda: tiny_segmentor(2))

    @property
    def captions(self) -> Path:
        return self.root / "captions" / "test.parquet"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts" / "test.json"

    def compare(self, preset: str, steps=(1, STEPS), batch_size: int = 2, name: str | None = None) -> dict:
        """The JSON of one preset, and in ``noise`` the seeds that the pipeline was called with for each of its forms."""
        asked: list[int] = []

        def sample(*arguments, **named):
            asked.extend(generator.initial_seed() for generator in named["generator"])
            return self.pipeline(*arguments, **named)

        settings = Comparison(control="c", steps=list(steps), num_steps=STEPS, masks=MASKS, seeds=SEEDS, batch_size=batch_size)
        out = self.path(name or preset)
        compare_corrections(OpenedSampler(Sampler(), sample, self.critic), self.judge, self.captions, self.prompts, settings, preset, out)
        found = read_json(out)
        return found | {"noise": np.array(asked).reshape(len(found["forms"]), -1).tolist()}

    def path(self, name: str) -> Path:
        return self.root / "comparison" / f"{name}.json"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("comparison"))
    names = [f"tile {index}" for index in range(MASKS + 1)]  # one more than is used
    write_tiles(bench.captions, count=len(names), size=16, caption=names, prompt=[prompt_key(name) for name in names])
    draws = torch.Generator().manual_seed(5)
    # a random network hardly hears a prompt
    loud = {name: (9 * torch.randn(6, 32, generator=draws), 9 * torch.randn(24, generator=draws)) for name in names}
    write_prompts(loud, bench.prompts)
    return bench


@pytest.fixture(scope="module")
def found(bench) -> dict[str, dict]:
    """The files of all presets."""
    return {preset: bench.compare(preset) for preset in ("plain", "released", "paper", "default", "adaptive")}


def test_plain_scores_are_those_of_samples_drawn_from_the_documented_noise(bench):
    names = [f"t{index}" for index in range(MASKS)]
    labels = np.stack([read_label(bench.captions.parent / "test" / "labels" / f"{name}.png") for name in names])
    embeds, pooled = PromptCache(bench.prompts).take([prompt_key(f"tile {index}") for index in range(MASKS)])
    (form,) = bench.compare("plain", batch_size=MASKS, name="whole")["forms"]
    assert form["steps"] == 0 and [entry["seed"] for entry in form["seeds"]] == SEEDS
    for entry in form["seeds"]:
        noise = [torch.Generator().manual_seed(seed_of("comparison", name, entry["seed"])) for name in names]
        drawn = bench.pipeline(
            labels, prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=STEPS, generator=noise, output_type="np"
        )
        images = torch.from_numpy((drawn.images * 255).round() / 255).permute(0, 3, 1, 2).float()
        for who in ("critic", "judge"):
            logits = getattr(bench, who).logits(images)
            scores = ConfusionMatrix(7).update(logits.argmax(1), labels).scores()
            assert entry[who] == {name: scores[name] for name in OVERALL_SCORES}
        logits = bench.critic.logits(images)
        losses = [F.cross_entropy(logits[i : i + 1], torch.tensor(labels[i : i + 1]).long(), ignore_index=255) for i in range(MASKS)]
        assert entry["critic_loss"] == pytest.approx(mean(float(loss) for loss in losses), rel=1e-6)


def test_all_forms_start_from_the_same_noise(found):
    asked = {preset: one["noise"] for preset, one in found.items()}
    (plain,) = asked.pop("plain")
    assert len(set(plain)) == MASKS * len(SEEDS)
    assert all(form == plain for forms in asked.values() for form in forms)


def test_each_number_of_corrected_steps_has_its_entry(found):
    for preset in ("released", "paper", "default"):
        one = found[preset]
        assert (one["preset"], one["masks"], one["num_steps"]) == (preset, MASKS, STEPS)
        assert [form["steps"] for form in one["forms"]] == [1, STEPS]
        for form in one["forms"]:
            assert form["corrections"] == form["steps"] == len(form["by_step"])
            assert all(entry["samples"] == MASKS * len(SEEDS) for entry in form["by_step"])
            assert [entry["step"] for entry in form["by_step"]] == list(range(form["steps"]))
            assert form["seconds_per_image"] > 0 and form["notes"] == {}
    assert found["plain"]["forms"][0]["corrections"] == 0 and found["plain"]["forms"][0]["raised"] is None


def test_what_moved_the_velocity_is_told_apart(found):
    gradient, clamp = ({preset: one["forms"][-1][key] for preset, one in found.items()} for key in ("gradient_ratio", "clamp_ratio"))
    assert gradient["default"] == pytest.approx(0.3, abs=1e-5) and clamp["default"] == clamp["paper"] == clamp["adaptive"] == 0
    assert clamp["released"] > 0.1 > gradient["released"] > 0
    assert 0 < gradient["adaptive"] <= 0.3 + 1e-5


def test_a_search_never_raises_the_loss_and_lowers_that_of_the_finished_images(found):
    assert all(form["raised"] == 0 for form in found["adaptive"]["forms"])
    plain, searched = (found[preset]["forms"][-1]["seeds"] for preset in ("plain", "adaptive"))
    assert all(after["critic_loss"] < before["critic_loss"] for before, after in zip(plain, searched, strict=True))


def test_scores_do_not_depend_on_the_batches(bench, found):
    alone = bench.compare("default", batch_size=1, name="alone")
    assert alone["noise"] == found["default"]["noise"]
    for one, other in zip(found["default"]["forms"], alone["forms"], strict=True):
        for a, b in zip(one["seeds"], other["seeds"], strict=True):
            assert a["critic_loss"] == pytest.approx(b["critic_loss"], rel=1e-4)
            assert all(a[who] == pytest.approx(b[who], abs=0.5) for who in ("critic", "judge"))  # single pixels may tip over


def test_a_mask_without_labels_is_noted_and_counts_in_no_mean(bench):
    path = bench.captions.parent / "test" / "labels" / "t1.png"
    kept = path.read_bytes()
    write_raster(path, np.full((16, 16), 255, np.uint8))
    try:
        one = bench.compare("default", steps=[1], name="unlabelled")
    finally:
        path.write_bytes(kept)
    (form,) = one["forms"]
    assert form["notes"] == {"no labelled pixel: not corrected": len(SEEDS)}
    assert form["corrections"] == pytest.approx((MASKS - 1) / MASKS)
    assert all(np.isfinite(entry["critic_loss"]) for entry in form["seeds"])


def test_the_report_reads_what_is_written(bench, found):
    compared = read_comparison([bench.path(preset) for preset in found])
    assert compared.presets == list(found) and compared.seeds == SEEDS and compared.masks == MASKS
    assert len(compared.rows) == 1 + 2 * (len(found) - 1)


def test_an_unknown_preset_is_refused_and_nothing_written(bench):
    with pytest.raises(ConfigError, match="preset 'best': must be one of plain, paper, released, default, adaptive"):
        bench.compare("best")
    assert not bench.path("best").exists()
