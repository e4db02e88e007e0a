"""The correction of a batch: which samples, for how long, with what step, and what happens when something goes wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_models import TinyCritic, tiny_vae

from crfm_core import ResourceError
from crfm_core.models.latent_space import decode_latents
from crfm_core.sampling.correction import VelocityCorrector
from crfm_core.sampling.rectify import RectifySettings, critic_loss
from crfm_core.settings import Sampler

STEPS = 6
ADAPTIVE = RectifySettings(steps=STEPS, search="backtracking")
SIGMA = 0.8


class Studio:
    """Eight samples with a random decoder and critic."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(4)
        self.velocity, self.latents = torch.randn(2, 8, 16, 8, 8, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, 7, (8, 4, 4), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
        self.vae, self.critic = tiny_vae().to(dtype).requires_grad_(False), TinyCritic().to(dtype)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(latents, self.vae)

    def corrector(self, settings: RectifySettings, critic=None, labels=None) -> VelocityCorrector:
        return VelocityCorrector(self.labels if labels is None else labels, self.decode, critic or self.critic, settings, STEPS)

    def run(self, settings: RectifySettings, steps: int = STEPS, **changes) -> tuple[VelocityCorrector, list[torch.Tensor]]:
        """Correct a run whose network always gives the same velocity; the corrector and its velocities."""
        corrector = self.corrector(settings, **changes)
        return corrector, [corrector(step, SIGMA, self.velocity, self.latents) for step in range(steps)]

    def loss(self, velocity: torch.Tensor) -> torch.Tensor:
        return critic_loss(self.latents - SIGMA * velocity, self.labels, self.decode, self.critic)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


@pytest.mark.parametrize("radius", [0.01, 0.3, 30.0])
def test_an_adaptive_step_never_raises_the_loss_nor_leaves_the_trust_region(studio, radius):
    """30 times the velocity overshoots by far: then a shorter step is taken, or none."""
    corrector, velocities = studio.run(dataclasses.replace(ADAPTIVE, step_size=radius, patience=STEPS))
    before = studio.loss(studio.velocity)
    for step, velocity in enumerate(velocities):
        after, entries = studio.loss(velocity), [record[step] for record in corrector.records]
        assert (after <= before).all()
        for row, entry in enumerate(entries):
            assert entry["loss_before"] == pytest.approx(before[row].item(), rel=1e-5)
            assert entry["loss_after"] == pytest.approx(after[row].item(), rel=1e-4) and entry["loss_after"] <= entry["loss_before"]
            assert entry["gradient_ratio"] == pytest.approx(entry["step_size"], rel=1e-4, abs=1e-7)
            assert entry["step_size"] <= radius * (1 + 1e-6)
            assert torch.equal(velocity[row], studio.velocity[row]) == (entry["step_size"] == 0)
    taken = [entry["step_size"] for record in corrector.records for entry in record]
    assert len(set(taken)) > 3 if radius == 30 else taken == pytest.approx([radius] * len(taken))


def test_a_failed_trial_is_followed_by_a_shorter_one_and_success_by_a_longer_one(studio):
    corrector, _ = studio.run(dataclasses.replace(ADAPTIVE, step_size=30.0, trials=3, patience=STEPS))
    for record in corrector.records:
        sizes = [entry["step_size"] for entry in record]
        first = next(index for index, size in enumerate(sizes) if size)
        assert all(later <= 2 * size * (1 + 1e-6) for size, later in zip(sizes[first:], sizes[first + 1 :], strict=False) if size)
    assert 0 < min(entry["step_size"] for record in corrector.records for entry in record if entry["step_size"]) < 15


def test_a_search_costs_at_most_its_trials(studio):
    calls = []

    def counting(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return studio.critic(images)

    for settings, most in ((ADAPTIVE, 3), (RectifySettings(steps=STEPS), 2), (RectifySettings(steps=STEPS, measure=False), 1)):
        for step_size in (0.3, 30.0):
            calls.clear()
            studio.run(dataclasses.replace(settings, step_size=step_size), critic=counting)
            assert sum(calls) <= most * STEPS * 8 and calls[0] == 8


def test_a_sample_is_done_when_the_critic_agrees_with_its_mask(studio):
    images = (studio.decode(studio.latents - SIGMA * studio.velocity) / 2 + 0.5).clamp(0, 1)
    labels = studio.labels.clone()
    labels[2] = studio.critic(images)[2].argmax(0)
    corrector, velocities = studio.run(ADAPTIVE, labels=labels)
    assert len(corrector.records[2]) == 1 and corrector.records[2][0]["agreement"] == 1
    assert torch.equal(velocities[1][2], studio.velocity[2]) and not torch.equal(velocities[1][3], studio.velocity[3])
    assert len(corrector.records[3]) > 1 and corrector.notes == [""] * 8
    share = (studio.critic(images).argmax(1) == labels).float().mean((1, 2)).tolist()
    assert [record[0]["agreement"] for record in corrector.records] == pytest.approx(share)


@pytest.mark.parametrize("patience", [1, 3])
def test_a_sample_is_done_when_no_step_improves_it(studio, patience):
    flat = lambda images: torch.zeros(len(images), 7, *images.shape[2:]) + 0 * images.sum()  # noqa: E731
    corrector, velocities = studio.run(dataclasses.replace(ADAPTIVE, patience=patience), critic=flat)
    assert [len(record) for record in corrector.records] == [patience] * 8
    assert all(torch.equal(velocity, studio.velocity) for velocity in velocities)


def test_going_up_the_gradient_raises_the_loss(studio):
    settings = RectifySettings(steps=1, step_size=0.02)
    _, (down,) = studio.run(settings, steps=1)
    up = 2 * studio.velocity - down
    assert (studio.loss(down) < studio.loss(studio.velocity)).all() and (studio.loss(up) > studio.loss(studio.velocity)).all()


@pytest.mark.parametrize("settings", [RectifySettings(steps=STEPS), ADAPTIVE], ids=["default", "adaptive"])
def test_a_sample_alone_and_in_a_batch_of_eight_agree(settings):
    studio = Studio(torch.float64)
    together, velocities = studio.run(settings)
    for row in (0, 5):
        alone = VelocityCorrector(studio.labels[row : row + 1], studio.decode, studio.critic, settings, STEPS)
        for step, velocity in enumerate(velocities):
            single = alone(step, SIGMA, studio.velocity[row : row + 1], studio.latents[row : row + 1])
            assert torch.allclose(single, velocity[row : row + 1], rtol=0, atol=1e-6)
        assert alone.records[0] == [pytest.approx(entry, rel=1e-5, abs=1e-8) for entry in together.records[row]]


@pytest.mark.parametrize(
    "settings", [RectifySettings(steps=STEPS), RectifySettings.released(), ADAPTIVE], ids=["default", "released", "adaptive"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_for_which_the_critic_gives_no_number_goes_on_uncorrected_and_is_marked(studio, settings, value):
    calls = []

    def broken(images: torch.Tensor) -> torch.Tensor:
        logits = studio.critic(images)
        calls.append(len(images))
        if len(calls) > first and len(images) == 8:
            logits = logits.clone()
            logits[1] = value
        return logits

    first = math.inf
    sound, _ = studio.run(settings, steps=1, critic=broken)
    first = len(calls)  # the critic breaks after its calls for the first step
    calls.clear()
    corrector, velocities = studio.run(settings, steps=3, critic=broken)
    assert not torch.equal(velocities[0][1], studio.velocity[1])
    assert torch.equal(velocities[1][1], studio.velocity[1]) and torch.equal(velocities[2][1], studio.velocity[1])
    assert velocities[2].isfinite().all() and not torch.equal(velocities[2][0], studio.velocity[0])
    assert corrector.notes == ["", "the critic's loss is not finite at step 1: not corrected from there on", *[""] * 6]
    assert corrector.records[1] == [pytest.approx(entry) for entry in sound.records[1]]
    assert [len(record) for record in corrector.records] == [3, 1] + [3] * 6


@pytest.mark.parametrize("settings", [RectifySettings(steps=2), RectifySettings(steps=2, reduction="mean", normalise="none")])
def test_without_memory_for_the_batch_it_is_corrected_in_parts(studio, settings, capsys):
    def small(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return studio.critic(images)

    corrector, velocities = studio.run(settings, critic=small)
    whole, expected = studio.run(settings)
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-5) for ours, theirs in zip(velocities, expected, strict=True))
    assert [len(record) for record in corrector.records] == [len(record) for record in whole.records] == [2] * 8
    said = [line for line in capsys.readouterr().out.splitlines() if "not enough memory" in line]
    assert said == [f"not enough memory to correct {n} samples at once; going on with {n // 2}" for n in (8, 4)]


def test_without_memory_for_one_sample_the_size_and_remedies_are_named(studio):
    def none(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with pytest.raises(ResourceError, match=r"a single sample of 16x16 .*DefaultCPUAllocator.*critic_decoder"):
        studio.run(RectifySettings(steps=1), critic=none)

    def faulty(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        studio.run(RectifySettings(steps=1), critic=faulty)


def test_an_ignored_mask_is_left_alone_and_said_so_and_unmeasured_losses_are_none(studio):
    labels = studio.labels.clone()
    labels[[0, 3]] = 255
    corrector, velocities = studio.run(RectifySettings(steps=2, measure=False), labels=labels)
    assert [len(record) for record in corrector.records] == [0, 2, 2, 0, 2, 2, 2, 2]
    assert [bool(note) for note in corrector.notes] == [True, False, False, True] + [False] * 4
    assert torch.equal(velocities[0][[0, 3]], studio.velocity[[0, 3]])
    assert all(entry["loss_after"] is None for record in corrector.records for entry in record)


@pytest.mark.parametrize(
    "change", [{"normalise": "none"}, {"pixels": "wrong"}, {"inner_steps": 2}, {"shrink": True}, {"clamp": True}, {"ascend": True}]
)
def test_a_search_is_refused_with_what_has_no_place_in_it(change):
    with pytest.raises(ValueError, match=r"rectify\n.*search: backtracking needs normalise: relative"):
        Sampler(preset="adaptive", rectify=change)
