"""A trained segmentor as a frozen, differentiable function from images to logits."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crfm_core import WeightsError
from crfm_core.segmentor.openmmlab import ARCHITECTURES, DIVISOR, MEAN, STD, build_model, read_checkpoint


class Critic(nn.Module):
    """images float [B,3,H,W] in [0,1] -> logits [B,K,H,W]; weights frozen, in eval mode, differentiable in the images."""

    def __init__(self, network: nn.Module, classes: list[str]):
        super().__init__()
        self.network = network
        self.classes = classes
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Critic:
        """Stay in eval mode, also when a module that holds the critic is set to train."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the size of the images."""
        height, width = images.shape[-2:]
        # mmsegmentation's own prediction skips its preprocessor: normalise and pad here as it does in training.
        padding = (0, -width % DIVISOR, 0, -height % DIVISOR)
        inputs = F.pad((images - self.mean) / self.std, padding)
        logits = self.network.encode_decode(inputs, [{"img_shape": inputs.shape[2:]}])
        return logits[..., :height, :width]

    def logits(self, images: Tensor) -> Tensor:
        """The same as calling the critic."""
        return self(images)


def load_critic(checkpoint: Path | str, device: str = "cpu") -> Critic:
    """The critic of a checkpoint written by :func:`crfm_core.segmentor.training.train_segmentor`.

    Raises WeightsError when the file is missing, damaged or was not written by it.
    """
    stored = read_checkpoint(checkpoint)
    meta = stored.get("meta")
    known = isinstance(meta, dict) and isinstance(meta.get("classes"), list) and isinstance(meta.get("segmentor"), dict)
    if not known or meta["segmentor"].get("architecture") not in ARCHITECTURES or "state_dict" not in stored:
        raise WeightsError(f"{checkpoint}: no segmentor of this workflow (it lacks classes or a known architecture); train one with it")
    network = build_model(meta["segmentor"]["architecture"], len(meta["classes"]))
    try:
        network.load_state_dict(stored["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise WeightsError(f"{checkpoint}: the weights do not fit its own architecture ({reason}); train it again") from None
    return Critic(network, list(meta["classes"])).to(device)
