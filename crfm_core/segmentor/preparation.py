"""How images are prepared for a segmentor's network: normalised, in its order of channels, padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Mean and standard deviation of ImageNet, for RGB in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Networks trained here see images padded to a multiple of this: their deepest feature map is 32 times smaller.
DIVISOR = 32


@dataclass(frozen=True)
class Preparation:
    """What happens to RGB images in [0, 1] before a network sees them."""

    mean: Sequence[float] = IMAGENET_MEAN  #: in the scale of the images and the order of the network's channels; or one for all
    std: Sequence[float] = IMAGENET_STD
    bgr: bool = False  #: whether channels are reversed first
    size: tuple[int, int] = (0, 0)  #: least height and width that images are padded to, below and on the right
    divisor: int = 1  #: number whose multiples the padded sides are
    pad_value: float = 0.0  #: value of the padding, after normalisation

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after padding."""
        least_height, least_width = self.size
        return max(least_height, height + -height % self.divisor), max(least_width, width + -width % self.divisor)


#: What segmentors see that this workflow trains by the name of an architecture.
OWN = Preparation(divisor=DIVISOR)
