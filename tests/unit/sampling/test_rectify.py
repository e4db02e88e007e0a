"""One correction against reference numbers, and what a correction must always do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from paths import GOLDEN
from pydantic import ValidationError
from tiny_models import TinyCritic, tiny_vae

from crfm_core.models.latent_space import decode_latents
from crfm_core.sampling.flow import euler_step
from crfm_core.sampling.rectify import Rectification, RectifySettings, critic_loss, rectify_velocity

RELEASED = RectifySettings.released()
PAPER = RectifySettings.paper()
PRECISIONS = [(torch.float64, "f64", 1e-10, 1e-10), (torch.float32, "f32", 3e-6, 6e-4)]


class Reference:
    """The reference numbers, and one correction of their inputs."""

    def __init__(self) -> None:
        with np.load(GOLDEN / "rectification.npz") as arrays:
            self.numbers = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
            self.meta = json.loads(str(arrays["meta"]))
        shape = self.meta["vae"]
        self.vae = tiny_vae(tuple(shape["block_out_channels"]), layers_per_block=shape["layers_per_block"])
        self.vae.decoder.load_state_dict(self._weights("vae.decoder/"))
        self.critic = TinyCritic()
        self.critic.load_state_dict(self._weights("critic/"))

    def _weights(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.numbers.items() if key.startswith(prefix)}

    def correct(self, dtype, settings, step=None, labels="label", count=2) -> Rectification:
        self.vae.to(dtype), self.critic.to(dtype)
        velocity, latents, sigma = (self.numbers[f"in/{name}"][:count].to(dtype) for name in ("v", "z_t", "sigma"))
        labels, step = self.numbers[f"in/{labels}"][:count].long(), self.meta["step_default"] if step is None else step
        return rectify_velocity(velocity, latents, sigma, labels, lambda x: decode_latents(x, self.vae), self.critic, settings, step)


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    """The reference was computed by one thread; more sum the convolutions in another order, which moves float32's last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "tag", "tolerance", "wide"), PRECISIONS)
def test_every_released_variant_gives_the_reference_velocity(reference, dtype, tag, tolerance, wide):
    for name, options in reference.meta["settings"].items():
        settings = dataclasses.replace(
            RELEASED, normalise="l2" if "l2" in options else "none", shrink="synth" in options, clamp="nc" not in options
        )
        done = reference.correct(dtype, settings, options.get("step"))
        assert done.velocity.dtype == dtype
        allowed = wide if "bigstep" in name else tolerance
        assert torch.allclose(done.velocity, reference.numbers[f"out/{tag}/{name}"], rtol=0, atol=allowed), name
        assert torch.allclose(done.loss, reference.numbers[f"mid/{tag}/loss_per_sample"], rtol=0, atol=tolerance), name


@pytest.mark.parametrize(("dtype", "tag", "tolerance", "wide"), PRECISIONS)
def test_nothing_is_corrected_where_the_critic_is_right_everywhere(reference, dtype, tag, tolerance, wide):
    for name, normalise in (("all_correct", "none"), ("all_correct_l2", "l2"), ("all_correct_l2", "relative")):
        done = reference.correct(dtype, dataclasses.replace(RELEASED, normalise=normalise), labels="label_all_correct")
        assert torch.allclose(done.velocity, reference.numbers[f"out/{tag}/{name}"], rtol=0, atol=tolerance)
        assert done.gradient_ratio.tolist() == done.loss.tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "tag", "tolerance", "wide"), PRECISIONS)
def test_the_gradient_and_the_decoded_images_are_the_reference_ones(reference, dtype, tag, tolerance, wide):
    raw = dataclasses.replace(RELEASED, clamp=False)
    gradient = reference.numbers["in/v"].to(dtype) - reference.correct(dtype, raw, step=1.0).velocity
    assert torch.allclose(gradient, reference.numbers[f"mid/{tag}/grad_v"], rtol=0, atol=tolerance)
    alone = reference.correct(dtype, raw, step=50.0, count=1).velocity
    assert torch.allclose(alone, reference.numbers[f"out/{tag}/noclamp_bigstep_first_sample_alone"], rtol=0, atol=wide)
    velocity, latents, sigma = (reference.numbers[f"in/{name}"].to(dtype) for name in ("v", "z_t", "sigma"))
    images = decode_latents(latents - sigma[:, None, None, None] * velocity, reference.vae)[..., ::3, ::3]  # those that are kept
    expected = reference.numbers[f"mid/{tag}/image"]  # reaches 22, where the next float32 is 2e-6 away: processors differ by more
    assert torch.allclose(images, expected, rtol=0, atol=tolerance if dtype is torch.float64 else tolerance * expected.abs().max().item())


class Case:
    """A velocity, latent and labels of three samples with a random decoder and critic, in float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        self.velocity, self.latents = torch.randn(2, 3, 16, 4, 4, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 7, (3, 8, 8), generator=generator)
        self.sigma = 0.8
        self.vae, self.critic = tiny_vae().double(), TinyCritic().double()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(latents, self.vae)

    def correct(self, settings: RectifySettings, step: float, rows=slice(None), labels=None) -> Rectification:
        labels = self.labels if labels is None else labels
        return rectify_velocity(self.velocity[rows], self.latents[rows], self.sigma, labels[rows], self.decode, self.critic, settings, step)

    def loss(self, velocity: torch.Tensor) -> torch.Tensor:
        return critic_loss(self.latents - self.sigma * velocity, self.labels, self.decode, self.critic)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_a_corrected_euler_step_is_a_step_of_the_latent_along_the_clean_estimates_gradient(case):
    """v' = v - α ∂ℓ/∂v with one Euler step equals z - η ∂ℓ/∂ẑ₀ before the plain step, η = α σ (σ - σ') (FlowChef)."""
    alpha, following = 3.0, 0.75
    corrected = euler_step(case.latents, case.correct(PAPER, alpha).velocity, case.sigma, following)
    clean = (case.latents - case.sigma * case.velocity).requires_grad_()
    (gradient,) = torch.autograd.grad(critic_loss(clean, case.labels, case.decode, case.critic).sum(), clean)
    moved = case.latents - alpha * case.sigma * (case.sigma - following) * gradient
    assert gradient.abs().max() > 1e-4
    assert torch.allclose(corrected, euler_step(moved, case.velocity, case.sigma, following), rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalise", ["none", "l2", "relative"])
def test_a_sample_does_not_depend_on_its_batch(case, normalise):
    settings = RectifySettings(normalise=normalise)
    together, alone = case.correct(settings, 0.3), case.correct(settings, 0.3, rows=slice(1, 2))
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.allclose(ours[1:2], theirs, rtol=0, atol=1e-12)


def test_with_reduction_mean_the_batch_divides_the_gradient(case):
    summed = case.correct(PAPER, 1.0).velocity - case.velocity
    averaged = case.correct(dataclasses.replace(PAPER, reduction="mean"), 1.0).velocity - case.velocity
    assert torch.allclose(averaged * 3, summed, rtol=0, atol=1e-14)


def test_descending_lowers_the_critics_loss_and_ascending_raises_it(case):
    before = case.loss(case.velocity)
    assert (case.loss(case.correct(RectifySettings(), 0.02).velocity) < before).all()
    assert (case.loss(case.correct(RectifySettings(), -0.02).velocity) > before).all()


def test_a_relative_step_is_as_long_as_it_says(case):
    done = case.correct(RectifySettings(), 0.3)
    assert torch.allclose(done.gradient_ratio, torch.full((3,), 0.3, dtype=torch.float64))
    assert torch.equal(done.clamp_ratio, torch.zeros(3, dtype=torch.float64))


def test_ignored_samples_keep_their_velocity_and_leave_the_others_alone(case):
    labels = case.labels.clone()
    labels[0] = 255
    for normalise in ("none", "l2", "relative"):
        for pixels in ("valid", "wrong"):
            done = case.correct(RectifySettings(normalise=normalise, pixels=pixels), 0.3, labels=labels)
            assert torch.equal(done.velocity[0], case.velocity[0])
            assert done.loss[0] == done.gradient_ratio[0] == 0
            assert not torch.equal(done.velocity[1], case.velocity[1])


def test_ignored_pixels_do_not_count(case):
    labels, other = case.labels.clone(), case.labels.clone()
    labels[:, :4], other[:, :4] = 255, 255
    full = critic_loss(case.latents, labels, case.decode, case.critic)
    logits = case.critic((case.decode(case.latents) / 2 + 0.5).clamp(0, 1))
    by_hand = torch.nn.functional.cross_entropy(logits[:, :, 4:], case.labels[:, 4:], reduction="none").mean((1, 2))
    assert torch.allclose(full, by_hand)


def test_inner_steps_are_corrections_one_after_another(case):
    twice = case.correct(RectifySettings(inner_steps=2), 0.1)
    first = case.correct(RectifySettings(), 0.1)
    second = rectify_velocity(first.velocity, case.latents, case.sigma, case.labels, case.decode, case.critic, RectifySettings(), 0.1)
    assert torch.allclose(twice.velocity, second.velocity, rtol=0, atol=1e-14)
    assert torch.equal(twice.loss, first.loss)


def test_clamp_and_shrink_do_what_they_say(case):
    clamped = case.correct(RectifySettings(clamp=True), 0.0)
    assert torch.equal(clamped.velocity, case.velocity.clamp(-1, 1))
    change = (case.velocity.clamp(-1, 1) - case.velocity).flatten(1).norm(dim=1) / case.velocity.flatten(1).norm(dim=1)
    assert torch.allclose(clamped.clamp_ratio, change)
    plain, shrunk = (case.correct(RectifySettings(normalise="none", shrink=shrink), 0.1).velocity for shrink in (False, True))
    assert torch.allclose(plain - shrunk, 0.1 * case.velocity)


def test_ascending_goes_the_other_way_by_as_much(case):
    down, up = (case.correct(RectifySettings(ascend=ascend), 0.3).velocity - case.velocity for ascend in (False, True))
    assert down.norm() > 0 and torch.allclose(up, -down)


def test_it_leaves_its_inputs_and_the_networks_alone_and_works_without_gradients_enabled(case):
    velocity = case.velocity.clone()
    with torch.no_grad():
        done = case.correct(RectifySettings(), 0.3)
    assert torch.equal(case.velocity, velocity) and not case.velocity.requires_grad
    assert not done.velocity.requires_grad and not done.loss.requires_grad
    assert all(parameter.grad is None for parameter in [*case.vae.parameters(), *case.critic.parameters()])


def test_the_noise_level_may_be_one_number_or_one_per_sample(case):
    each = torch.full((3,), case.sigma, dtype=torch.float64)
    arguments = (case.labels, case.decode, case.critic, RectifySettings(), 0.3)
    assert torch.equal(
        rectify_velocity(case.velocity, case.latents, each, *arguments).velocity, case.correct(RectifySettings(), 0.3).velocity
    )


def test_arguments_that_do_not_fit_are_refused_with_their_values(case):
    v, z, y = case.velocity, case.latents, case.labels
    wrong = [
        ((v, z[:2], 0.5, y), r"latents \(2, 16, 4, 4\)"),
        ((v, z, 0.5, y[:2]), r"labels have shape \(2, 8, 8\)"),
        ((v, z, 0.5, y[:, :4]), r"labels have shape \(3, 4, 8\), the critic's logits \(3, 7, 8, 8\)"),
        ((v, z, torch.ones(2), y), "sigma has 2 values"),
        ((v, z, 0.5, y + 5), r"labels hold ids \[7, 8, 9, 10, 11\], the critic knows 0 \.\.\. 6"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            rectify_velocity(*arguments, case.decode, case.critic, PAPER, 0.1)


def test_step_sizes_follow_the_schedule_over_all_sampling_steps():
    assert RELEASED.step_sizes(23) == pytest.approx([0.1 * (1 - i / 23) for i in (1, 2, 3, 4)])
    assert PAPER.step_sizes(23) == [0.1] * 4
    assert RectifySettings(steps=2, step_size=1.0, schedule="linear_increase").step_sizes(4) == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"rectify\.steps=4 exceeds the number of sampling steps 3"):
        PAPER.step_sizes(3)


def test_presets_differ_as_published():
    assert (PAPER.schedule, PAPER.pixels, PAPER.reduction, PAPER.normalise, PAPER.shrink, PAPER.clamp) == (
        "constant", "valid", "sum", "none", False, False,
    )  # fmt: skip
    assert (RELEASED.schedule, RELEASED.pixels, RELEASED.reduction, RELEASED.normalise, RELEASED.shrink, RELEASED.clamp) == (
        "linear_decrease", "wrong", "mean", "none", False, True,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"pixels": "all"}, {"step_size": float("nan")}, {"inner_steps": 0}, {"size": 1}])
def test_settings_refuse_what_they_do_not_know(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RectifySettings(**wrong)
