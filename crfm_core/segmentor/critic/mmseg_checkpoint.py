"""Critics from checkpoints of mmsegmentation: the network and the normalisation of images that their configuration describes.

The configuration is Python source. Running it is how mmengine reads it, and here it never is: it is parsed, values are taken from
it, and what a value may name is limited to registered parts of networks.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from crfm_core import WeightsError
from crfm_core.segmentor.critic.base import Critic
from crfm_core.segmentor.mmseg.configuration import parse_config
from crfm_core.segmentor.mmseg.descriptions import ONLY_TRAINING, read_description
from crfm_core.segmentor.mmseg.networks import build_described
from crfm_core.segmentor.mmseg.weights import load_weights

READS = "a checkpoint of mmsegmentation (.pth with the configuration in its meta)"


def recognises(path: Path, meta: dict) -> bool:
    """Whether a checkpoint's meta holds the source of a configuration, as mmengine's Runner writes it, or mmcv's before."""
    return isinstance(meta.get("cfg") or meta.get("config"), str)


def critic_of(path: Path, weights: dict[str, Tensor], meta: dict) -> Critic:
    """The critic of a checkpoint of mmsegmentation 1.x or 0.x.

    Of its meta, ``cfg`` or ``config`` is the configuration, ``dataset_meta`` or ``CLASSES`` name the classes; without them they are
    numbered. Auxiliary heads are not built.

    Images are prepared as mmsegmentation does for prediction: ``data_preprocessor`` with its ``test_cfg``, or ``img_norm_cfg``. The
    whole image is predicted at once, also where the configuration has sliding windows.

    Raises WeightsError when the configuration is no plain description of a network that this mmsegmentation has, or the weights do
    not fit it.
    """
    try:
        config = parse_config(meta.get("cfg") or meta["config"])
    except ValueError as error:
        raise WeightsError(f"{path}: its configuration {error}; nothing of it was run, give another checkpoint") from None
    model, preparation = read_description(config, path, WeightsError, dropped=ONLY_TRAINING)
    network = build_described(model, path, WeightsError)
    load_weights(network, {name: weight for name, weight in weights.items() if not name.startswith("auxiliary_head.")}, path)
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or map(str, range(network.out_channels))
    classes = [str(name) for name in classes]
    if network.out_channels != len(classes) or len(classes) < 2:
        raise WeightsError(
            f"{path}: gives {network.out_channels} maps for {len(classes)} classes; a critic must give one for each (two for two classes)"
        )
    return Critic(network, classes, preparation)
