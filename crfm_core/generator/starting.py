"""Weights that training starts from: another generator of this package, or a checkpoint of the authors' released code."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crfm_core import WeightsError
from crfm_core.checkpoints import read_state_dict
from crfm_core.files import read_json
from crfm_core.models.controls import load_network
from crfm_core.models.mmdit import MaskMMDiT


def start_from(network: nn.Module, path: Path, num_classes: int, mask_code: str) -> None:
    """Load the weights at ``path`` into ``network``: a generator's folder, or a file that holds the released code's names.

    Raises WeightsError, naming what differs: the scheme, the number of classes, the code of the masks, or names and shapes of weights.
    """
    if not path.is_dir():
        if not isinstance(network, MaskMMDiT) or network.config.scheme != "triattention":
            raise WeightsError(f"start_from: {path} is a file, as the released code writes it; only scheme triattention can load those")
        network.load_released(_read_file(path))
        return
    index, config = read_json(path / "model_index.json"), read_json(path / "transformer" / "config.json")
    for key, ours in (("num_classes", num_classes), ("mask_code", mask_code)):
        if index.get(key) != ours:
            raise WeightsError(f"start_from: {path} was trained with {key} {index.get(key)!r}, here it is {ours!r}")
    scheme = config.get("scheme", config["_class_name"])
    if scheme != network.config.get("scheme", type(network).__name__):
        raise WeightsError(f"start_from: {path} is of scheme {scheme}; set `scheme` to that, or leave start_from out")
    weights, own = load_network(path / "transformer").state_dict(), network.state_dict()
    differing = [
        f"{name}: {tuple(weights[name].shape) if name in weights else 'missing'} instead of {tuple(own[name].shape)}"
        for name in own
        if name not in weights or weights[name].shape != own[name].shape
    ]
    differing += [f"{name}: unknown" for name in weights if name not in own]
    if differing:
        raise WeightsError(
            f"start_from: the weights of {path} do not fit the base model ({len(differing)} differ): {'; '.join(differing[:5])}; "
            "use the base model they were trained from"
        )
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
