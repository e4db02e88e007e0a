"""The networks of the control schemes: how one is made from a base model, and how one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open

from crfm_core import WeightsError
from crfm_core.files import read_json
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.models.network import ControlNetwork
from crfm_core.models.schemes import scheme_module, scheme_names
from crfm_core.models.schemes.controlnet import ControlNetMMDiT  # noqa: F401 - pipeline folders saved before name it as of this module
from crfm_core.models.sd3_names import misfit


def build_network(transformer: SD3Transformer2DModel, scheme: str, mask_init: str, **options: Any) -> ControlNetwork:
    """The network of a control scheme over a base model's transformer, in its dtype and place.

    Args:
        scheme: the name of a module of :mod:`crfm_core.models.schemes`.
        mask_init: "random" (drawn from torch's global generator) or "copy" (of the base's weights).
        options: those of the scheme, such as ``mask_mlp_modulation`` and ``controlnet_layers``.

    Raises: ConfigError for a setting that is not known; WeightsError for a transformer that is not SD3.5's.
    """
    module = scheme_module(scheme)
    if hasattr(module, "NETWORK"):
        return module.NETWORK.from_sd3(transformer, mask_init=mask_init, **options)
    return MaskMMDiT.from_sd3(transformer, mask_init=mask_init, scheme=scheme, **options)


def network_classes() -> dict[str, type[ControlNetwork]]:
    """The classes of all schemes' networks by name, and with them their modules imported."""
    own = [module.NETWORK for module in map(scheme_module, scheme_names()) if hasattr(module, "NETWORK")]
    return {kind.__name__: kind for kind in (MaskMMDiT, *own)}


def load_network(folder: Path | str) -> ControlNetwork:
    """The network that ``save_pretrained`` wrote to a folder.

    Raises: WeightsError when it holds another model, or weights that are damaged or do not fit its configuration.
    """
    name, kinds = read_json(Path(folder) / "config.json").get("_class_name"), network_classes()
    if name not in kinds:
        raise WeightsError(f"{folder}: holds a {name}, needs one of {', '.join(kinds)}; give the folder `transformer` of a generator")
    check_weights(folder, kinds[name])
    return kinds[name].from_pretrained(str(folder), local_files_only=True)


def check_weights(folder: Path | str, kind: type[ModelMixin]) -> None:
    """Compare the names and shapes of the weights in a folder with those its configuration asks for, without loading them.

    Raises: WeightsError naming the file that is damaged, or the weights that do not fit with both shapes (diffusers names the
    first of another shape only and takes missing ones for a remark).
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("diffusion_pytorch_model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise WeightsError(f"{file} is damaged or incomplete ({error}); copy or make it again") from None
    if not found:
        raise WeightsError(f"{folder}: holds no diffusion_pytorch_model*.safetensors; copy or make it again")
    with torch.device("meta"):
        needed = {name: tuple(weight.shape) for name, weight in kind.from_config(kind.load_config(folder)).state_dict().items()}
    if faults := misfit(found, needed):
        raise WeightsError(f"{folder}: the weights are not those of its config.json: {faults}; take both from the same model")
