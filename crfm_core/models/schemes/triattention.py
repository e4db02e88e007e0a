"""Tri-attention (TODSynth, arXiv 2512.16740): one attention over image, text and mask, each with weights of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from crfm_core.models.blocks import Branch, JointBlock, Stream, attend, layer_norm, modulate


class TriAttentionBlock(JointBlock):
    """Three branches with their own weights, joined by one attention over [image; text; mask] (TODSynth, arXiv 2512.16740)."""

    modulated = ("image", "text", "mask")

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool, mask_mlp_modulation: str = "own") -> None:
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
        self, image: Tensor, text: Tensor, mask: Tensor | None, conditioning: Tensor | list[Tensor], present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        image_mod, text_mod, *masked = self.modulations(conditioning, mask is not None)
        normed_image, normed_text = layer_norm(image), layer_norm(text)
        streams = [
            self.image.attention.stream(modulate(normed_image, image_mod[0])),
            self.text.attention.stream(modulate(normed_text, text_mod[0]), with_query=not self.last),
        ]
        if mask is not None:
            (mask_mod,) = masked
            normed_mask = layer_norm(mask)
            stream = self.mask.attention.stream(modulate(normed_mask, mask_mod[0]), with_query=not self.last)
            streams.append(stream._replace(present=present))
        attended = self.joint_attention(*streams)

        image = self.image.update(image, normed_image, self.image.attention.to_out(attended[0]), image_mod)
        if self.last:
            return image, None, None
        text = self.text.update(text, normed_text, self.text.attention.to_out(attended[1]), text_mod)
        if mask is not None:
            if self.mask_mlp_modulation == "image":  # as released; it leaves half of the mask's own vectors unused
                mask_mod = [mask_mod[0], image_mod[1]]
            mask = self.mask.update(mask, normed_mask, self.mask.attention.to_out(attended[2]), mask_mod)
        return image, text, mask

    def joint_attention(self, image: Stream, text: Stream, mask: Stream | None = None) -> Sequence[Tensor]:
        """What image, text and mask attended to, before their output maps; ``mask.present`` says which samples have a mask."""
        return attend(image, text) if mask is None else attend(image, text, mask)


BLOCK = TriAttentionBlock
