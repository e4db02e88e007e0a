"""Which weights of a network train, and how: whole, by low-rank updates (LoRA, arXiv 2106.09685), or not at all."""

from __future__ import annotations

import torch
from torch import nn

from crfm_core import ConfigError
from crfm_core.settings import Control


def choose_trainable(network: nn.Module, control: Control) -> list[str]:
    """Freeze all of ``network`` but what ``control`` trains and return the names of the parameters that train, in order.

    Branches are the network's own (``branch_parameters``). A branch of ``control.lora`` gets low-rank updates on each of its linear
    layers, and nothing else of it trains. Under ``precision: bf16`` the frozen linear and convolution weights are stored in bfloat16,
    which is what autocast would make of them at every use; weights that train stay float32.
    """
    branches = network.branch_parameters()
    low_rank = control.lora.branches if control.lora else []
    if low_rank:
        members = {name for branch in low_rank for name, _ in branches[branch]}
        layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in members]
        _inject(network, layers, control)
    network.requires_grad_(False)
    for branch in control.trained:
        for _, parameter in branches[branch] if branch not in low_rank else []:
            parameter.requires_grad_(True)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)
    if control.precision == "bf16":
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                module.to(torch.bfloat16)
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def _inject(network: nn.Module, layers: list[str], control: Control) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("controls: lora needs the package peft (pip install peft)") from None
    inject_adapter_in_model(LoraConfig(r=control.lora.rank, lora_alpha=control.lora.alpha, target_modules=layers), network)


@torch.no_grad()
def merge_low_rank(network: nn.Module) -> None:
    """Add the low-rank updates into the weights they update, so that the network is again of its own modules alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, module.get_base_layer())


def make_optimiser(parameters: list[nn.Parameter], control: Control) -> torch.optim.Optimizer:
    """AdamW over ``parameters``, with its state in float32 or, by bitsandbytes, in 8 bits (arXiv 2110.02861)."""
    if control.optimiser == "adamw":
        return torch.optim.AdamW(parameters, lr=control.learning_rate, weight_decay=control.weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError("controls: optimiser adamw_8bit needs the package bitsandbytes (pip install bitsandbytes)") from None
    return AdamW8bit(parameters, lr=control.learning_rate, weight_decay=control.weight_decay)
