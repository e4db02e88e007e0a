"""Networks that others describe: what a configuration may name, how it prepares images, and what of it is trained here."""

from __future__ import annotations

import copy
import inspect
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfm_core import ConfigError, CrfmError
from crfm_core.segmentor.configuration import read_config
from crfm_core.segmentor.openmmlab import Preparation, build_network, load_mmseg, preprocessor

if TYPE_CHECKING:
    from mmseg.models import BaseSegmentor

#: Keys of a network's configuration that would have weights fetched or files read, or that mean something to mmengine alone.
DROPPED = {"pretrained", "init_cfg", "_scope_", "_delete_"}
#: Those that only training needs.
ONLY_TRAINING = {"train_cfg", "loss_decode", "sampler", "auxiliary_head"}

#: Other names of types: batch norm over several processes is put in where there are several, and ConvNeXt is this package's.
NAMES = {"SyncBN": "BN", "MMSyncBN": "BN", "mmpretrain.ConvNeXt": "ConvNeXt", "mmcls.ConvNeXt": "ConvNeXt"}


def described_network(config: dict[str, Any]) -> dict[str, Any]:
    """The section ``model`` of a configuration. Raises ValueError when there is none that can segment."""
    if "model" not in config:
        raise ValueError("holds no `model`")
    model = config["model"]
    kind = model.get("type") if isinstance(model, dict) else type(model).__name__
    if kind not in ("EncoderDecoder", "CascadeEncoderDecoder"):
        raise ValueError(f"describes a model of type {kind}; EncoderDecoder or CascadeEncoderDecoder is needed")
    return model


def checked(value: Any, where: str, dropped: set[str]) -> Any:
    """A copy without the keys in ``dropped``; ValueError for a type that is not registered, and text that could name a file or address.

    A registered part may open what it is told to (class weights, embeddings, backbones), and mmengine opens pickles too.
    """
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in dropped}
        if "type" in value:
            given = value["type"]
            kind = NAMES.get(given, given) if isinstance(given, str) else given
            if not isinstance(kind, str) or not _registered(kind):
                raise ValueError(f"asks for {where}.type: {kind!r}, which this mmsegmentation does not have")
            value["type"] = kind
        return {key: checked(item, f"{where}.{key}", dropped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(checked(item, f"{where}.{index}", dropped) for index, item in enumerate(value))
    if isinstance(value, str) and not re.fullmatch(r"[\w -]*", value):
        raise ValueError(f"has text that could name a file or an address: {where}: {value!r}")
    return value


def _registered(name: str) -> bool:
    """Whether a type is at hand: the registry imports the path that any other name spells."""
    load_mmseg()
    from mmseg.registry import MODELS, TASK_UTILS

    registry = MODELS
    while registry is not None:
        if name in registry.module_dict:
            return True
        registry = registry.parent
    return name in TASK_UTILS.module_dict


def _said(error: Exception) -> str:
    """The kind of an error and its words, or the line of source where it has none."""
    return f"{type(error).__name__}: {str(error) or traceback.extract_tb(error.__traceback__)[-1].line}"


def build_described(model: dict[str, Any], where: Path | str, fault: type[CrfmError]) -> BaseSegmentor:
    """The network of a checked description, which stays as it is. Raises ``fault``, naming ``where``, when it cannot be built."""
    from mmengine.config import ConfigDict

    try:
        return build_network(ConfigDict(copy.deepcopy(model)))
    except CrfmError as error:
        raise fault(f"{where}: {error}") from None
    except Exception as error:  # whatever a constructor says to arguments that it cannot take
        raise fault(f"{where}: its network cannot be built with this mmsegmentation ({_said(error)})") from None


# -------------------------------------------------------------------------------------------------------------- images


def preparation_of(config: dict[str, Any]) -> Preparation:
    """What mmsegmentation does to an image of 0...255 before prediction, in the scale of images in [0, 1].

    Raises ValueError when the configuration does not say it, or says what images of three channels cannot bear.
    """
    described = config["model"].get("data_preprocessor") or config.get("data_preprocessor")
    if described is None:  # mmsegmentation 0.x normalises in the data pipeline
        if not isinstance(old := config.get("img_norm_cfg"), dict):
            raise ValueError("does not say how images are normalised (data_preprocessor)")
        described = {"type": "SegDataPreProcessor", "mean": old["mean"], "std": old["std"], "bgr_to_rgb": old.get("to_rgb", True)}
    if described.get("type") != "SegDataPreProcessor":
        raise ValueError(f"prepares images with {described.get('type')}; known is SegDataPreProcessor")
    mean, std = described.get("mean"), described.get("std")
    if mean is None:
        mean, std = [0.0], [1.0]
    if not all(isinstance(one, list | tuple) and len(one) in (1, 3) for one in (mean, std)):
        raise ValueError(f"normalises with mean={mean} and std={std}; the images of a critic have three channels")
    padding = described.get("test_cfg") or {}  # without it, prediction does not pad
    turned = bool(described.get("bgr_to_rgb") or described.get("rgb_to_bgr"))
    return Preparation(
        mean=[value / 255 for value in mean],
        std=[value / 255 for value in std],
        bgr=turned == _loads_rgb(config),
        size=tuple(padding.get("size") or (0, 0)),
        divisor=padding.get("size_divisor") or 1,
        pad_value=described.get("pad_val", 0),
    )


#: A step of a pipeline that gives RGB; mmcv's usual ways to read an image give BGR.
RGB_STEP = {"type": "LoadSingleRSImageFromFile"}


def _loads_rgb(config: dict[str, Any]) -> bool:
    first = next(iter(config.get("test_pipeline") or [{}]), {})
    return first.get("type") == RGB_STEP["type"] or first.get("imdecode_backend") == "tifffile"


# ------------------------------------------------------------------------------------------------------------ training


def model_of_file(path: Path | str, num_classes: int) -> dict[str, Any]:
    """The network that a configuration file of mmsegmentation describes, for training on images that are given as RGB in 0...255.

    The file is read as data (:func:`crfm_core.segmentor.configuration.read_config`). Its heads get ``num_classes`` maps; batch norm is
    that of one process; weights to start from are not fetched; images are padded to a multiple of 32. The network sees them with the
    file's mean and deviation (ImageNet's where it has none) and in the order of channels that the file describes. Losses stay.

    Raises ConfigError when the file holds no such network, or asks for parts that this mmsegmentation does not have.
    """
    config = read_config(path)
    try:
        model = described_network(config)
        described = model.get("data_preprocessor") or config.get("data_preprocessor") or config.get("img_norm_cfg")
        images = preparation_of(config) if described else Preparation()
        model = checked({key: value for key, value in model.items() if key != "data_preprocessor"}, "model", DROPPED)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: its configuration {error}; nothing of it was run, give another file") from None
    for _, head in _heads(model):
        head["num_classes"] = num_classes
        for key in ("out_channels", "threshold"):  # one map for two classes
            head.pop(key, None)
    _mend_class_weights(model, num_classes, path)
    return {**model, "data_preprocessor": preprocessor(images)}


def try_out(network: BaseSegmentor, size: tuple[int, int], where: Path | str) -> None:
    """See whether a loss comes out for two blank tiles of ``size`` (height, width); the network stays as it is.

    Raises ConfigError, naming ``where``, when its parts do not fit each other or the tiles, or need what is not installed.
    """
    import torch
    from mmengine.structures import BaseDataElement, PixelData

    labels = [BaseDataElement(gt_sem_seg=PixelData(data=torch.zeros(1, *size, dtype=torch.long))) for _ in range(2)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial = copy.deepcopy(network)
            data = trial.data_preprocessor({"inputs": [torch.zeros(3, *size)] * 2, "data_samples": labels}, training=True)
            trial(**data, mode="loss")
    except CrfmError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # whatever its parts say to each other
        tiles = "x".join(map(str, size))
        raise ConfigError(f"{where}: its network cannot learn from tiles of {tiles} pixels ({_said(error)})") from None


def text_of_model(model: dict[str, Any]) -> str:
    """The source that a checkpoint keeps of a network, for :func:`crfm_core.segmentor.mmseg_checkpoint.mmseg_critic`."""
    return f"model = {model!r}\ntest_pipeline = {[RGB_STEP]!r}\n"


def _heads(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The heads of a network and where they are."""
    for key in ("decode_head", "auxiliary_head"):
        given = model.get(key)
        for index, head in enumerate(given if isinstance(given, list | tuple) else [given]):
            if isinstance(head, dict):
                yield f"model.{key}.{index}" if isinstance(given, list | tuple) else f"model.{key}", head


def _losses(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The losses of the maps of all heads and where they are; a head that names none gets mmsegmentation's own."""
    for where, head in _heads(model):
        given = head.setdefault("loss_decode", {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0})
        for index, loss in enumerate(given if isinstance(given, list | tuple) else [given]):
            yield f"{where}.loss_decode.{index}" if isinstance(given, list | tuple) else f"{where}.loss_decode", loss


def _mend_class_weights(model: dict[str, Any], num_classes: int, path: Path | str) -> None:
    """Check the class weights that the losses of a file have, and use the loss that can bear ignored pixels beside them."""
    for where, loss in _losses(model):
        if (given := loss.get("class_weight")) is None:
            continue
        if not isinstance(given, list | tuple) or len(given) != num_classes:
            raise ConfigError(f"{path}: {where}.class_weight: is {given!r}; give one number for each of the {num_classes} classes, or none")
        if _is_softmax(loss):
            loss |= {"type": "WeightedCrossEntropyLoss", "avg_non_ignore": True}


def weigh_classes(model: dict[str, Any], weights: list[float]) -> None:
    """Give every loss of a network these class weights. Raises ConfigError for a loss that takes none."""
    load_mmseg()
    from mmseg.registry import MODELS

    for where, loss in _losses(model):
        kind = MODELS.get(loss["type"])
        if "class_weight" not in inspect.signature(kind.__init__).parameters:
            raise ConfigError(
                f"class_weights: {where} is a {loss['type']}, which takes none; leave class_weights out, or take another loss"
            )
        if _is_softmax(loss):
            loss["type"] = "WeightedCrossEntropyLoss"
        loss["class_weight"] = list(weights)


def _is_softmax(loss: dict[str, Any]) -> bool:
    return loss["type"] == "CrossEntropyLoss" and not (loss.get("use_sigmoid") or loss.get("use_mask"))
