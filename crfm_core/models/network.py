"""What the networks of all control schemes have in common. Shapes: B samples, C latent channels, HxW latent."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from crfm_core import ConfigError


class ControlNetwork(ModelMixin, ConfigMixin):
    """A velocity network v(z, σ, text, mask) made from SD3.5's transformer, which it computes without a mask.

    A subclass also names ModelMixin and ConfigMixin as its bases: a pipeline folder says of which module its network is, and diffusers
    opens it only if ModelMixin is a name in there. Its config has diffusers' names for the sizes, those of
    :data:`crfm_core.models.sd3_names.SD3_SETTINGS`. It calls :meth:`freeze_idle` at the end of its constructor, has the ``forward`` of
    :class:`crfm_core.models.mmdit.MaskMMDiT`, a class method ``from_sd3(transformer, mask_init=..., **options)``, and what raises
    NotImplementedError here.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm"]

    def prepare(
        self, encoder_hidden_states: Tensor, pooled_projections: Tensor, timesteps: Tensor, mask_latents: Tensor | None = None
    ) -> Any:
        """What is the same for all noisy latents, for the N steps of a sampling; :meth:`velocity` takes it.

        Here nothing is computed ahead. A network that can save work by it overrides both methods.

        Args:
            timesteps: 1000 σ of each step, [N]. The other arguments are those of ``forward``.
        """
        return encoder_hidden_states, pooled_projections, timesteps, mask_latents

    def velocity(self, hidden_states: Tensor, prepared: Any, step: int) -> Tensor:
        """The velocity [B, C, H, W] of noisy latents [B, C, H, W] at a step, 0 ... N - 1, of those that were prepared."""
        text, pooled, timesteps, mask = prepared
        return self(hidden_states, text, pooled, timesteps[step].expand(len(hidden_states)), mask).sample

    def to_sd3(self) -> SD3Transformer2DModel:
        """The image and text part, which is the network without a mask, as diffusers' class with copies of the weights."""
        raise NotImplementedError

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that the network is made of, in their order."""
        raise NotImplementedError

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters that cannot change the output."""
        raise NotImplementedError

    @staticmethod
    def branch_of(name: str) -> str:
        """The branch, "image", "mask" or "text", that a parameter belongs to by its name."""
        raise NotImplementedError

    def branch_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of the branches "image", "mask" and "text", without those that cannot affect the output.

        "text" holds what fine-tuning leaves alone: the context, time and pooled embedders and the text branch of every block.
        """
        idle = {id(parameter) for parameter in self.idle_parameters()}
        branches: dict[str, list[tuple[str, nn.Parameter]]] = {"image": [], "mask": [], "text": []}
        for name, parameter in self.named_parameters():
            if id(parameter) not in idle:
                branches[self.branch_of(name)].append((name, parameter))
        return branches

    def freeze_idle(self) -> None:
        """Let no idle parameter train: under DDP a trainable parameter without a gradient is an error."""
        for parameter in self.idle_parameters():
            parameter.requires_grad_(False)

    def check_shapes(self, latents: Tensor, mask_latents: Tensor | None, mask_present: Tensor | None = None) -> None:
        """Raise ValueError, naming argument and shapes, for latents or masks that the network does not take."""
        config = self.config
        patch, largest = config.patch_size, config.pos_embed_max_size * config.patch_size
        shape = tuple(latents.shape)
        if len(shape) != 4 or shape[1] != config.in_channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(f"hidden_states has shape {shape}: needs [B, {config.in_channels}, H, W] with H and W divisible by {patch}")
        if max(shape[2:]) > largest:
            raise ValueError(f"hidden_states has shape {shape}: the position table ends at {largest}x{largest}")
        if mask_latents is not None and tuple(mask_latents.shape) != shape:
            raise ValueError(f"mask_latents has shape {tuple(mask_latents.shape)}, hidden_states {shape}: they must be equal")
        if mask_present is not None and (mask_latents is None or mask_present.dtype != torch.bool or mask_present.shape != shape[:1]):
            raise ValueError(
                f"mask_present has shape {tuple(mask_present.shape)} and type {mask_present.dtype}: needs truth values [{shape[0]}], and "
                "mask_latents beside it"
            )


def check_mask_init(mask_init: str) -> None:
    """Raise ConfigError for an unknown initialisation of the mask's weights."""
    if mask_init not in ("random", "copy"):
        raise ConfigError(f"mask_init={mask_init!r}: must be 'random' or 'copy'")
