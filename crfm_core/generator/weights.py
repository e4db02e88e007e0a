"""A network's weights before, in and after training: what they start from, which of them train and how, and the finished pipeline.

Weights train whole, by low-rank updates (LoRA, arXiv 2106.09685), or not at all.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crfm_core import ConfigError, WeightsError
from crfm_core.checkpoints import read_state_dict
from crfm_core.files import read_json
from crfm_core.models.controls import build_network, load_network
from crfm_core.models.flow_schedule import load_scheduler
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.models.network import ControlNetwork
from crfm_core.models.sd3_names import RELEASED_SCHEME, misfit
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import Control
from crfm_core.settings.generator import LoRA


def initial_network(base: Path, control: Control, num_classes: int) -> ControlNetwork:
    """The control scheme's network before training, in float32 on the CPU: the same for the same settings, whoever builds it."""
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32)
    torch.manual_seed(control.seed)
    network = build_network(transformer, control.scheme, control.initialisation, **control.scheme_options)
    if control.start_from:
        start_from(network, Path(control.start_from), num_classes, control.mask_code)
    return network


def start_from(network: ControlNetwork, path: Path, num_classes: int, mask_code: str) -> None:
    """Load the weights at ``path`` into ``network``: a generator's folder, or a file that holds the released code's names.

    Raises WeightsError, naming what differs: the scheme, the number of classes, the code of the masks, or names and shapes of weights.
    """
    if not path.is_dir():
        if not isinstance(network, MaskMMDiT) or network.config.scheme != RELEASED_SCHEME:
            raise WeightsError(
                f"start_from: {path} is a file, as the released code writes it; only scheme {RELEASED_SCHEME} can load those"
            )
        network.load_released(_read_file(path))
        return
    index, config = read_json(path / "model_index.json"), read_json(path / "transformer" / "config.json")
    for key, ours in (("num_classes", num_classes), ("mask_code", mask_code)):
        if index.get(key) != ours:
            raise WeightsError(f"start_from: {path} was trained with {key} {index.get(key)!r}, here it is {ours!r}")
    scheme = config.get("scheme", config["_class_name"])
    if scheme != network.config.get("scheme", type(network).__name__):
        raise WeightsError(f"start_from: {path} is of scheme {scheme}; set `scheme` to that, or leave start_from out")
    weights = load_network(path / "transformer").state_dict()
    found, needed = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, network.state_dict()))
    if faults := misfit(found, needed):
        raise WeightsError(f"start_from: the weights of {path} do not fit the base model: {faults}; use the one they were trained from")
    network.load_state_dict(weights)


def _read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a torch file of tensors alone."""
    name, remedy = f"start_from: {path}", "copy or fetch it again from whom you trust"
    if path.suffix != ".safetensors":
        return read_state_dict(path, name, remedy, mmap=True)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{name}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from None


def choose_trainable(network: ControlNetwork, control: Control) -> list[str]:
    """Freeze all of ``network`` but what ``control`` trains and return the names of the parameters that train, in order.

    A branch of ``control.lora`` gets low-rank updates on each of its linear layers, and nothing else of it trains. Under
    ``precision: bf16`` the frozen linear and convolution weights are stored in bfloat16, which is what autocast would make of them at
    every use; weights that train stay float32.
    """
    branches = network.branch_parameters()
    low_rank = control.lora.branches if control.lora else []
    if control.lora:
        members = {name for branch in low_rank for name, _ in branches[branch]}
        layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in members]
        _add_low_rank(network, layers, control.lora)
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


def _add_low_rank(network: nn.Module, layers: list[str], lora: LoRA) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("controls: lora needs the package peft (pip install peft)") from None
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layers)  # type: ignore[arg-type]  # alpha may be a fraction
    inject_adapter_in_model(config, network)


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


def finished_pipeline(base: Path, control: Control, num_classes: int, trained: dict[str, Tensor]) -> MaskToImagePipeline:
    """The pipeline, without text encoders, of a training that ends with these ``trained`` weights (by names of :func:`choose_trainable`).

    Low-rank updates are added in. The weights that did not train are those of the base model, to the bit, whatever type they had in
    training.
    """
    network = initial_network(base, control, num_classes)
    names = choose_trainable(network, control.model_copy(update={"precision": "no"}))
    if set(names) != set(trained):
        raise WeightsError(f"the checkpoint holds other weights than scheme {control.scheme} trains; delete it and train again")
    network.load_state_dict(trained, strict=False)
    if control.lora:
        merge_low_rank(network)
    return MaskToImagePipeline(
        transformer=network.requires_grad_(False),
        scheduler=load_scheduler(base),
        vae=AutoencoderKL.from_pretrained(base, subfolder="vae"),
        num_classes=num_classes,
        mask_code=control.mask_code,
        caption_dropout=control.caption_dropout,
        knows_missing_masks=control.knows_missing_masks,
    )
