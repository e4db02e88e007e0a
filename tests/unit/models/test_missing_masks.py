"""Batches in which some samples have no mask: each sample is what it would be alone, and so is its gradient."""

from __future__ import annotations

import pytest
import torch
from tiny_models import network_inputs, tiny_network
from torch import Tensor

from crfm_core.models.network import ControlNetwork

SCHEMES = ("triattention", "siamese", "adapter", "controlnet")


def shaken_network(scheme: str) -> ControlNetwork:
    """A network none of whose maps starts at zero, in double precision."""
    network = tiny_network(scheme).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return network


def inputs_of(*rows: int) -> dict[str, Tensor]:
    inputs = {name: value.double() for name, value in network_inputs().items()}
    mask = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(9)).double()
    return {name: value[list(rows)] for name, value in (inputs | {"mask_latents": mask}).items()}


def losses(network: ControlNetwork, **inputs) -> Tensor:
    return network(**inputs, return_dict=False)[0].square().mean((1, 2, 3))


def gradients(network: ControlNetwork, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    found = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    return {name: torch.zeros_like(trained[name]) if one is None else one for name, one in zip(trained, found, strict=True)}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_sample_of_a_mixed_batch_is_what_it_would_be_alone_and_so_are_the_gradients(scheme, checkpointed):
    network = shaken_network(scheme)
    if checkpointed:
        network.enable_gradient_checkpointing()
    present = torch.tensor([False, True])
    mixed = losses(network, **inputs_of(0, 1), mask_present=present)
    without, with_mask = losses(network, **inputs_of(0) | {"mask_latents": None}), losses(network, **inputs_of(1))
    assert torch.allclose(mixed, torch.cat([without, with_mask]), rtol=1e-6, atol=1e-9)
    assert not torch.allclose(mixed, losses(network, **inputs_of(0, 1)), rtol=1e-4, atol=0), "the mask matters"
    ours, apart = gradients(network, mixed.mean()), gradients(network, (without + with_mask).mean() / 2)
    assert all(torch.allclose(ours[name], apart[name], rtol=1e-6, atol=1e-9) for name in ours)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_without_any_mask_is_plain_sd3_and_still_reaches_every_weight_that_trains(scheme):
    network = shaken_network(scheme)
    absent = losses(network, **inputs_of(0, 1), mask_present=torch.tensor([False, False]))
    inputs = inputs_of(0, 1)
    inputs.pop("mask_latents")
    plain = network.to_sd3().double()(**inputs, return_dict=False)[0].square().mean((1, 2, 3))
    assert torch.allclose(absent, plain, rtol=1e-6, atol=1e-9)
    absent.mean().backward()
    for branch, members in network.branch_parameters().items():
        for name, parameter in members:
            assert parameter.grad is not None, name  # or DDP would wait for it
            assert branch != "mask" or not parameter.grad.any(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_which_samples_have_a_mask_is_said_by_a_truth_value_each(scheme):
    network = shaken_network(scheme)
    for present in (torch.tensor([True]), torch.tensor([1, 0])):
        with pytest.raises(ValueError, match=r"mask_present has shape .*needs truth values \[2\]"):
            network(**inputs_of(0, 1), mask_present=present)
    with pytest.raises(ValueError, match="and mask_latents beside it"):
        network(**inputs_of(0, 1) | {"mask_latents": None}, mask_present=torch.tensor([True, False]))
