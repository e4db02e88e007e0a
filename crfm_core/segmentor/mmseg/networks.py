"""Networks of mmsegmentation: built by the name of an architecture or from a description, and tried out before they train."""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crfm_core import ConfigError, CrfmError
from crfm_core.segmentor.mmseg.architectures import ARCHITECTURES
from crfm_core.segmentor.preparation import DIVISOR, OWN, Preparation

if TYPE_CHECKING:
    from mmseg.models import BaseSegmentor


def load_mmseg() -> None:
    """Import mmsegmentation, and register its parts of networks and those that this package adds. It takes seconds the first time."""
    import crfm_core.segmentor.mmseg.parts  # noqa: F401


def preprocessor(images: Preparation) -> dict[str, Any]:
    """mmsegmentation's description of how RGB images in 0...255 are prepared, padded to a multiple of :data:`DIVISOR`."""
    return {
        "type": "SegDataPreProcessor",
        "mean": [255 * value for value in images.mean],
        "std": [255 * value for value in images.std],
        "bgr_to_rgb": images.bgr,  # or the other way round
        "size_divisor": DIVISOR,
        "test_cfg": {"size_divisor": DIVISOR},
        "pad_val": 0,
        "seg_pad_val": 255,
    }


def describe_architecture(architecture: str, num_classes: int) -> dict[str, Any]:
    """mmsegmentation's description of an EncoderDecoder that takes RGB in 0...255 and normalises it itself while training.

    Raises ConfigError for an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture: unknown name {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    network = ARCHITECTURES[architecture](num_classes)
    return {"type": "EncoderDecoder", "data_preprocessor": preprocessor(OWN), "train_cfg": {}, "test_cfg": {"mode": "whole"}, **network}


def build_segmentor(description: dict[str, Any]) -> BaseSegmentor:
    """The network of a description that is trusted (building it calls whatever ``type`` names), with random weights from torch's
    generator, in training mode. The description stays as it is."""
    load_mmseg()
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope("mmseg"):
        warnings.simplefilter("ignore")  # mmsegmentation warns about its own deprecated builders
        return MODELS.build(ConfigDict(copy.deepcopy(description)))


def build_model(architecture: str, num_classes: int) -> BaseSegmentor:
    """The network of an architecture, as :func:`build_segmentor` builds it."""
    return build_segmentor(describe_architecture(architecture, num_classes))


def build_described(description: dict[str, Any], path: Path | str, fault: type[CrfmError]) -> BaseSegmentor:
    """The network of a checked description from the file ``path``. Raises ``fault``, naming ``path``, when it cannot be built."""
    with _explained(path, fault, "cannot be built with this mmsegmentation"):
        return build_segmentor(description)


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, list]:
    """A batch as mmsegmentation's preprocessor takes it, which pads and stacks: lists of images [3,H,W] and of labels [H,W]."""
    from mmengine.structures import BaseDataElement, PixelData

    labels = [BaseDataElement(gt_sem_seg=PixelData(data=sample["label"][None])) for sample in samples]
    return {"inputs": [sample["image"] for sample in samples], "data_samples": labels}


def try_out(network: BaseSegmentor, size: tuple[int, int], path: Path | str) -> None:
    """Compute a loss for two blank tiles of ``size`` (height, width); the network stays as it is.

    Raises ConfigError, naming ``path``, when its parts do not fit each other or the tiles, or need what is not installed.
    """
    blank = {"image": torch.zeros(3, *size), "label": torch.zeros(size, dtype=torch.long)}
    failure = f"cannot learn from tiles of {size[0]}x{size[1]} pixels"
    with _explained(path, ConfigError, failure), torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(network)
        trial(**trial.data_preprocessor(collate([blank, blank]), training=True), mode="loss")


@contextlib.contextmanager
def _explained(path: Path | str, fault: type[CrfmError], failure: str) -> Iterator[None]:
    """Raise any error as ``fault``: the network of the file ``path`` has this failure."""
    try:
        yield
    except CrfmError as error:
        raise fault(f"{path}: {error}") from None
    except Exception as error:  # constructors, and parts that do not fit, raise all kinds
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise fault(f"{path}: its network {failure} ({type(error).__name__}: {reason})") from None
