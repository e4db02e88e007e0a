"""Features of the InceptionV3 that defines FID and KID: torch-fidelity's network, with weights loaded without running code."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from crfm_core import WeightsError
from crfm_core.checkpoints import read_state_dict

#: Name and length of the features: the last pooling's.
LAYER = "2048"


class _NoVision(types.ModuleType):
    """Replaces torchvision while torch-fidelity is imported, which imports datasets from it that are not used here."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@functools.cache
def load_fidelity() -> type[nn.Module]:
    """Import torch-fidelity and return its InceptionV3; a second call does nothing.

    There is not a torchvision for every build of torch. Without one, a stand-in exists while the library is imported; afterwards it is
    removed, because other libraries (transformers) check whether torchvision is installed.
    """
    parts = ["torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"]
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        for part in parts:
            sys.modules[part] = _NoVision(part)
            holder, _, name = part.rpartition(".")
            if holder:
                setattr(sys.modules[holder], name, sys.modules[part])
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    finally:
        if missing:
            for part in parts:
                del sys.modules[part]
    return FeatureExtractorInceptionV3


def why_no_inception(weights: Path | str | None) -> str:
    """Why Inception features cannot be computed here, for the report; "" when the library and the file are there."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "torch-fidelity is not installed"
    if weights is None:
        return "no weights of InceptionV3 are named (generation.weights)"
    return "" if Path(weights).is_file() else f"the weights of InceptionV3 are not there ({weights})"


class Inception:
    """InceptionV3 as in the first FID (Heusel et al., NeurIPS 2017): images of any size, resized to 299x299 as TensorFlow did it.

    ``weights`` is the state dict that torch-fidelity and pytorch-fid publish (converted from TensorFlow, 2015-12-05).

    Raises WeightsError when the file is damaged, holds anything but tensors, or does not fit the network.
    """

    def __init__(self, weights: Path | str, device: torch.device | str = "cpu"):
        tensors = read_state_dict(
            weights, f"generation.weights: {weights}", "download it from a source you trust, or give its url and sha256"
        )
        # The library unpickles any file; it gets one that is written here, from tensors alone.
        torch.save(tensors, written := io.BytesIO())
        written.seek(0)
        try:
            self.network = load_fidelity()("inception", [LAYER], feature_extractor_weights_path=written).to(device)
        except RuntimeError as error:
            reason = "; ".join(line.strip()[:200] for line in str(error).splitlines()[1:3])
            raise WeightsError(
                f"generation.weights: {weights} does not fit torch-fidelity's InceptionV3 ({reason}); give the weights that it, or "
                "pytorch-fid, publishes"
            ) from None
        self.device = device

    @torch.no_grad()
    def image_features(self, images: np.ndarray) -> Tensor:
        """uint8 [B,H,W,3] -> float32 [B,2048] on the CPU, before the last layer."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        return self.network(pixels)[0].float().cpu()
