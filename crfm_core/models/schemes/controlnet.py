"""A ControlNet over SD3.5: diffusers' control network, whose condition is the mask's latent."""

from __future__ import annotations

from typing import ClassVar

from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from crfm_core import ConfigError
from crfm_core.models.network import ControlNetwork, check_mask_init
from crfm_core.models.sd3_names import SD3_SETTINGS, branch_of, check_sd3_names, sd3_name, sd3_transformer


class ControlNetMMDiT(ControlNetwork, ModelMixin, ConfigMixin):
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

    _no_split_modules: ClassVar[list[str]] = ["JointTransformerBlock"]

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
        self.freeze_idle()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        mask_latents: Tensor | None = None,
        return_dict: bool = True,
        mask_present: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of noisy latents; arguments and result as of :meth:`crfm_core.models.mmdit.MaskMMDiT.forward`."""
        self.check_shapes(hidden_states, mask_latents, mask_present)
        shared = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections, "timestep": timestep}
        residuals = None
        if mask_latents is not None:
            tokens = self.base.pos_embed(hidden_states)
            (residuals,) = self.controlnet(tokens, controlnet_cond=mask_latents, return_dict=False, **shared)
            if mask_present is not None:
                residuals = [residual * mask_present[:, None, None] for residual in residuals]
        return self.base(hidden_states, block_controlnet_hidden_states=residuals, return_dict=return_dict, **shared)

    def repeated_blocks(self) -> list[nn.Module]:
        return [*self.base.transformer_blocks, *self.controlnet.transformer_blocks]

    def idle_parameters(self) -> list[nn.Parameter]:
        # text queries of the base's last block, and the text's way out of the control network's
        last, control = self.base.transformer_blocks[-1].attn, self.controlnet.transformer_blocks[-1]
        idle = [last.add_q_proj, last.norm_added_q, control.attn.add_q_proj, control.attn.norm_added_q, control.attn.to_add_out]
        return [parameter for module in (*idle, control.ff_context) if module for parameter in module.parameters()]

    @staticmethod
    def branch_of(name: str) -> str:
        # the control network is "mask"; the base is divided into "image" and "text" as that of MaskMMDiT
        part, _, inner = name.partition(".")
        return "mask" if part == "controlnet" else branch_of(sd3_name(inner))

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
        return sd3_transformer(self.config, self.base.state_dict().__getitem__)


NETWORK = ControlNetMMDiT
