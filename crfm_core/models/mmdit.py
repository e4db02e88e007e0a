"""Stable Diffusion 3.5's transformer with mask tokens beside the image and text tokens of every block.

How the mask's tokens meet the others is the control scheme: :class:`TriAttentionBlock` (TODSynth, arXiv 2512.16740),
:class:`SiameseBlock` and :class:`AdapterBlock`. The image and text branches compute what diffusers' ``SD3Transformer2DModel``
computes. Shapes: B samples, C latent channels, HxW latent, T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

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

EPS = 1e-6


class Modulation(NamedTuple):
    """What the conditioning does to one sub-layer of one branch; each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def normalise(tokens: Tensor) -> Tensor:
    """LayerNorm without weights."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)


def modulate(normed: Tensor, by: Modulation) -> Tensor:
    """The sample's own scale and shift of normalised tokens."""
    return normed * (1 + by.scale) + by.shift


class Stream(NamedTuple):
    """One branch's tokens in an attention, [B, T, heads, d] each; without queries they are only read."""

    query: Tensor | None
    key: Tensor
    value: Tensor


def attend(*streams: Stream) -> tuple[Tensor, ...]:
    """Full attention over the tokens of all streams; the answers [B, T, D] of those that ask, in their order."""
    queries = [stream.query for stream in streams if stream.query is not None]
    keys, values = [stream.key for stream in streams], [stream.value for stream in streams]
    joint = F.scaled_dot_product_attention(*(_join(tokens).transpose(1, 2) for tokens in (queries, keys, values)))
    return joint.transpose(1, 2).flatten(2).split([query.shape[1] for query in queries], dim=1)


def _join(tokens: Sequence[Tensor]) -> Tensor:
    return torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0]  # ``cat`` copies even a single tensor


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, which has a kernel of its own; in float64 with the mean square in float32, as diffusers computes it, so
    that both can be compared to the last digits."""

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dtype != torch.float64:
            return super().forward(tokens)
        return tokens * torch.rsqrt(tokens.float().square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """One branch's query, key, value and output maps, with RMSNorm of each head's queries and keys."""

    def __init__(self, dim: int, heads: int, qk_norm: str | None, asks: bool = True, answers: bool = True) -> None:
        super().__init__()
        self.heads = heads
        if asks:
            self.to_q = nn.Linear(dim, dim)
        self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for name in ("norm_q", "norm_k") if asks else ("norm_k",):
            setattr(self, name, RMSNorm(dim // heads, eps=EPS) if qk_norm else nn.Identity())
        if answers:
            self.to_out = nn.Linear(dim, dim)

    def stream(self, tokens: Tensor, asks: bool = True) -> Stream:
        """Queries (if it asks), keys and values of tokens [B, T, D]."""
        query = self.norm_q(self._split(self.to_q(tokens))) if asks else None
        return Stream(query, self.norm_k(self._split(self.to_k(tokens))), self._split(self.to_v(tokens)))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1))


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

    def split(self, vectors: Tensor) -> list[Modulation]:
        """What ``modulation`` gives, [B, vectors x D], as what it does to the attention, the feed-forward and, where there is one,
        the second attention, in this order."""
        each = vectors[:, None].chunk(self.vectors, dim=-1)
        if self.read:
            scale, shift = each  # the one place where SD3.5 puts the scale first
            return [Modulation(shift, scale)]
        return [Modulation(*each[i : i + 3]) for i in range(0, self.vectors, 3)]

    def update(self, tokens: Tensor, normed: Tensor, seen: Tensor, by: Sequence[Modulation]) -> Tensor:
        """The branch's next tokens [B, T, D] from these, before and after LayerNorm, and from what they saw in the attention (after
        its output map)."""
        attention, mlp, *second = by
        updated = tokens + attention.gate * seen
        if second:
            (alone,) = attend(self.second_attention.stream(modulate(normed, second[0])))
            updated = updated + second[0].gate * self.second_attention.to_out(alone)
        return updated + mlp.gate * self.feed_forward(modulate(normalise(updated), mlp))


class JointBlock(nn.Module):
    """The image and the text branch of one block of SD3.5; a scheme's subclass adds the mask and says how they meet.

    ``forward`` takes the tokens of image, text and mask (or None), [B, T, D] each, and the conditioning [B, D] or what
    :meth:`vectors` made of it, and returns the three next ones. The last block computes only the image: nothing reads its text and
    mask tokens. Maps that nothing would read exist there all the same, so that names and counts are those of SD3.5 and of released
    checkpoints, but they are idle.
    """

    #: The branches whose AdaLN maps take the conditioning.
    modulated: ClassVar[tuple[str, ...]] = ("image", "text")

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool) -> None:
        super().__init__()
        self.last = last
        self.image = Branch(dim, heads, qk_norm, dual=dual)
        self.text = Branch(dim, heads, qk_norm, read=last)

    def vectors(self, conditioning: Tensor, mask: bool) -> list[Tensor]:
        """The AdaLN vectors [..., vectors x D] of each branch for conditioning [..., D]; ``mask``: also of the mask's, if it has any."""
        return [getattr(self, name).modulation(conditioning) for name in self.modulated if mask or name != "mask"]

    def modulations(self, conditioning: Tensor | list[Tensor], mask: bool) -> list[list[Modulation]]:
        """What the conditioning, or the vectors that were made of it, does to each branch."""
        given = self.vectors(conditioning, mask) if isinstance(conditioning, Tensor) else conditioning
        return [getattr(self, name).split(vectors) for name, vectors in zip(self.modulated, given, strict=False)]

    def idle_modules(self) -> list[nn.Module]:
        """Modules whose weights cannot change the model's output."""
        return [self.text.attention.to_q, self.text.attention.norm_q] if self.last else []


class TriAttentionBlock(JointBlock):
    """Three branches with their own weights, joined by one attention over [image; text; mask] (TODSynth, arXiv 2512.16740)."""

    modulated: ClassVar[tuple[str, ...]] = ("image", "text", "mask")

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool, mask_mlp_modulation: str) -> None:
        super().__init__(dim, heads, qk_norm, dual, last)
        self.mask_mlp_modulation = mask_mlp_modulation
        self.mask = Branch(dim, heads, qk_norm)

    def idle_modules(self) -> list[nn.Module]:
        mask = self.mask.attention
        return [*super().idle_modules(), mask.to_q, mask.norm_q, mask.to_out, self.mask.feed_forward] if self.last else []

    def copy_image_to_mask(self) -> None:
        self.mask.attention.load_state_dict(self.image.attention.state_dict())
        self.mask.feed_forward.load_state_dict(self.image.feed_forward.state_dict())
        for ours, theirs in zip(self.mask.modulation.parameters(), self.image.modulation.parameters(), strict=True):
            ours.copy_(theirs[: len(ours)])  # a dual block's vectors for its second attention come last

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor | None, conditioning: Tensor | list[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        by_image, by_text, *by_mask = self.modulations(conditioning, mask is not None)
        normed_image, normed_text = normalise(image), normalise(text)
        streams = [
            self.image.attention.stream(modulate(normed_image, by_image[0])),
            self.text.attention.stream(modulate(normed_text, by_text[0]), asks=not self.last),
        ]
        if mask is not None:
            normed_mask = normalise(mask)
            streams.append(self.mask.attention.stream(modulate(normed_mask, by_mask[0][0]), asks=not self.last))
        seen = self.meet(*streams)

        image = self.image.update(image, normed_image, self.image.attention.to_out(seen[0]), by_image)
        if self.last:
            return image, None, None
        text = self.text.update(text, normed_text, self.text.attention.to_out(seen[1]), by_text)
        if mask is not None:
            by = by_mask[0]
            if self.mask_mlp_modulation == "image":  # as released; it leaves half of the mask's own vectors unused
                by = [by[0], by_image[1]]
            mask = self.mask.update(mask, normed_mask, self.mask.attention.to_out(seen[2]), by)
        return image, text, mask

    def meet(self, image: Stream, text: Stream, mask: Stream | None = None) -> Sequence[Tensor]:
        """What image, text and mask see of each other, before their output maps."""
        return attend(image, text) if mask is None else attend(image, text, mask)


class SiameseBlock(TriAttentionBlock):
    """Two attentions side by side, [image; text] and [image; mask], whose image answers are added; mask and text never meet.

    The idea is SiamLayout's (arXiv 2412.03859); TODSynth, which compares against it, leaves open with which maps the image
    asks in the second attention. Here with its own of the first, so that weights, names and counts are those of
    :class:`TriAttentionBlock` and a comparison is one of the attention's pattern alone. The answers are added before the
    image's output map: its bias counts once.
    """

    def meet(self, image: Stream, text: Stream, mask: Stream | None = None) -> Sequence[Tensor]:
        of_text, *to_text = attend(image, text)
        if mask is None:
            return of_text, *to_text
        of_mask, *to_mask = attend(image, mask)
        return of_text + of_mask, *to_text, *to_mask


class AdapterBlock(JointBlock):
    """SD3.5's block, whose image tokens also look at the mask's by a cross-attention of their own (TODSynth's "adapter").

    The mask's tokens are no branch: every block reads the same ones, none changes them, and neither the time nor the text
    enters them; so ``forward`` also takes what :meth:`read` made of them. The paper leaves the rest open. Here the image asks
    with its branch's own normalised queries; the block has key, value and output maps for the mask, and what the image saw of
    it is added under the gate of its attention. The output map starts at zero: at the start the network is the base.
    """

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool) -> None:
        super().__init__(dim, heads, qk_norm, dual, last)
        self.mask = Attention(dim, heads, qk_norm, asks=False)
        for parameter in self.mask.to_out.parameters():
            nn.init.zeros_(parameter)

    def copy_image_to_mask(self) -> None:
        own = self.image.attention.state_dict()
        self.mask.load_state_dict({name: own[name] for name in self.mask.state_dict() if not name.startswith("to_out.")}, strict=False)

    def read(self, mask: Tensor) -> Stream:
        """Keys and values of the mask's tokens."""
        return self.mask.stream(mask, asks=False)

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor | Stream | None, conditioning: Tensor | list[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | Stream | None]:
        by_image, by_text = self.modulations(conditioning, mask=False)
        normed_image, normed_text = normalise(image), normalise(text)
        asking = self.image.attention.stream(modulate(normed_image, by_image[0]))
        of_text, *to_text = attend(asking, self.text.attention.stream(modulate(normed_text, by_text[0]), asks=not self.last))
        seen = self.image.attention.to_out(of_text)
        if mask is not None:
            read = self.read(mask) if isinstance(mask, Tensor) else mask
            (of_mask,) = attend(Stream(asking.query, read.key, read.value))
            seen = seen + self.mask.to_out(of_mask)

        image = self.image.update(image, normed_image, seen, by_image)
        if self.last:
            return image, None, None
        return image, self.text.update(text, normed_text, self.text.attention.to_out(to_text[0]), by_text), mask


#: The block of each control scheme that :class:`MaskMMDiT` knows.
BLOCKS = {"triattention": TriAttentionBlock, "siamese": SiameseBlock, "adapter": AdapterBlock}


class Prepared(NamedTuple):
    """What of a :class:`MaskMMDiT`'s velocities does not depend on the noisy latents, as :meth:`MaskMMDiT.prepare` gives it."""

    mask_latents: Tensor | None
    text: Tensor  # tokens, [B, T, D]
    mask: Tensor | None  # tokens, [B, T, D]
    reads: list[Stream]  # with the scheme "adapter" and a mask: what each block reads of it
    vectors: list[list[Tensor]]  # each block's AdaLN vectors, [N, B, vectors x D] for each branch
    out: Tensor  # the output's, [N, B, 2 D]


class MaskMMDiT(ModelMixin, ConfigMixin):
    """A velocity network v(z, σ, text, mask): SD3.5's MM-DiT with mask tokens; without a mask it is plain SD3.5.

    Arguments are those of diffusers' ``SD3Transformer2DModel``, and

    - ``scheme``: how the mask's tokens meet the others, a key of :data:`BLOCKS`;
    - ``mask_mlp_modulation``: whether the mask's MLP is modulated by its "own" vectors (the paper) or by those of the
      "image" branch (the released code); "adapter" has no such MLP and takes no notice.

    At SD3.5-medium's size the base's 2.243 B parameters are joined by 1.020 B of the mask with triattention and siamese
    (3.263 B together) and by 0.170 B with adapter (2.413 B together). 26 M of the former and 2 M of the latter, in the last
    block, cannot affect the output and are frozen (see :class:`JointBlock`).
    """

    _supports_gradient_checkpointing = True
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
        scheme: str = "triattention",
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if scheme not in BLOCKS:
            raise ConfigError(f"scheme={scheme!r}: must be one of {', '.join(BLOCKS)}")
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
        self._no_split_modules = [BLOCKS[scheme].__name__]  # a class that the model does not have is an error to FSDP
        own = {} if scheme == "adapter" else {"mask_mlp_modulation": mask_mlp_modulation}
        self.blocks = nn.ModuleList(
            BLOCKS[scheme](dim, num_attention_heads, qk_norm, dual=index in dual_attention_layers, last=index == num_layers - 1, **own)
            for index in range(num_layers)
        )
        self.norm_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))
        self.gradient_checkpointing = False
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
        check_shapes(self.config, hidden_states, mask_latents)
        conditioning = self._conditioning(timestep, pooled_projections)
        text, mask = self.context_embedder(encoder_hidden_states), self._mask_tokens(mask_latents)
        # The blocks make their vectors themselves: only within them do checkpointing and FSDP reach the AdaLN maps.
        velocity = self._velocity(hidden_states, text, mask, [], [conditioning] * len(self.blocks), self.norm_out(conditioning))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @apply_forward_hook
    def prepare(
        self, encoder_hidden_states: Tensor, pooled_projections: Tensor, timesteps: Tensor, mask_latents: Tensor | None = None
    ) -> Prepared:
        """What is the same for all noisy latents, computed once for the N steps of a sampling; :meth:`velocity` takes it.

        A third of the weights are AdaLN maps: each is read here once, not N times. Their vectors are kept: at SD3.5-medium's size with
        triattention 469 of 1536 numbers, 1.4 MB in bfloat16, for each step and sample, that is 33 MB for a sample of 23 steps and
        0.5 GB for 16 samples; prepare larger batches in parts. With "adapter" each block's keys and values of the mask are kept
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
            [block.read(mask) for block in self.blocks] if self.config.scheme == "adapter" and mask is not None else [],
            [block.vectors(conditioning, mask is not None) for block in self.blocks],
            self.norm_out(conditioning),
        )

    @apply_forward_hook
    def velocity(self, hidden_states: Tensor, prepared: Prepared, step: int) -> Tensor:
        """The velocity [B, C, H, W] of noisy latents [B, C, H, W] at a step, 0 ... N - 1, of those that were prepared."""
        check_shapes(self.config, hidden_states, prepared.mask_latents)
        by = [[vectors[step] for vectors in block] for block in prepared.vectors]
        return self._velocity(hidden_states, prepared.text, prepared.mask, prepared.reads, by, prepared.out[step])

    def _conditioning(self, timestep: Tensor, pooled_projections: Tensor) -> Tensor:
        return F.silu(self.time_text_embed(timestep, pooled_projections))

    def _velocity(
        self,
        hidden_states: Tensor,
        text: Tensor,
        mask: Tensor | None,
        reads: list[Stream],
        by: Sequence[Tensor | list[Tensor]],
        out: Tensor,
    ) -> Tensor:
        image = self.pos_embed(hidden_states)
        for index, block in enumerate(self.blocks):
            mask = reads[index] if reads else mask
            if self.gradient_checkpointing and torch.is_grad_enabled():
                image, text, mask = self._gradient_checkpointing_func(block, image, text, mask, by[index])
            else:
                image, text, mask = block(image, text, mask, by[index])
        scale, shift = out[:, None].chunk(2, dim=-1)
        return self._unpatch(self.proj_out(modulate(normalise(image), Modulation(shift, scale))), *hidden_states.shape[-2:])

    def _mask_tokens(self, mask_latents: Tensor | None) -> Tensor | None:
        if mask_latents is None:
            return None
        patches = self.mask_embed(mask_latents).flatten(2).transpose(1, 2)
        # The same positions: mask token (i, j) lies on image token (i, j).
        tokens = (patches + self.pos_embed.cropped_pos_embed(*mask_latents.shape[-2:])).to(patches.dtype)
        return normalise(tokens) if self.config.scheme == "adapter" else tokens  # once: there no block changes them

    def _unpatch(self, tokens: Tensor, height: int, width: int) -> Tensor:
        patch = self.config.patch_size
        grid = tokens.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, -1))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b h w p q c -> b c (h p) (w q)

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that the network is made of, in their order."""
        return list(self.blocks)

    def _idle_parameters(self) -> list[nn.Parameter]:
        return [parameter for block in self.blocks for module in block.idle_modules() for parameter in module.parameters()]

    def branch_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters of the branches "image", "mask" and "text", without those that cannot affect the output.

        "text" holds what fine-tuning leaves alone: the context, time and pooled embedders and the text branch of every block.
        """
        return by_branch(self.named_parameters(), self._idle_parameters(), _branch_of)

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
        "copy" starts them as copies of the image branch's (the ControlNet way). The output maps of ``scheme`` "adapter" start
        at zero either way. Without a mask the result is the same network.
        Raises WeightsError when the transformer has weights this model has no place for.
        """
        check_mask_init(mask_init)
        settings = {name: transformer.config[name] for name in SD3_SETTINGS}
        model = cls(**settings, mask_mlp_modulation=mask_mlp_modulation, scheme=scheme)
        nn.Module.to(model, transformer.device, transformer.dtype)  # diffusers' own ``to`` warns of casts that lose nothing here
        weights = {_sd3_name(key): value for key, value in transformer.state_dict().items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        check_sd3_names([name for name in missing if _branch_of(name) != "mask"], unexpected)
        if mask_init == "copy":
            model._copy_image_to_mask()
        return model

    def to_sd3(self) -> SD3Transformer2DModel:
        """The image and text part, which is the network without a mask, as diffusers' class with copies of the weights."""
        own = self.state_dict()
        return sd3_transformer(self.config, lambda key: own[_sd3_name(key)])

    @torch.no_grad()
    def _copy_image_to_mask(self) -> None:
        self.mask_embed.load_state_dict(self.pos_embed.proj.state_dict())
        for block in self.blocks:
            block.copy_image_to_mask()

    def load_released(self, state_dict: dict[str, Tensor]) -> None:
        """Load a checkpoint of the authors' released code over this model, by that code's names.

        Such checkpoints hold trained tensors only: text-branch keys (and the position tables, which are not learned) may be
        missing and are then kept as they are. Raises WeightsError, with the model unchanged, when any other key is missing,
        unknown or of another shape, or when a position table is that of another ``sample_size``.
        """
        if self.config.scheme != "triattention":
            raise WeightsError(f"a released checkpoint holds a network of the scheme triattention, this one is of {self.config.scheme}")
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
            listed = "; ".join(f"{fault}: {some(keys)}" for fault, keys in faults.items() if keys)
            raise WeightsError(f"the checkpoint does not fit this model: {listed}; use the base model and settings it was trained with")
        self.load_state_dict(weights, strict=False)

    def _check_table(self, key: str, table: Tensor) -> None:
        own = self.pos_embed.pos_embed
        # A hundredth passes a table that was stored in bfloat16 and catches one of another size.
        if table.shape != own.shape or not torch.allclose(table.to(own), own, rtol=0, atol=1e-2):
            raise WeightsError(f"{key} is not this model's position table: sample_size or pos_embed_max_size differ")


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
    """Raise WeightsError when weights that were loaded as an SD3.5 transformer's lacked some or had others."""
    if missing or unexpected:
        raise WeightsError(f"not the weights of an SD3.5 transformer: missing {some(missing)}; unexpected {some(unexpected)}")


def check_mask_init(mask_init: str) -> None:
    """Raise ConfigError for a way to start the mask's weights that is not known."""
    if mask_init not in ("random", "copy"):
        raise ConfigError(f"mask_init={mask_init!r}: must be 'random' or 'copy'")


def check_shapes(config: Any, latents: Tensor, mask_latents: Tensor | None) -> None:
    """Raise ValueError, naming argument and shapes, for latents or a mask that a network of ``config`` does not take."""
    patch, largest = config.patch_size, config.pos_embed_max_size * config.patch_size
    shape = tuple(latents.shape)
    if len(shape) != 4 or shape[1] != config.in_channels or shape[2] % patch or shape[3] % patch:
        raise ValueError(f"hidden_states has shape {shape}: needs [B, {config.in_channels}, H, W] with H and W divisible by {patch}")
    if max(shape[2:]) > largest:
        raise ValueError(f"hidden_states has shape {shape}: the position table ends at {largest}x{largest}")
    if mask_latents is not None and tuple(mask_latents.shape) != shape:
        raise ValueError(f"mask_latents has shape {tuple(mask_latents.shape)}, hidden_states {shape}: they must be equal")


def by_branch(
    named: Iterable[tuple[str, nn.Parameter]], idle: Iterable[nn.Parameter], branch_of: Callable[[str], str]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The named parameters, without the idle ones, sorted into the branches that ``branch_of`` gives for their names."""
    skipped = {id(parameter) for parameter in idle}
    branches: dict[str, list[tuple[str, nn.Parameter]]] = {"image": [], "mask": [], "text": []}
    for name, parameter in named:
        if id(parameter) not in skipped:
            branches[branch_of(name)].append((name, parameter))
    return branches


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


def sd3_branch(key: str) -> str:
    """The branch, "image" or "text", of a weight of a diffusers ``SD3Transformer2DModel``."""
    return _branch_of(_sd3_name(key))


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


def some(keys: list[str], most: int = 8) -> str:
    """A list of names for a message, cut where it gets long."""
    shown = ", ".join(sorted(keys)[:most]) or "none"
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
