"""InceptionV3 with random weights, where the published ones are not needed."""

from __future__ import annotations

from pathlib import Path

import torch

from crfm_core.metrics.inception import load_fidelity


def random_inception(folder: Path) -> Path:
    """A file of random weights of the library's own network."""

    class Untrained(load_fidelity()):
        def load_state_dict(self, state_dict):
            """Keep the weights that the layers were made with."""

    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=folder / "none.pth")
    for name, tensor in network.named_parameters():
        if name.endswith("bn.weight"):
            tensor.data.fill_(1.7)  # else images fade on their way through so many layers
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"
