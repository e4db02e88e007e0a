"""Critics from checkpoints of mmsegmentation: the network and the normalisation of images that their configuration describes.

The configuration is Python source. Running it is how mmengine reads it, and here it never is: it is parsed, values are taken from
it, and what a value may name is limited to registered parts of networks.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crfm_core import CrfmError, WeightsError
from crfm_core.segmentor.critic import Critic, Preparation
from crfm_core.segmentor.openmmlab import build_network, load_mmseg, load_weights

if TYPE_CHECKING:
    from mmseg.models import BaseSegmentor

#: Keys of a network's configuration that only training needs, or that would have weights fetched, or files read.
DROPPED = {"pretrained", "init_cfg", "train_cfg", "loss_decode", "sampler", "auxiliary_head", "_scope_", "_delete_"}


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
        model = config.get("model")
        if not isinstance(model, dict) or model.get("type") not in ("EncoderDecoder", "CascadeEncoderDecoder"):
            kind = model.get("type") if isinstance(model, dict) else None
            raise ValueError(f"describes a model of type {kind}; EncoderDecoder or CascadeEncoderDecoder can be a critic")
        preparation = _preparation(model.pop("data_preprocessor", None) or config.get("data_preprocessor"), config)
        model = _checked(model, "model")
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: its configuration {error}; nothing of it was run, give another checkpoint") from None
    network = _build(model, path)
    load_weights(network, {name: weight for name, weight in weights.items() if not name.startswith("auxiliary_head.")}, path)
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or map(str, range(network.out_channels))
    classes = [str(name) for name in classes]
    if network.out_channels != len(classes) or len(classes) < 2:
        raise WeightsError(
            f"{path}: gives {network.out_channels} maps for {len(classes)} classes; a critic must give one for each (two for two classes)"
        )
    return Critic(network, classes, preparation)


def _build(model: dict, path: Path | str) -> BaseSegmentor:
    from mmengine.config import ConfigDict

    try:
        return build_network(ConfigDict(model))
    except CrfmError as error:
        raise WeightsError(f"{path}: {error}") from None
    except Exception as error:  # whatever a constructor says to arguments that it cannot take
        raise WeightsError(f"{path}: its network cannot be built with this mmsegmentation ({type(error).__name__}: {error})") from None


# ------------------------------------------------------------------------------------------------------- configuration


def parse_config(text: str) -> dict[str, Any]:
    """The values that the source of a configuration binds to names, without running it.

    It may hold assignments of literals, lists, tuples, ``dict(...)`` and names bound before; that is all that mmengine writes.
    Raises ValueError, saying where, for anything else.
    """
    names = {"inf": math.inf, "nan": math.nan}
    try:
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    names[name] = _value(value, names)
                case _:
                    raise _no_value(statement)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be parsed ({type(error).__name__})") from None
    return names


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(number := _value(operand, names), int | float):
            return -number
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(key, names): _value(value, names) for key, value in zip(keys, values, strict=True)}
        # mmengine writes dict({...}) where a key is no identifier
        case ast.Call(func=ast.Name(id="dict"), args=[] | [ast.Dict()] as given, keywords=pairs) if all(pair.arg for pair in pairs):
            return {**(_value(given[0], names) if given else {}), **{pair.arg: _value(pair.value, names) for pair in pairs}}
    raise _no_value(node)


def _no_value(node: ast.AST) -> ValueError:
    return ValueError(f"holds more than values (line {node.lineno}: {ast.unparse(node)[:80]})")


def _checked(value: Any, where: str) -> Any:
    """A copy without the keys in DROPPED; ValueError for a type that is not registered, and text that could name a file or address.

    A registered part may open what it is told to (class weights, embeddings, backbones), and mmengine opens pickles too.
    """
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in DROPPED}
        if "type" in value:
            kind = "BN" if value["type"] in ("SyncBN", "MMSyncBN") else value["type"]  # one process, and statistics that do not change
            if not isinstance(kind, str) or not _registered(kind):
                raise ValueError(f"asks for {where}.type: {kind!r}, which this mmsegmentation does not have")
            value["type"] = kind
        return {key: _checked(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_checked(item, f"{where}.{index}") for index, item in enumerate(value))
    if isinstance(value, str) and not re.fullmatch(r"[\w -]*", value):
        raise ValueError(f"has text that could name a file or an address: {where}: {value!r}")
    return value


def _registered(name: str) -> bool:
    """Whether a type is at hand: the registry imports the path that any other name spells."""
    load_mmseg()
    from mmseg.registry import MODELS

    registry = MODELS
    while registry is not None:
        if name in registry.module_dict:
            return True
        registry = registry.parent
    return False


# -------------------------------------------------------------------------------------------------------------- images


def _preparation(described: dict | None, config: dict) -> Preparation:
    """What mmsegmentation does to an image of 0...255 before prediction, in the scale of images in [0, 1]."""
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


def _loads_rgb(config: dict) -> bool:
    """Whether the first step of the test pipeline gives RGB; mmcv's usual ways to read an image give BGR."""
    first = next(iter(config.get("test_pipeline") or [{}]), {})
    return first.get("type") == "LoadSingleRSImageFromFile" or first.get("imdecode_backend") == "tifffile"
