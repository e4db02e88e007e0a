"""Stable Diffusion 3.5's transformer with a third branch: image, text and mask tokens attend to each other in every block.

Source: TODSynth (arXiv 2512.16740) for the mask branch; the image and text branches compute what diffusers'
``SD3Transformer2DModel`` computes. Shapes: B samples, C latent channels, HxW latent, T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from crfm_core import ConfigError, WeightsError

EPS = 1e-6


class Modulation(NamedTuple):
    """What the conditioning does to one sub-layer of one branch; each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def modulate(tokens: Tensor, by: Modulation) -> Tensor:
    """LayerNorm without weights, then the sample's own scale and shift."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=EPS) * (1 + by.scale) + by.shift


def attend(queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Full attention over the tokens of all branches, [B, heads, T, d] each; the answers [B, T, D] of those that ask."""
    joint = F.scaled_dot_product_attention(torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2))
    return joint.transpose(1, 2).flatten(2).split([query.shape[2] for query in queries], dim=1)


class Attention(nn.Module):
    """One branch's query, key, value and output maps, with RMSNorm of each head's queries and keys."""

    def __init__(self, dim: int, heads: int, qk_norm: str | None, answers: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, eps=EPS) if qk_norm else nn.Identity() for _ in range(2))
        if answers:
            self.to_out = nn.Linear(dim, dim)

    def query(self, tokens: Tensor) -> Tensor:
        return self.norm_q(self._split(self.to_q(tokens)))

    def key(self, tokens: Tensor) -> Tensor:
        return self.norm_k(self._split(self.to_k(tokens)))

    def value(self, tokens: Tensor) -> Tensor:
        return self._split(self.to_v(tokens))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Branch(nn.Module):
    """One branch's weights in one block. A branch that is only ``read`` gives keys and values but takes nothing back."""

    def __init__(self, dim: int, heads: int, qk_norm: str | None, read: bool = False, dual: bool = False) -> None:
        super().__init__()
        self.read, self.vectors = read, 2 if read else 9 if dual else 6
        self.modulation = nn.Linear(dim, self.vectors * dim)
        self.attention = Attention(dim, heads, qk_norm, answers=not read)
        if dual:
            self.second_attention = Attention(dim, heads, qk_norm)
        if not read:
            self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def modulations(self, conditioning: Tensor) -> list[Modulation]:
        """For the attention, the feed-forward and, where there is one, the second attention, in this order."""
        vectors = self.modulation(conditioning)[:, None].chunk(self.vectors, dim=-1)
        if self.read:
            scale, shift = vectors  # the one place where SD3.5 puts the scale first
            return [Modulation(shift, scale)]
        return [Modulation(*vectors[i : i + 3]) for i in range(0, self.vectors, 3)]


class TriAttentionBlock(nn.Module):
    """Three branches with their own weights, joined by one attention over [image; text; mask].

    The last block computes only the image: nothing reads its text and mask tokens. The mask's query, output and
    feed-forward maps and the text's query map exist there all the same, so that names and counts are those of SD3.5 and of
    released checkpoints, but they are frozen: trainable parameters without gradients are an error under DDP.
    """

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool, mask_mlp_modulation: str) -> None:
        super().__init__()
        self.dual, self.last, self.mask_mlp_modulation = dual, last, mask_mlp_modulation
        self.image = Branch(dim, heads, qk_norm, dual=dual)
        self.text = Branch(dim, heads, qk_norm, read=last)
        self.mask = Branch(dim, heads, qk_norm)
        for module in self.idle_modules():
            module.requires_grad_(False)

    def idle_modules(self) -> list[nn.Module]:
        """Modules whose weights cannot change the model's output."""
        if not self.last:
            return []
        text, mask = self.text.attention, self.mask.attention
        return [text.to_q, text.norm_q, mask.to_q, mask.norm_q, mask.to_out, self.mask.feed_forward]

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor | None, conditioning: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        image_attention, image_mlp, *image_second = self.image.modulations(conditioning)
        text_attention, *text_mlp = self.text.modulations(conditioning)
        streams = [
            (self.image.attention, modulate(image, image_attention)),
            (self.text.attention, modulate(text, text_attention)),
        ]
        if mask is not None:
            mask_attention, mask_mlp = self.mask.modulations(conditioning)
            streams.append((self.mask.attention, modulate(mask, mask_attention)))

        attended = attend(
            [own.query(tokens) for own, tokens in (streams[:1] if self.last else streams)],
            [own.key(tokens) for own, tokens in streams],
            [own.value(tokens) for own, tokens in streams],
        )

        block_input = image
        image = image + image_attention.gate * self.image.attention.to_out(attended[0])
        if self.dual:
            own, tokens = self.image.second_attention, modulate(block_input, image_second[0])
            (alone,) = attend([own.query(tokens)], [own.key(tokens)], [own.value(tokens)])
            image = image + image_second[0].gate * own.to_out(alone)
        image = image + image_mlp.gate * self.image.feed_forward(modulate(image, image_mlp))
        if self.last:
            return image, None, None

        text = text + text_attention.gate * self.text.attention.to_out(attended[1])
        text = text + text_mlp[0].gate * self.text.feed_forward(modulate(text, text_mlp[0]))

        if mask is not None:
            mask = mask + mask_attention.gate * self.mask.attention.to_out(attended[2])
            if self.mask_mlp_modulation == "image":  # as released; it leaves half of the mask's own vectors unused
                mask_mlp = image_mlp
            mask = mask + mask_mlp.gate * self.mask.feed_forward(modulate(mask, mask_mlp))
        return image, text, mask


class MaskMMDiT(ModelMixin, ConfigMixin):
    """A velocity network v(z, σ, text, mask): SD3.5's MM-DiT with a mask branch; without a mask it is plain SD3.5.

    Arguments are those of diffusers' ``SD3Transformer2DModel``, and ``mask_mlp_modulation``: whether the mask's MLP is
    modulated by its "own" vectors (the paper) or by those of the "image" branch (the released code).

    At SD3.5-medium's size it has 3.263 B parameters: 2.243 B of the base and 1.020 B of the mask branch. 26 M of them, in
    the last block, cannot affect the output and are frozen (see :class:`TriAttentionBlock`).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TriAttentionBlock"]
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
        mask_mlp_modulation: str = "own",
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
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
        self.blocks = nn.ModuleList(
            TriAttentionBlock(
                dim,
                num_attention_heads,
                qk_norm,
                dual=index in dual_attention_layers,
                last=index == num_layers - 1,
                mask_mlp_modulation=mask_mlp_modulation,
            )
            for index in range(num_layers)
        )
        self.norm_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        mask_latents: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of noisy latents.

        Args:
            hidden_states: noisy latents z, [B, C, H, W].
            encoder_hidden_states: prompt embeddings, [B, T, joint_attention_dim].
            pooled_projections: pooled prompt embeddings, [B, pooled_projection_dim].
            timestep: 1000 σ, [B].
            mask_latents: normalised latents of the encoded masks, without noise, [B, C, H, W].

        Returns: ``sample`` [B, C, H, W], the velocity ε - x₀.
        Raises: ValueError when the latents or the mask have another shape than the model takes.
        """
        self._check_shapes(hidden_states, mask_latents)
        height, width = hidden_states.shape[-2:]
        conditioning = F.silu(self.time_text_embed(timestep, pooled_projections))
        image = self.pos_embed(hidden_states)
        text = self.context_embedder(encoder_hidden_states)
        mask = None
        if mask_latents is not None:  # the same positions: mask token (i, j) lies on image token (i, j)
            patches = self.mask_embed(mask_latents).flatten(2).transpose(1, 2)
            mask = (patches + self.pos_embed.cropped_pos_embed(height, width)).to(patches.dtype)

        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text, mask = self._gradient_checkpointing_func(block, image, text, mask, conditioning)
            else:
                image, text, mask = block(image, text, mask, conditioning)

        scale, shift = self.norm_out(conditioning)[:, None].chunk(2, dim=-1)
        velocity = self._unpatch(self.proj_out(modulate(image, Modulation(shift, scale))), height, width)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _check_shapes(self, latents: Tensor, mask_latents: Tensor | None) -> None:
        patch, largest = self.config.patch_size, self.config.pos_embed_max_size * self.config.patch_size
        shape = tuple(latents.shape)
        if len(shape) != 4 or shape[1] != self.config.in_channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"hidden_states has shape {shape}: needs [B, {self.config.in_channels}, H, W] with H and W divisible by {patch}"
            )
        if max(shape[2:]) > largest:
            raise ValueError(f"hidden_states has shape {shape}: the position table ends at {largest}x{largest}")
        if mask_latents is not None and tuple(mask_latents.shape) != shape:
            raise ValueError(f"mask_latents has shape {tuple(mask_latents.shape)}, hidden_states {shape}: they must be equal")

    def _unpatch(self, tokens: Tensor, height: int, width: int) -> Tensor:
        patch = self.config.patch_size
        grid = tokens.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b h w p q c -> b c (h p) (w q)

    def branch_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of the branches "image", "mask" and "text", without those that cannot affect the output.

        "text" holds what fine-tuning leaves alone: the context, time and pooled embedders and the text branch of every block.
        """
        idle = {id(parameter) for block in self.blocks for module in block.idle_modules() for parameter in module.parameters()}
        branches: dict[str, list[tuple[str, nn.Parameter]]] = {"image": [], "mask": [], "text": []}
        for name, parameter in self.named_parameters():
            if id(parameter) not in idle:
                branches[_branch_of(name)].append((name, parameter))
        return branches

    @classmethod
    def from_sd3(cls, transformer: ModelMixin, mask_mlp_modulation: str = "own", mask_init: str = "random") -> MaskMMDiT:
        """A model whose image and text weights are copies of a diffusers ``SD3Transformer2DModel``'s, in its dtype and place.

        ``mask_init``: "random" draws the mask branch from torch's global generator, AdaLN included (as released);
        "copy" starts it as a copy of the image branch (the ControlNet way). Without a mask the result is the same network.
        Raises WeightsError when the transformer has weights this model has no place for.
        """
        if mask_init not in ("random", "copy"):
            raise ConfigError(f"mask_init={mask_init!r}: must be 'random' or 'copy'")
        model = cls(**{name: transformer.config[name] for name in _SD3_SETTINGS}, mask_mlp_modulation=mask_mlp_modulation)
        nn.Module.to(model, transformer.device, transformer.dtype)  # diffusers' own ``to`` warns of casts that lose nothing here
        weights = {_sd3_name(key): value for key, value in transformer.state_dict().items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if _branch_of(name) != "mask"]
        if missing or unexpected:
            raise WeightsError(f"not the weights of an SD3.5 transformer: missing {_some(missing)}; unexpected {_some(unexpected)}")
        if mask_init == "copy":
            model._copy_image_branch_to_mask()
        return model

    @torch.no_grad()
    def _copy_image_branch_to_mask(self) -> None:
        self.mask_embed.load_state_dict(self.pos_embed.proj.state_dict())
        for block in self.blocks:
            block.mask.attention.load_state_dict(block.image.attention.state_dict())
            block.mask.feed_forward.load_state_dict(block.image.feed_forward.state_dict())
            for ours, theirs in zip(block.mask.modulation.parameters(), block.image.modulation.parameters(), strict=True):
                ours.copy_(theirs[: len(ours)])  # a dual block's vectors for its second attention come last

    def load_released(self, state_dict: dict[str, Tensor]) -> None:
        """Load a checkpoint of the authors' released code over this model, by that code's names.

        Such checkpoints hold trained tensors only: text-branch keys (and the position tables, which are not learned) may be
        missing and are then kept as they are. Raises WeightsError, with the model unchanged, when any other key is missing,
        unknown or of another shape, or when a position table is that of another ``sample_size``.
        """
        own, weights, unexpected = self.state_dict(), {}, []
        for key, value in state_dict.items():
            name = _released_name(key)
            if name == "pos_embed.pos_embed":
                self._check_table(key, value)
            elif name in own:
                weights[name] = value
            else:
                unexpected.append(key)
        missing = [
            _released_key(name) for name in own if name not in weights and _branch_of(name) != "text" and name != "pos_embed.pos_embed"
        ]
        reshaped = [
            f"{_released_key(name)} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in weights.items()
            if value.shape != own[name].shape
        ]
        faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        if any(faults.values()):
            listed = "; ".join(f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys)
            raise WeightsError(f"the checkpoint does not fit this model: {listed}; use the base model and settings it was trained with")
        self.load_state_dict(weights, strict=False)

    def _check_table(self, key: str, table: Tensor) -> None:
        own = self.pos_embed.pos_embed
        # A hundredth passes a table that was stored in bfloat16 and catches one of another size.
        if table.shape != own.shape or not torch.allclose(table.to(own), own, rtol=0, atol=1e-2):
            raise WeightsError(f"{key} is not this model's position table: sample_size or pos_embed_max_size differ")


_SD3_SETTINGS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size", "dual_attention_layers", "qk_norm",
)  # fmt: skip


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


def _sd3_name(key: str) -> str:
    module, _, parameter = key.rpartition(".")
    return _block_name(key, "transformer_blocks", _SD3_BLOCK) or f"{_NORM_OUT.get(module, module)}.{parameter}"


def _released_name(key: str) -> str | None:
    if key.startswith("msk_pos_embed."):
        return key.replace("msk_pos_embed.proj", "mask_embed").replace("msk_pos_embed.", "pos_embed.")
    if key.startswith("sd3_transformer."):
        return _sd3_name(key.removeprefix("sd3_transformer."))
    return _block_name(key, "mmdit_blocks", _RELEASED_BLOCK)


def _released_key(name: str) -> str:
    """The released name of one of our weights, for messages."""
    module, _, parameter = name.rpartition(".")
    if module == "mask_embed":
        return f"msk_pos_embed.proj.{parameter}"
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        theirs = next(their for their, our in _RELEASED_BLOCK.items() if our == found[2])
        return f"mmdit_blocks.{found[1]}.{theirs}.{parameter}"
    return f"sd3_transformer.{'norm_out.linear' if module == 'norm_out' else module}.{parameter}"


def _branch_of(name: str) -> str:
    found = re.match(r"blocks\.\d+\.(image|mask|text)\.", name)
    if found:
        return found[1]
    if name.startswith("mask_embed."):
        return "mask"
    return "text" if name.startswith(("context_embedder.", "time_text_embed.")) else "image"


def _some(keys: list[str], most: int = 8) -> str:
    shown = ", ".join(sorted(keys)[:most]) or "none"
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
