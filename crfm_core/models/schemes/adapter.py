"""A cross-attention from the image's tokens to the mask's in every block of the base (TODSynth's "adapter")."""

from __future__ import annotations

from torch import Tensor, nn

from crfm_core.models.blocks import Attention, JointBlock, Stream, attend, layer_norm, modulate


class AdapterBlock(JointBlock):
    """SD3.5's block, whose image tokens also attend to the mask's by a cross-attention of their own (TODSynth's "adapter").

    The mask's tokens are no branch: every block reads the same ones, none changes them, and neither the time nor the text
    enters them; so ``forward`` also takes what :meth:`mask_stream` made of them. The paper leaves the rest open. Here the image's queries
    are its branch's own normalised ones; the block has key, value and output maps for the mask, and what the image got from
    it is added under the gate of its attention. The output map starts at zero: at the start the network is the base.
    """

    changes_mask = False

    def __init__(self, dim: int, heads: int, qk_norm: str | None, dual: bool, last: bool, mask_mlp_modulation: str = "own") -> None:
        super().__init__(dim, heads, qk_norm, dual, last)  # without an MLP for the mask there is nothing to modulate
        self.mask = Attention(dim, heads, qk_norm, with_query=False)
        for parameter in self.mask.to_out.parameters():
            nn.init.zeros_(parameter)

    def copy_image_to_mask(self) -> None:
        own = self.image.attention.state_dict()
        self.mask.load_state_dict({name: own[name] for name in self.mask.state_dict() if not name.startswith("to_out.")}, strict=False)

    def mask_stream(self, mask: Tensor) -> Stream:
        """Keys and values of the mask's tokens."""
        return self.mask.stream(mask, with_query=False)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        mask: Tensor | Stream | None,
        conditioning: Tensor | list[Tensor],
        present: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | Stream | None]:
        image_mod, text_mod = self.modulations(conditioning, mask=False)
        normed_image, normed_text = layer_norm(image), layer_norm(text)
        image_stream = self.image.attention.stream(modulate(normed_image, image_mod[0]))
        text_stream = self.text.attention.stream(modulate(normed_text, text_mod[0]), with_query=not self.last)
        image_attended, *text_attended = attend(image_stream, text_stream)
        attended = self.image.attention.to_out(image_attended)
        if mask is not None:
            stream = self.mask_stream(mask) if isinstance(mask, Tensor) else mask
            (mask_attended,) = attend(Stream(image_stream.query, stream.key, stream.value))
            of_mask = self.mask.to_out(mask_attended)
            attended = attended + (of_mask if present is None else of_mask * present[:, None, None])

        image = self.image.update(image, normed_image, attended, image_mod)
        if self.last:
            return image, None, None
        return image, self.text.update(text, normed_text, self.text.attention.to_out(text_attended[0]), text_mod), mask


BLOCK = AdapterBlock
