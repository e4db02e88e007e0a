"""Networks that others describe: what a configuration may name, how it prepares images, and how class weights enter its losses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from crfm_core import ConfigError, CrfmError
from crfm_core.segmentor.mmseg.configuration import read_config
from crfm_core.segmentor.mmseg.networks import load_mmseg, preprocessor
from crfm_core.segmentor.preparation import Preparation

#: Keys of a network's description that are never taken: they would have weights fetched or files read, or mean something to mmengine alone.
NEVER_TAKEN = frozenset({"pretrained", "init_cfg", "_scope_", "_delete_"})
#: Keys that only training needs.
ONLY_TRAINING = frozenset({"train_cfg", "loss_decode", "sampler", "auxiliary_head"})

#: Types under another name: batch norm over several processes is put in where there are several, and ConvNeXt is this package's.
SAME_TYPES = {"SyncBN": "BN", "MMSyncBN": "BN", "mmpretrain.ConvNeXt": "ConvNeXt", "mmcls.ConvNeXt": "ConvNeXt"}

#: A step of a data pipeline that loads RGB; mmcv's usual ways to load an image give BGR.
RGB_STEP = {"type": "LoadSingleRSImageFromFile"}


def read_description(
    config: dict[str, Any],
    path: Path | str,
    fault: type[CrfmError],
    dropped: Collection[str] = (),
    default: Preparation | None = None,
) -> tuple[dict[str, Any], Preparation]:
    """The network of a configuration, checked, and how images are prepared for it.

    Args:
        config: its values by name.
        path: where it is from, for messages.
        dropped: further keys that are left out, wherever they occur.
        default: how images are prepared where the configuration does not say it; None: it must.

    Raises ``fault`` when it describes no network that can segment, or names parts that this mmsegmentation does not have.
    """
    try:
        if "model" not in config:
            raise ValueError("holds no `model`")
        model = config["model"]
        kind = model.get("type") if isinstance(model, dict) else type(model).__name__
        if kind not in ("EncoderDecoder", "CascadeEncoderDecoder"):
            raise ValueError(f"describes a model of type {kind}; EncoderDecoder or CascadeEncoderDecoder is needed")
        preparation = preparation_of(config, default)
        network = {key: value for key, value in model.items() if key != "data_preprocessor"}
        return _checked(network, "model", NEVER_TAKEN.union(dropped)), preparation
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise fault(f"{path}: its configuration {error}; nothing of it was run, give another one") from None


def _checked(value: Any, where: str, dropped: Collection[str]) -> Any:
    """A copy without the keys in ``dropped``; ValueError for a type that is not registered, and text that could name a file or address.

    A registered part may open files that its arguments name (class weights, embeddings, backbones), and mmengine opens pickles too.
    """
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in dropped}
        if "type" in value:
            kind = value["type"]
            kind = SAME_TYPES.get(kind, kind) if isinstance(kind, str) else kind
            if not isinstance(kind, str) or not _registered(kind):
                raise ValueError(f"names {where}.type: {kind!r}, which this mmsegmentation does not have")
            value["type"] = kind
        return {key: _checked(item, f"{where}.{key}", dropped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_checked(item, f"{where}.{index}", dropped) for index, item in enumerate(value))
    if isinstance(value, str) and not re.fullmatch(r"[\w -]*", value):
        raise ValueError(f"has text that could name a file or an address: {where}: {value!r}")
    return value


def _registered(name: str) -> bool:
    """Whether a type is registered already: for any other name the registry would import the path that it spells."""
    load_mmseg()
    from mmseg.registry import MODELS, TASK_UTILS

    registry = MODELS
    while registry is not None:
        if name in registry.module_dict:
            return True
        registry = registry.parent
    return name in TASK_UTILS.module_dict


def preparation_of(config: dict[str, Any], default: Preparation | None = None) -> Preparation:
    """What mmsegmentation does to an image of 0...255 before prediction, in the scale of images in [0, 1].

    Raises ValueError when the configuration does not say it and there is no default, or it does not suit images of three channels.
    """
    images = config["model"].get("data_preprocessor") or config.get("data_preprocessor")
    if not images:  # mmsegmentation 0.x normalises in the data pipeline
        old = config.get("img_norm_cfg")
        if not old and default:
            return default
        if not isinstance(old, dict):
            raise ValueError("does not say how images are normalised (data_preprocessor)")
        images = {"type": "SegDataPreProcessor", "mean": old["mean"], "std": old["std"], "bgr_to_rgb": old.get("to_rgb", True)}
    if images.get("type") != "SegDataPreProcessor":
        raise ValueError(f"prepares images with {images.get('type')}; known is SegDataPreProcessor")
    mean: Any = images.get("mean")
    std: Any = images.get("std")
    if mean is None:
        mean, std = [0.0], [1.0]
    if not all(isinstance(one, list | tuple) and len(one) in (1, 3) for one in (mean, std)):
        raise ValueError(f"normalises with mean={mean} and std={std}; the images of a critic have three channels")
    padding = images.get("test_cfg") or {}  # without it, prediction does not pad
    reversed_channels = bool(images.get("bgr_to_rgb") or images.get("rgb_to_bgr"))
    first_step: dict[str, Any] = next(iter(config.get("test_pipeline") or [{}]), {})
    loads_rgb = first_step.get("type") == RGB_STEP["type"] or first_step.get("imdecode_backend") == "tifffile"
    return Preparation(
        mean=[value / 255 for value in mean],
        std=[value / 255 for value in std],
        bgr=reversed_channels == loads_rgb,
        size=tuple(padding.get("size") or (0, 0)),
        divisor=padding.get("size_divisor") or 1,
        pad_value=images.get("pad_val", 0),
    )


def describe_file(path: Path | str, num_classes: int) -> dict[str, Any]:
    """The network that a configuration file of mmsegmentation describes, for training on RGB images in 0...255.

    The file is read as data (:func:`crfm_core.segmentor.mmseg.configuration.read_config`). Its heads get ``num_classes`` maps; batch norm
    is that of one process; weights to start from are not fetched; images are padded to a multiple of 32. The network sees them with the
    file's mean and deviation (ImageNet's where it has none) and in the order of channels that the file describes. Losses stay.

    Raises ConfigError when the file holds no such network, or names parts that this mmsegmentation does not have.
    """
    model, images = read_description(read_config(path), path, ConfigError, default=Preparation())
    for _, head in _heads(model):
        head["num_classes"] = num_classes
        for key in ("out_channels", "threshold"):  # one map for two classes
            head.pop(key, None)
    for where, loss in _losses(model):
        if (weights := loss.get("class_weight")) is None:
            continue
        if not isinstance(weights, list | tuple) or len(weights) != num_classes:
            raise ConfigError(
                f"{path}: {where}.class_weight: is {weights!r}; give one number for each of the {num_classes} classes, or none"
            )
        if _is_softmax(loss):  # mmsegmentation's own fails where ignored pixels meet class weights
            loss |= {"type": "WeightedCrossEntropyLoss", "avg_non_ignore": True}
    return {**model, "data_preprocessor": preprocessor(images)}


def config_of(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a network that is described for RGB images."""
    return {"model": model, "test_pipeline": [RGB_STEP]}


def text_of(model: dict[str, Any]) -> str:
    """The source that a checkpoint keeps of a described network, as :mod:`crfm_core.segmentor.critic.mmseg_checkpoint` reads it."""
    return "".join(f"{name} = {value!r}\n" for name, value in config_of(model).items())


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


def _heads(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The heads of a network, each with its key."""
    for key in ("decode_head", "auxiliary_head"):
        yield from _each(model.get(key), f"model.{key}")


def _losses(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The losses of the maps of all heads, each with its key; a head that names none gets mmsegmentation's own."""
    for where, head in _heads(model):
        loss = head.setdefault("loss_decode", {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0})
        yield from _each(loss, f"{where}.loss_decode")


def _each(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The dicts in a value that may be one dict or a list of them."""
    if isinstance(value, list | tuple):
        yield from ((f"{where}.{index}", item) for index, item in enumerate(value) if isinstance(item, dict))
    elif isinstance(value, dict):
        yield where, value


def _is_softmax(loss: dict[str, Any]) -> bool:
    return loss["type"] == "CrossEntropyLoss" and not (loss.get("use_sigmoid") or loss.get("use_mask"))
