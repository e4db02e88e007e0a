"""Two attentions side by side, whose answers for the image are added; mask and text never meet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from crfm_core.models.blocks import Stream, attend
from crfm_core.models.schemes.triattention import TriAttentionBlock


class SiameseBlock(TriAttentionBlock):
    """Two attentions side by side, [image; text] and [image; mask], whose image answers are added; mask and text never meet.

    The idea is SiamLayout's (arXiv 2412.03859); TODSynth, which compares against it, leaves open with which maps the image
    queries the second attention. Here with its own of the first, so that weights, names and counts are those of
    :class:`TriAttentionBlock` and a comparison is one of the attention's pattern alone. The answers are added before the
    image's output map: its bias counts once.
    """

    def joint_attention(self, image: Stream, text: Stream, mask: Stream | None = None) -> Sequence[Tensor]:
        image_text, *text_image = attend(image, text)
        if mask is None:
            return image_text, *text_image
        image_mask, *mask_image = attend(image, mask)
        if mask.present is not None:
            image_mask = image_mask * mask.present[:, None, None]
        return image_text + image_mask, *text_image, *mask_image


BLOCK = SiameseBlock
