"""Names of weights: diffusers' SD3 transformer, the authors' released code, and this package's networks, in terms of each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from crfm_core import WeightsError

#: The control scheme of the authors' released checkpoints.
RELEASED_SCHEME = "triattention"
#: What makes a diffusers ``SD3Transformer2DModel``; every network's config has these names.
SD3_SETTINGS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size", "dual_attention_layers", "qk_norm",
)  # fmt: skip


def sd3_transformer(config: Mapping[str, Any], weight: Callable[[str], Tensor]) -> SD3Transformer2DModel:
    """A transformer of the sizes in ``config`` that holds a copy of ``weight(name)`` for each of its weights' names."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**{name: config[name] for name in SD3_SETTINGS})
    transformer.load_state_dict({name: weight(name).clone() for name in transformer.state_dict()}, assign=True)
    return transformer


def check_sd3_names(missing: list[str], unexpected: list[str]) -> None:
    """Raise WeightsError when loading the weights of an SD3.5 transformer left some missing or unexpected."""
    if missing or unexpected:
        raise WeightsError(f"not the weights of an SD3.5 transformer: missing {_list_names(missing)}; unexpected {_list_names(unexpected)}")


def _nest(theirs: str, ours: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{theirs}.{their}": f"{ours}.{our}" for their, our in names.items()}


# Names of modules inside a block: theirs -> ours.
_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out", "norm_q": "norm_q", "norm_k": "norm_k"}
_ADDED = {
    "add_q_proj": "to_q", "add_k_proj": "to_k", "add_v_proj": "to_v", "to_add_out": "to_out",
    "norm_added_q": "norm_q", "norm_added_k": "norm_k",
}  # fmt: skip
_FEED_FORWARD = {"net.0.proj": "0", "net.2": "2"}
_SD3_BLOCK = {
    "norm1.linear": "image.modulation",
    **_nest("attn", "image.attention", _ATTENTION),
    **_nest("attn2", "image.second_attention", _ATTENTION),
    **_nest("ff", "image.feed_forward", _FEED_FORWARD),
    "norm1_context.linear": "text.modulation",
    **_nest("attn", "text.attention", _ADDED),
    **_nest("ff_context", "text.feed_forward", _FEED_FORWARD),
}
_RELEASED_BLOCK = {
    "norm1.linear": "mask.modulation",
    **_nest("attn", "mask.attention", _ATTENTION),
    **_nest("ff", "mask.feed_forward", _FEED_FORWARD),
    # The released block wraps SD3's, but holds its two attentions beside it.
    **{
        name.replace("attn.", "attn.sd3_attn.") if name.startswith("attn") else f"sd3_block.{name}": ours
        for name, ours in _SD3_BLOCK.items()
    },
}
# Outside the blocks SD3's names are ours, but for this one, whose LayerNorm has no weights.
_NORM_OUT = {"norm_out.linear": "norm_out"}


def _block_name(key: str, blocks: str, names: dict[str, str]) -> str | None:
    """Our name of a weight in a block of another model, None for any other key."""
    found = re.fullmatch(rf"{blocks}\.(\d+)\.(.+)\.(\w+)", key)
    return f"blocks.{found[1]}.{names[found[2]]}.{found[3]}" if found and found[2] in names else None


def sd3_name(key: str) -> str:
    """Our name of a weight of a diffusers ``SD3Transformer2DModel``."""
    module, _, parameter = key.rpartition(".")
    return _block_name(key, "transformer_blocks", _SD3_BLOCK) or f"{_NORM_OUT.get(module, module)}.{parameter}"


def released_name(key: str) -> str | None:
    """Our name of a weight of the released code, None for one it does not have."""
    if key.startswith("msk_pos_embed."):
        return key.replace("msk_pos_embed.proj", "mask_embed").replace("msk_pos_embed.", "pos_embed.")
    if key.startswith("sd3_transformer."):
        return sd3_name(key.removeprefix("sd3_transformer."))
    return _block_name(key, "mmdit_blocks", _RELEASED_BLOCK)


def released_key(name: str) -> str:
    """The released code's name of one of our weights."""
    module, _, parameter = name.rpartition(".")
    if module == "mask_embed":
        return f"msk_pos_embed.proj.{parameter}"
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        theirs = next(their for their, our in _RELEASED_BLOCK.items() if our == found[2])
        return f"mmdit_blocks.{found[1]}.{theirs}.{parameter}"
    return f"sd3_transformer.{'norm_out.linear' if module == 'norm_out' else module}.{parameter}"


def branch_of(name: str) -> str:
    """The branch, "image", "mask" or "text", of one of our weights."""
    if found := re.match(r"blocks\.\d+\.(image|mask|text)\.", name):
        return found[1]
    if name.startswith("mask_embed."):
        return "mask"
    return "text" if name.startswith(("context_embedder.", "time_text_embed.")) else "image"


def misfit(found: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> str:
    """What keeps weights with the shapes ``found`` from being those ``needed``, for a message; "" when they fit."""
    reshaped = [
        f"{name} {tuple(found[name])} instead of {tuple(needed[name])}" for name in needed if name in found and found[name] != needed[name]
    ]
    faults = {"of another shape": reshaped, "missing": needed.keys() - found.keys(), "unexpected": found.keys() - needed.keys()}
    return "; ".join(f"{fault}: {_list_names(names)}" for fault, names in faults.items() if names)


def _list_names(keys: Collection[str], most: int = 8) -> str:
    """Names for a message, cut where there are many."""
    shown = ", ".join(sorted(keys)[:most]) or "none"
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
