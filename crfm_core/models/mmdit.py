"""Stable Diffusion 3.5's transformer with mask tokens beside the image and text tokens of every block.

How the mask's tokens meet the others is the control scheme: its block, see :mod:`crfm_core.models.schemes`. Shapes: B samples,
C latent channels, HxW latent, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F

from crfm_core import ConfigError, WeightsError
from crfm_core.models.blocks import Modulation, Stream, layer_norm, modulate
from crfm_core.models.network import ControlNetwork, check_mask_init
from crfm_core.models.schemes import scheme_module
from crfm_core.models.sd3_names import (
    RELEASED_SCHEME,
    SD3_SETTINGS,
    branch_of,
    check_sd3_names,
    misfit,
    released_key,
    released_name,
    sd3_name,
    sd3_transformer,
)


class Prepared(NamedTuple):
    """What of a :class:`MaskMMDiT`'s velocities does not depend on the noisy latents, as :meth:`MaskMMDiT.prepare` gives it."""

    mask_latents: Tensor | None
    text: Tensor  # tokens, [B, T, D]
    mask: Tensor | None  # tokens, [B, T, D]
    streams: list[Stream]  # each block's keys and values of the mask, where the blocks do not change its tokens
    vectors: list[list[Tensor]]  # each block's AdaLN vectors, [N, B, vectors x D] for each branch
    out: Tensor  # the output's, [N, B, 2 D]


class MaskMMDiT(ControlNetwork, ModelMixin, ConfigMixin):
    """A velocity network v(z, σ, text, mask): SD3.5's MM-DiT with mask tokens; without a mask it is plain SD3.5.

    Arguments are those of diffusers' ``SD3Transformer2DModel``, and

    - ``scheme``: how the mask's tokens meet the others, a module of :mod:`crfm_core.models.schemes` with a ``BLOCK``;
    - ``mask_mlp_modulation``: whether the mask's MLP is modulated by its "own" vectors (the paper) or by those of the
      "image" branch (the released code); blocks without such an MLP ignore it.

    At SD3.5-medium's size the base's 2.243 B parameters are joined by 1.020 B of the mask with triattention and siamese
    (3.263 B together) and by 0.170 B with adapter (2.413 B together). 26 M of the former and 2 M of the latter, in the last
    block, cannot affect the output and are frozen (see
    :class:`crfm_core.models.blocks.JointBlock`).
    """

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
        mask_mlp_modulation: str = "own",
        scheme: str = "triattention",
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        block = getattr(scheme_module(scheme), "BLOCK", None)
        if block is None:
            raise ConfigError(f"scheme={scheme!r}: has a network of its own; make it by crfm_core.models.controls.build_network")
        if mask_mlp_modulation not in ("own", "image"):
            raise ConfigError(f"mask_mlp_modulation={mask_mlp_modulation!r}: must be 'own' or 'image'")
        if qk_norm not in (None, "rms_norm"):
            raise ConfigError(f"qk_norm={qk_norm!r}: must be 'rms_norm' or None")
        if caption_projection_dim != dim:
            raise ConfigError(f"caption_projection_dim={caption_projection_dim} must equal the width, heads x head size = {dim}")

        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, embed_dim=dim, pos_embed_max_size=pos_embed_max_size)
        self.mask_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self._no_split_modules = [block.__name__]  # what FSDP shares out one by one
        self._changes_mask = block.changes_mask
        self.blocks: Any = nn.ModuleList(
            block(dim, num_attention_heads, qk_norm, index in dual_attention_layers, index == num_layers - 1, mask_mlp_modulation)
            for index in range(num_layers)
        )
        self.norm_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self.gradient_checkpointing = False
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
        """The velocity of noisy latents.

        Args:
            hidden_states: noisy latents z, [B, C, H, W].
            encoder_hidden_states: prompt embeddings, [B, T, joint_attention_dim].
            pooled_projections: pooled prompt embeddings, [B, pooled_projection_dim].
            timestep: 1000 σ, [B].
            mask_latents: normalised latents of the encoded masks, without noise, [B, C, H, W]; None: no sample has a mask.
            mask_present: which samples have one, truth values [B]; None: all. The others get what they would get without
                ``mask_latents``, and add nothing to the gradient of the mask's weights; unlike those, such a call uses all weights.

        Returns: ``sample`` [B, C, H, W], the velocity ε - x₀.
        Raises: ValueError when the latents or the mask have another shape than the model takes.
        """
        self.check_shapes(hidden_states, mask_latents, mask_present)
        conditioning = self._conditioning(timestep, pooled_projections)
        text, mask = self.context_embedder(encoder_hidden_states), self._mask_tokens(mask_latents)
        # The blocks make their vectors themselves: only within them do checkpointing and FSDP reach the AdaLN maps.
        vectors = [conditioning] * len(self.blocks)
        velocity = self._velocity(hidden_states, text, mask, [], vectors, self.norm_out(conditioning), mask_present)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @apply_forward_hook
    def prepare(
        self, encoder_hidden_states: Tensor, pooled_projections: Tensor, timesteps: Tensor, mask_latents: Tensor | None = None
    ) -> Prepared:
        """What is the same for all noisy latents, computed once for the N steps of a sampling; :meth:`velocity` takes it.

        A third of the weights are AdaLN maps: each is read here once, not N times. Their vectors are kept: at SD3.5-medium's size with
        triattention 469 of 1536 numbers, 1.4 MB in bfloat16, for each step and sample, that is 33 MB for a sample of 23 steps and
        0.5 GB for 16 samples; prepare larger batches in parts. With adapter each block's keys and values of the mask are kept
        too, 151 MB for a sample of 512x512.

        Args:
            timesteps: 1000 σ of each step, [N]. The other arguments are those of :meth:`forward`.
        """
        steps, samples = len(timesteps), len(pooled_projections)
        each = self._conditioning(timesteps.repeat_interleave(samples), pooled_projections.repeat(steps, 1))
        conditioning = each.unflatten(0, (steps, samples))
        mask = self._mask_tokens(mask_latents)
        return Prepared(
            mask_latents,
            self.context_embedder(encoder_hidden_states),
            mask,
            [] if self._changes_mask or mask is None else [block.mask_stream(mask) for block in self.blocks],
            [block.vectors(conditioning, mask is not None) for block in self.blocks],
            self.norm_out(conditioning),
        )

    @apply_forward_hook
    def velocity(self, hidden_states: Tensor, prepared: Prepared, step: int) -> Tensor:
        """The velocity [B, C, H, W] of noisy latents [B, C, H, W] at a step, 0 ... N - 1, of those that were prepared."""
        self.check_shapes(hidden_states, prepared.mask_latents)
        vectors = [[branch[step] for branch in block] for block in prepared.vectors]
        return self._velocity(hidden_states, prepared.text, prepared.mask, prepared.streams, vectors, prepared.out[step])

    def _conditioning(self, timestep: Tensor, pooled_projections: Tensor) -> Tensor:
        return F.silu(self.time_text_embed(timestep, pooled_projections))

    def _velocity(
        self,
        hidden_states: Tensor,
        text: Tensor,
        mask: Tensor | Stream | None,
        streams: list[Stream],
        conditioning: Sequence[Tensor | list[Tensor]],
        out: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        image = self.pos_embed(hidden_states)
        for index, block in enumerate(self.blocks):
            mask = streams[index] if streams else mask
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text, mask = self._gradient_checkpointing_func(block, image, text, mask, conditioning[index], present)
            else:
                image, text, mask = block(image, text, mask, conditioning[index], present)
        scale, shift = out[:, None].chunk(2, dim=-1)
        return self._unpatch(self.proj_out(modulate(layer_norm(image), Modulation(shift, scale))), *hidden_states.shape[-2:])

    def _mask_tokens(self, mask_latents: Tensor | None) -> Tensor | None:
        if mask_latents is None:
            return None
        patches = self.mask_embed(mask_latents).flatten(2).transpose(1, 2)
        # The same positions: mask token (i, j) lies on image token (i, j).
        tokens = (patches + self.pos_embed.cropped_pos_embed(*mask_latents.shape[-2:])).to(patches.dtype)
        return tokens if self._changes_mask else layer_norm(tokens)  # then once for all blocks

    def _unpatch(self, tokens: Tensor, height: int, width: int) -> Tensor:
        patch = self.config.patch_size
        grid = tokens.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b h w p q c -> b c (h p) (w q)

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def idle_parameters(self) -> list[nn.Parameter]:
        return [parameter for block in self.blocks for module in block.idle_modules() for parameter in module.parameters()]

    branch_of = staticmethod(branch_of)

    @classmethod
    def from_sd3(
        cls,
        transformer: SD3Transformer2DModel,
        mask_mlp_modulation: str = "own",
        mask_init: str = "random",
        scheme: str = "triattention",
    ) -> MaskMMDiT:
        """A model whose image and text weights are copies of a diffusers ``SD3Transformer2DModel``'s, in its dtype and place.

        ``mask_init``: "random" draws the mask's weights from torch's global generator, AdaLN included (as released);
        "copy" starts them as copies of the image branch's (the ControlNet way). A scheme's own output maps may start at zero
        either way. Without a mask the result is the same network.
        Raises WeightsError when the transformer has weights this model has no place for.
        """
        check_mask_init(mask_init)
        settings = {name: transformer.config[name] for name in SD3_SETTINGS}
        model = cls(**settings, mask_mlp_modulation=mask_mlp_modulation, scheme=scheme)
        nn.Module.to(model, transformer.device, transformer.dtype)  # diffusers' own ``to`` warns of casts that lose nothing here
        weights = {sd3_name(key): value for key, value in transformer.state_dict().items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        check_sd3_names([name for name in missing if branch_of(name) != "mask"], unexpected)
        if mask_init == "copy":
            with torch.no_grad():
                model.mask_embed.load_state_dict(model.pos_embed.proj.state_dict())
                for block in model.blocks:
                    block.copy_image_to_mask()
        return model

    def to_sd3(self) -> SD3Transformer2DModel:
        own = self.state_dict()
        return sd3_transformer(self.config, lambda key: own[sd3_name(key)])

    def load_released(self, state_dict: dict[str, Tensor]) -> None:
        """Load a checkpoint of the authors' released code over this model, by that code's names.

        Such checkpoints hold trained tensors only: text-branch keys (and the position tables, which are not learned) may be
        missing and are then kept as they are. Raises WeightsError, with the model unchanged, when any other key is missing,
        unknown or of another shape, or when a position table is that of another ``sample_size``.
        """
        if self.config.scheme != RELEASED_SCHEME:
            raise WeightsError(f"a released checkpoint is for the scheme {RELEASED_SCHEME}; this network is of {self.config.scheme}")
        own = self.state_dict()
        weights: dict[str, Tensor] = {}
        for key, value in state_dict.items():
            name = released_name(key)
            if name == "pos_embed.pos_embed":
                self._check_table(key, value)
            else:
                weights[name if name and name in own else key] = value
        found = {released_key(name) if name in own else name: value.shape for name, value in weights.items()}
        optional = {"pos_embed.pos_embed", *(name for name in own if branch_of(name) == "text")} - weights.keys()
        if faults := misfit(found, {released_key(name): value.shape for name, value in own.items() if name not in optional}):
            raise WeightsError(f"the checkpoint does not fit this model: {faults}; use the base model and settings it was trained with")
        self.load_state_dict(weights, strict=False)

    def _check_table(self, key: str, table: Tensor) -> None:
        own = self.pos_embed.pos_embed
        # A hundredth passes a table that was stored in bfloat16 and catches one of another size.
        if table.shape != own.shape or not torch.allclose(table.to(own), own, rtol=0, atol=1e-2):
            raise WeightsError(f"{key} is not this model's position table: sample_size or pos_embed_max_size differ")
