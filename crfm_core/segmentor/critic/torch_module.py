"""Critics of torch modules: of any object that gives logits for images, for use from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from crfm_core.segmentor.critic.base import Critic
from crfm_core.segmentor.preparation import Preparation


def as_critic(
    network: nn.Module | Callable[[Tensor], Tensor],
    classes: Sequence[str],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    **preparation,
) -> Critic:
    """A critic of a torch module, or of anything that is called with images, or has ``logits(images)``, and gives logits [B,K,h,w].

    ``mean`` and ``std`` are those of the images the network takes, per channel and for RGB in [0, 1]; the default leaves the images
    as they are. Further arguments as in :class:`crfm_core.segmentor.preparation.Preparation`. The module is frozen and set to eval in
    place.

        >>> critic = as_critic(my_unet, ["soil", "water"], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    """
    return Critic(network, classes, Preparation(tuple(mean), tuple(std), **preparation), _logits_of)


def _logits_of(network: Any, inputs: Tensor) -> Tensor:
    """The logits of anything that has a method, or an output, of that name, or that returns them."""
    answer = getattr(network, "logits", network)(inputs)
    return getattr(answer, "logits", answer)
