"""Critics from checkpoints of mmsegmentation: the network and the normalisation of images that their configuration describes.

The configuration is Python source. Running it is how mmengine reads it, and here it never is: it is parsed, values are taken from
it, and what a value may name is limited to registered parts of networks.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from crfm_core import WeightsError
from crfm_core.segmentor.configuration import parse_config
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.descriptions import DROPPED, ONLY_TRAINING, build_described, checked, described_network, preparation_of
from crfm_core.segmentor.openmmlab import load_weights


def mmseg_critic(path: Path | str, weights: dict[str, Tensor], meta: dict, text: str) -> Critic:
    """The critic of a checkpoint as mmengine's Runner writes it, or mmcv's before (mmsegmentation 0.x).

    Args:
        path: the checkpoint, for messages.
        weights: its state dict, whole but for auxiliary heads, which are not built.
        meta: its meta; ``dataset_meta`` or ``CLASSES`` name the classes, without them they are numbered.
        text: the configuration's source.

    Images are prepared as mmsegmentation does for prediction: ``data_preprocessor`` with its ``test_cfg``, or ``img_norm_cfg``. The
    whole image is looked at, also where the configuration asks for sliding windows.

    Raises WeightsError when the configuration is no plain description of a network that this mmsegmentation has, or the weights do
    not fit it.
    """
    try:
        config = parse_config(text)
        model = described_network(config)
        preparation = preparation_of(config)
        model = checked({key: value for key, value in model.items() if key != "data_preprocessor"}, "model", DROPPED | ONLY_TRAINING)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: its configuration {error}; nothing of it was run, give another checkpoint") from None
    network = build_described(model, path, WeightsError)
    load_weights(network, {name: weight for name, weight in weights.items() if not name.startswith("auxiliary_head.")}, path)
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or map(str, range(network.out_channels))
    classes = [str(name) for name in classes]
    if network.out_channels != len(classes) or len(classes) < 2:
        raise WeightsError(
            f"{path}: gives {network.out_channels} maps for {len(classes)} classes; a critic must give one for each (two for two classes)"
        )
    return Critic(network, classes, preparation)
