"""The networks of the control schemes: which there are, how one is made from a base model, how one is loaded.

"triattention", "siamese" and "adapter" are :class:`crfm_core.models.mmdit.MaskMMDiT`; "controlnet" is here. All take the same
arguments, have the same methods and are, without a mask, plain SD3.5. Shapes: B samples, C latent channels, HxW latent.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from crfm_core import ConfigError, WeightsError
from crfm_core.files import read_json
from crfm_core.models.mmdit import (
    BLOCKS,
    SD3_SETTINGS,
    MaskMMDiT,
    by_branch,
    check_mask_init,
    check_sd3_names,
    check_shapes,
    sd3_branch,
    sd3_transformer,
    some,
)


class Inputs(NamedTuple):
    """What of a :class:`ControlNetMMDiT`'s inputs does not depend on the noisy latents."""

    encoder_hidden_states: Tensor
    pooled_projections: Tensor
    timesteps: Tensor
    mask_latents: Tensor | None


class ControlNetMMDiT(ModelMixin, ConfigMixin):
    """A velocity network v(z, σ, text, mask): SD3.5 and diffusers' control network for it, whose condition is the mask's latent.

    The control network repeats the base's first blocks; after each of them a map that starts at zero gives what is added to
    the image tokens of the base's blocks, spread evenly over all but the last, which takes nothing. So at the start the
    network is the base. As with SD3.5's published control networks, its image tokens are the base's: it has no patch map
    and position table of its own (at full size that table alone is 0.9 GB). Unlike diffusers' pipelines for SD3, it reads the
    pooled prompt as the base does. The paper leaves size and start open: half of the base's blocks, and weights copied from
    them, are what ControlNet and its followers take.

    Arguments are those of diffusers' ``SD3Transformer2DModel``, and ``controlnet_layers``, by default and at most half of
    ``num_layers``: of more, diffusers' even spreading leaves the last ones without a block to act on.

    At SD3.5-medium's size the base's 2.243 B parameters are joined by 1.261 B of the control network (3.504 B together).
    26 M of them cannot affect the output and are frozen.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["JointTransformerBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1536,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 384,
        dual_attention_layers: tuple[int, ...] = tuple(range(13)),
        qk_norm: str | None = "rms_norm",
        controlnet_layers: int | None = None,
    ) -> None:
        super().__init__()
        layers = num_layers // 2 if controlnet_layers is None else controlnet_layers
        if not 1 <= layers <= num_layers // 2:
            raise ConfigError(f"controlnet_layers={layers}: must be 1 ... {num_layers // 2}, half of the base's {num_layers} blocks")
        self.register_to_config(controlnet_layers=layers)
        sizes = {name: self.config[name] for name in SD3_SETTINGS}
        self.base = SD3Transformer2DModel(**sizes)
        own = {"num_layers": layers, "use_pos_embed": False, "force_zeros_for_pooled_projection": False}
        self.controlnet = SD3ControlNetModel(**(sizes | own))
        for parameter in self._idle_parameters():
            parameter.requires_grad_(False)  # trainable parameters without gradients are an error under DDP

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        mask_latents: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of noisy latents; arguments and result as of :meth:`MaskMMDiT.forward`."""
        check_shapes(self.config, hidden_states, mask_latents)
        shared = {
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
        }
        residuals = None
        if mask_latents is not None:
            tokens = self.base.pos_embed(hidden_states)
            (residuals,) = self.controlnet(tokens, controlnet_cond=mask_latents, return_dict=False, **shared)
        return self.base(hidden_states, block_controlnet_hidden_states=residuals, return_dict=return_dict, **shared)

    def prepare(
        self, encoder_hidden_states: Tensor, pooled_projections: Tensor, timesteps: Tensor, mask_latents: Tensor | None = None
    ) -> Inputs:
        """The inputs of N steps of sampling, for :meth:`velocity`; arguments as of :meth:`MaskMMDiT.prepare`. Nothing is computed ahead:
        diffusers' networks, which this one is made of, take nothing computed."""
        return Inputs(encoder_hidden_states, pooled_projections, timesteps, mask_latents)

    def velocity(self, hidden_states: Tensor, prepared: Inputs, step: int) -> Tensor:
        """The velocity [B, C, H, W] of noisy latents [B, C, H, W] at a step, 0 ... N - 1, of those that were prepared."""
        text, pooled, timesteps, mask = prepared
        return self(hidden_states, text, pooled, timesteps[step].expand(len(hidden_states)), mask).sample

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that the network is made of, the base's first."""
        return [*self.base.transformer_blocks, *self.controlnet.transformer_blocks]

    def _idle_parameters(self) -> list[nn.Parameter]:
        """What nothing reads: text queries of the base's last block, and the text's way out of the control network's."""
        last, control = self.base.transformer_blocks[-1].attn, self.controlnet.transformer_blocks[-1]
        idle = [last.add_q_proj, last.norm_added_q, control.attn.add_q_proj, control.attn.norm_added_q, control.attn.to_add_out]
        return [parameter for module in (*idle, control.ff_context) if module for parameter in module.parameters()]

    def branch_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters without those that cannot affect the output: "mask" is the control network, "image" and "text" are
        the base's, divided as those of :class:`MaskMMDiT`."""
        return by_branch(self.named_parameters(), self._idle_parameters(), _branch_of)

    @classmethod
    def from_sd3(cls, transformer: SD3Transformer2DModel, mask_init: str = "copy", controlnet_layers: int | None = None) -> ControlNetMMDiT:
        """A network whose base is a copy of a diffusers ``SD3Transformer2DModel``, in its dtype and place.

        ``mask_init``: "copy" starts the control network's blocks and embedders as copies of the base's, "random" draws them from
        torch's global generator; the maps into and out of it start at zero either way.
        Raises WeightsError when the transformer has weights this model has no place for.
        """
        check_mask_init(mask_init)
        model = cls(**{name: transformer.config[name] for name in SD3_SETTINGS}, controlnet_layers=controlnet_layers)
        nn.Module.to(model, transformer.device, transformer.dtype)  # diffusers' own ``to`` warns of casts that lose nothing here
        check_sd3_names(*model.base.load_state_dict(transformer.state_dict(), strict=False))
        if mask_init == "copy":  # not diffusers' ``from_transformer``, which writes into the base's configuration
            for name in ("time_text_embed", "context_embedder"):
                model.controlnet.get_submodule(name).load_state_dict(transformer.get_submodule(name).state_dict())
            for own, theirs in zip(model.controlnet.transformer_blocks, transformer.transformer_blocks, strict=False):
                own.load_state_dict(theirs.state_dict())
        return model

    def to_sd3(self) -> SD3Transformer2DModel:
        """The base, which is the network without a mask, with copies of the weights."""
        return sd3_transformer(self.config, self.base.state_dict().__getitem__)


def _branch_of(name: str) -> str:
    part, _, inner = name.partition(".")
    return "mask" if part == "controlnet" else sd3_branch(inner)


Network = MaskMMDiT | ControlNetMMDiT


def build_network(
    transformer: SD3Transformer2DModel,
    scheme: str,
    mask_init: str,
    mask_mlp_modulation: str = "own",
    controlnet_layers: int | None = None,
) -> Network:
    """The network of a control scheme over a base model's transformer, in its dtype and place.

    Args:
        scheme: "triattention", "siamese", "adapter" or "controlnet".
        mask_init: "random" (drawn from torch's global generator) or "copy" (of the base's weights).
        mask_mlp_modulation: "own" or "image"; only triattention and siamese have what it speaks of.
        controlnet_layers: blocks of the control network; None takes half of the base's.

    Raises: ConfigError for a setting that is not known; WeightsError for a transformer that is not SD3.5's.
    """
    if scheme == "controlnet":
        return ControlNetMMDiT.from_sd3(transformer, mask_init, controlnet_layers)
    if scheme in BLOCKS:
        return MaskMMDiT.from_sd3(transformer, mask_mlp_modulation, mask_init, scheme)
    raise ConfigError(f"scheme={scheme!r}: must be one of {', '.join(BLOCKS)}, controlnet")


def load_network(folder: Path | str) -> Network:
    """The network that ``save_pretrained`` wrote to a folder.

    Raises: WeightsError when it holds another model, or weights that are damaged or do not fit its configuration.
    """
    name = read_json(Path(folder) / "config.json").get("_class_name")
    kinds = {kind.__name__: kind for kind in (MaskMMDiT, ControlNetMMDiT)}
    if name not in kinds:
        raise WeightsError(f"{folder}: holds a {name}, needs one of {', '.join(kinds)}; give the folder `transformer` of a generator")
    check_weights(folder, kinds[name])
    return kinds[name].from_pretrained(str(folder), local_files_only=True)


def check_weights(folder: Path | str, kind: type[ModelMixin]) -> None:
    """Compare the names and shapes of the weights in a folder with those its configuration asks for, without loading them.

    Raises: WeightsError naming the file that is damaged, or the weights that do not fit with both shapes (diffusers names the
    first of another shape only and takes missing ones for a remark).
    """
    found = {}
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
    reshaped = [f"{name} {found[name]} instead of {needed[name]}" for name in needed.keys() & found.keys() if found[name] != needed[name]]
    faults = {"of another shape": reshaped, "missing": [*needed.keys() - found.keys()], "unexpected": [*found.keys() - needed.keys()]}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
        raise WeightsError(f"{folder}: the weights are not those of its config.json: {listed}; take both from the same model")
