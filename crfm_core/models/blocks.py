"""The pieces that transformer blocks of SD3.5 with a mask are built of, whatever the control scheme.

The image and text branches compute what diffusers' ``SD3Transformer2DModel`` computes. Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class Modulation(NamedTuple):
    """What the conditioning does to one sub-layer of one branch; each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Any = None  # a tensor too; None where nothing is gated


def layer_norm(tokens: Tensor) -> Tensor:
    """LayerNorm without weights."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)


def modulate(normed: Tensor, mod: Modulation) -> Tensor:
    """Normalised tokens with the sample's own scale and shift."""
    return normed * (1 + mod.scale) + mod.shift


class Stream(NamedTuple):
    """One branch's tokens in an attention, [B, T, heads, d] each; without queries they are only attended to.

    ``present``, [B], says which samples have these tokens: in the others nothing else attends to them. None: all have them.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor
    present: Tensor | None = None


def attend(*streams: Stream) -> tuple[Tensor, ...]:
    """Full attention over the tokens of all streams; the results [B, T, D] of those with queries, in their order."""
    queries = [stream.query for stream in streams if stream.query is not None]
    keys, values = [stream.key for stream in streams], [stream.value for stream in streams]
    query, key, value = (_join(tokens).transpose(1, 2) for tokens in (queries, keys, values))
    joint = F.scaled_dot_product_attention(query, key, value, attn_mask=_attended_tokens(streams))
    return joint.transpose(1, 2).flatten(2).split([query.shape[1] for query in queries], dim=1)


def _attended_tokens(streams: Sequence[Stream]) -> Tensor | None:
    """Which tokens are attended to, [B, 1, 1, T]; None where all are. A sample that has none of them attends to all, which are numbers."""
    if all(stream.present is None for stream in streams):
        return None
    shapes = [stream.key.shape[:2] for stream in streams]
    device = streams[0].key.device
    each = [
        torch.ones(shape, dtype=torch.bool, device=device) if stream.present is None else stream.present[:, None].expand(shape)
        for stream, shape in zip(streams, shapes, strict=True)
    ]
    attended = torch.cat(each, 1)
    return (attended | ~attended.any(1, keepdim=True))[:, None, None]


def _join(tokens: list[Tensor]) -> Tensor:
    return torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0]  # ``cat`` copies even a single tensor


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, which has a kernel of its own; in float64 with the mean square in float32, as diffusers computes it, so
    that both can be compared to the last digits."""

    eps: float

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dtype != torch.float64:
            return super().forward(tokens)
        return tokens * torch.rsqrt(tokens.float().square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """One branch's query, key, value and output maps, with RMSNorm of each head's queries and keys."""

    norm_q: nn.Module
    norm_k: nn.Module

    def __init__(self, dim: int, heads: int, qk_norm: str | None, with_query: bool = True, with_output: bool = True) -> None:
        super().__init__()
        self.heads = heads
        if with_query:
            self.to_q = nn.Linear(dim, dim)
        self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for name in ("norm_q", "norm_k") if with_query else ("norm_k",):
            setattr(self, name, RMSNorm(dim // heads, eps=EPS) if qk_norm else nn.Identity())
        if with_output:
            self.to_out = nn.Linear(dim, dim)

    def stream(self, tokens: Tensor, with_query: bool = True) -> Stream:
        """Queries (if wanted), keys and values of tokens [B, T, D]."""
        query = self.norm_q(self._split(self.to_q(tokens))) if with_query else None
        return Stream(query, self.norm_k(self._split(self.to_k(tokens))), self._split(self.to_v(tokens)))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1))


class Branch(nn.Module):
    """One branch's weights in one block. A ``read_only`` branch gives keys and values but is not updated."""

    def __init__(self, dim: int, heads: int, qk_norm: str | None, read_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        self.read_only, self.vectors = read_only, 2 if read_only else 9 if dual else 6
        self.modulation = nn.Linear(dim, self.vectors * dim)
        self.attention = Attention(dim, heads, qk_norm, with_output=not read_only)
        if dual:
            self.second_attention = Attention(dim, heads, qk_norm)
        if not read_only:
            self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def split(self, vectors: Tensor) -> list[Modulation]:
        """The output of ``modulation``, [B, vectors x D], divided between the attention, the feed-forward and, where there is one,
        the second attention, in this order."""
        each = vectors[:, None].chunk(self.vectors, dim=-1)
        if self.read_only:
            scale, shift = each  # the one place where SD3.5 puts the scale first
            return [Modulation(shift, scale)]
        return [Modulation(*each[i : i + 3]) for i in range(0, self.vectors, 3)]

    def update(self, tokens: Tensor, normed: Tensor, attended: Tensor, mods: Sequence[Modulation]) -> Tensor:
        """The branch's next tokens [B, T, D].

        Args:
            tokens, normed: the present ones, before and after LayerNorm.
            attended: what they got from the joint attention, after its output map.
            mods: of the attention, the feed-forward and, where there is one, the second attention.
        """
        attention, mlp, *second = mods
        updated = tokens + attention.gate * attended
        if second:
            (alone,) = attend(self.second_attention.stream(modulate(normed, second[0])))
            updated = updated + second[0].gate * self.second_attention.to_out(alone)
        return updated + mlp.gate * self.feed_forward(modulate(layer_norm(updated), mlp))


class JointBlock(nn.Module):
    """The image and the text branch of one block of SD3.5; a scheme's subclass adds the mask and says how they meet.

    ``forward`` takes the tokens of image, text and mask (or None), [B, T, D] each, the conditioning [B, D] or what
    :meth:`vectors` made of it, and which samples have a mask, [B] or None for all, and returns the three next ones. Image and text of a
    sample without a mask are those of plain SD3.5, whatever its mask's tokens are. The last block computes only the image: nothing reads
    its text and mask tokens. Maps that nothing would read exist there all the same, so that names and counts are those of SD3.5 and of
    released checkpoints, but they are idle.
    """

    #: The branches whose AdaLN maps take the conditioning.
    modulated: ClassVar[tuple[str, ...]] = ("image", "text")
    #: Whether blocks change the mask's tokens. Where they do not, a block also takes the mask as its :meth:`mask_stream`.
    changes_mask: ClassVar[bool] = True

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool) -> None:
        super().__init__()
        self.last = last
        self.image = Branch(dim, heads, qk_norm, dual=dual)
        self.text = Branch(dim, heads, qk_norm, read_only=last)

    def vectors(self, conditioning: Tensor, mask: bool) -> list[Tensor]:
        """The AdaLN vectors [..., vectors x D] of each branch for conditioning [..., D]; ``mask``: also of the mask's, if it has any."""
        return [getattr(self, name).modulation(conditioning) for name in self.modulated if mask or name != "mask"]

    def modulations(self, conditioning: Tensor | list[Tensor], mask: bool) -> list[list[Modulation]]:
        """What the conditioning, or the vectors that :meth:`vectors` made of it, does to each branch."""
        each = self.vectors(conditioning, mask) if isinstance(conditioning, Tensor) else conditioning
        return [getattr(self, name).split(vectors) for name, vectors in zip(self.modulated, each, strict=False)]

    def idle_modules(self) -> list[nn.Module]:
        """Modules whose weights cannot change the model's output."""
        return [self.text.attention.to_q, self.text.attention.norm_q] if self.last else []

    def copy_image_to_mask(self) -> None:
        """Start the mask's weights as copies of the image branch's."""
        raise NotImplementedError

    def mask_stream(self, mask: Tensor) -> Stream:
        """Keys and values of the mask's tokens, where no block changes these."""
        raise NotImplementedError
