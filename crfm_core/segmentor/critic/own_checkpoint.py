"""Critics from checkpoints that this workflow trained, of an architecture known by name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from crfm_core import WeightsError
from crfm_core.segmentor.critic.base import Critic
from crfm_core.segmentor.mmseg.networks import ARCHITECTURES, build_model
from crfm_core.segmentor.mmseg.weights import load_weights

READS = "a checkpoint that this workflow trained"


def recognises(path: Path, meta: dict) -> bool:
    """Whether a checkpoint's meta says how this workflow trained it. (With ``cfg`` it holds its network itself, as mmsegmentation's do.)"""
    return isinstance(meta.get("segmentor"), dict) and "cfg" not in meta


def critic_of(path: Path, weights: dict[str, Tensor], meta: dict) -> Critic:
    """The critic of a checkpoint of :func:`crfm_core.segmentor.training.train_segmentor`. Raises WeightsError when it is not whole."""
    architecture, classes = meta["segmentor"].get("architecture"), meta.get("classes")
    if architecture not in ARCHITECTURES or not isinstance(classes, list):
        raise WeightsError(f"{path}: no segmentor of this workflow (it lacks classes or a known architecture); train one with it")
    network = build_model(architecture, len(classes))
    load_weights(network, weights, path)
    return Critic(network, classes)
