"""A segmentor as a frozen, differentiable function from images to logits: one this workflow trained, or one from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crfm_core import WeightsError
from crfm_core.segmentor.openmmlab import ARCHITECTURES, DIVISOR, Preparation, build_model, load_weights, read_checkpoint

#: What segmentors see that this workflow trains from a name.
OWN = Preparation(divisor=DIVISOR)


class Critic(nn.Module):
    """images float [B,3,H,W] in [0,1] -> logits [B,K,H,W]; weights frozen, in eval mode, differentiable in the images.

    Args:
        network: what turns prepared images into logits; taken as it is and frozen in place.
        classes: names of the K classes in the order of their ids.
        preparation: what the network was trained with; the default is that of segmentors trained by this workflow.
        answer: (network, prepared images [B,3,h,w]) -> logits [B,K,h',w'], enlarged bilinearly to [h,w] if they are smaller; the
            default is mmsegmentation's ``encode_decode`` of the whole image.

    The network computes in the type of its weights, whatever that of the images, which is also that of the logits.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        preparation: Preparation = OWN,
        answer: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.network = network
        self.classes = list(classes)
        self.preparation = preparation
        self.answer = answer or _encode_decode
        self.register_buffer("mean", torch.tensor(preparation.mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preparation.std, dtype=torch.float32).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Critic:
        """Stay in eval mode, also when a module that holds the critic is set to train."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the size of the images. Raises ValueError when the network does not give one map per class."""
        height, width = images.shape[-2:]
        how = self.preparation
        inputs = ((images.flip(1) if how.bgr else images) - self.mean) / self.std
        bottom, right = (max(least, side + -side % how.divisor) - side for side, least in zip((height, width), how.size, strict=True))
        inputs = F.pad(inputs, (0, right, 0, bottom), value=how.pad_value)
        dtype = next((weight.dtype for weight in self.parameters() if weight.is_floating_point()), images.dtype)
        logits = self.answer(self.network, inputs.to(dtype))
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[1] != len(self.classes):
            given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"critic: the network gave {given}; it must give logits [B, {len(self.classes)}, h, w], one map per class")
        if logits.shape[-2:] != inputs.shape[-2:]:
            logits = F.interpolate(logits, inputs.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width].to(images.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """The same as calling the critic."""
        return self(images)


def _encode_decode(network: nn.Module, inputs: Tensor) -> Tensor:
    return network.encode_decode(inputs, [{"img_shape": inputs.shape[2:]}])


def _call(network: Callable[[Tensor], object], inputs: Tensor) -> Tensor:
    """The logits of anything that has a method, or an output, of that name, or that returns them."""
    answer = getattr(network, "logits", network)(inputs)
    return getattr(answer, "logits", answer)


def as_critic(
    network: nn.Module | Callable[[Tensor], Tensor],
    classes: Sequence[str],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    **preparation,
) -> Critic:
    """A critic of a torch module, or of anything that is called with images, or has ``logits(images)``, and gives logits [B,K,h,w].

    ``mean`` and ``std`` are those of the images the network takes, per channel and for RGB in [0, 1]; the default leaves the images
    as they are. Further arguments as in :class:`Preparation`. The module is frozen and set to eval in place.

        >>> critic = as_critic(my_unet, ["soil", "water"], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    """
    return Critic(network, classes, Preparation(tuple(mean), tuple(std), **preparation), _call)


def load_critic(path: Path | str, device: torch.device | str = "cpu", classes: Sequence[str] | None = None) -> Critic:
    """The critic of a checkpoint or model folder, told apart by what it holds.

    - a checkpoint written by :func:`crfm_core.segmentor.training.train_segmentor` for an architecture that is known by name;
    - a checkpoint of mmsegmentation (``.pth`` with the configuration in its meta), with its own preprocessor, as ``train_segmentor``
      writes it too for a network from a configuration file;
    - a folder of a transformers model for semantic segmentation (``save_pretrained`` of model and image processor).

    Nothing is downloaded and no code from the checkpoint is run. With ``classes``, those of the data, the critic's must be the same
    (:func:`check_classes`).

    Raises WeightsError when the file is missing, damaged, of another kind, or for other classes.
    """
    # The modules for checkpoints from elsewhere are slow to import, and most critics do not need them.
    if Path(path).is_dir():
        from crfm_core.segmentor.transformers_folder import transformers_critic

        critic = transformers_critic(path)
    else:
        stored = read_checkpoint(path)
        meta = stored.get("meta")
        meta = meta if isinstance(meta, dict) and isinstance(stored.get("state_dict"), dict) else {}
        if isinstance(meta.get("segmentor"), dict) and "cfg" not in meta:
            critic = _own_critic(path, stored["state_dict"], meta)
        elif isinstance(text := meta.get("cfg") or meta.get("config"), str):
            from crfm_core.segmentor.mmseg_checkpoint import mmseg_critic

            critic = mmseg_critic(path, stored["state_dict"], meta, text)
        else:
            raise WeightsError(
                f"{path}: neither a segmentor of this workflow nor a checkpoint of mmsegmentation (it lacks weights or a configuration in "
                "its meta); give one of them, or a folder of a transformers model for semantic segmentation"
            )
    if classes is not None:
        check_classes(critic.classes, classes, str(path))
    return critic.to(device)


def _own_critic(path: Path | str, weights: dict, meta: dict) -> Critic:
    architecture, classes = meta["segmentor"].get("architecture"), meta.get("classes")
    if architecture not in ARCHITECTURES or not isinstance(classes, list):
        raise WeightsError(f"{path}: no segmentor of this workflow (it lacks classes or a known architecture); train one with it")
    network = build_model(architecture, len(classes))
    load_weights(network, weights, path)
    return Critic(network, classes)


# ------------------------------------------------------------------------------------------------------------- classes

#: Names that say nothing but the id, as libraries give them to classes without names.
_GENERIC = re.compile(r"((label|class)[\s_-]*)?\d+", re.IGNORECASE)


def check_classes(critic_classes: Sequence[str], dataset_classes: Sequence[str], where: str) -> None:
    """Check that a critic's classes are those of the data, in the same order: its logits are compared with the masks by id.

    Names are compared without regard to case, and to which of space, underscore and hyphen separates words. If all of the critic's
    names are generic (``LABEL_0``, ``0``), only their number is compared. Raises WeightsError naming the first ids that differ;
    ``where`` is the checkpoint.
    """
    remedy = "give a critic of the dataset's classes, or put `classes` of the dataset, and its label_map, in the order of the critic"
    if len(critic_classes) != len(dataset_classes):
        raise WeightsError(
            f"{where}: has {len(critic_classes)} classes ({', '.join(critic_classes)}), the dataset {len(dataset_classes)} "
            f"({', '.join(dataset_classes)}); {remedy}"
        )
    if all(_GENERIC.fullmatch(name.strip()) for name in critic_classes):
        return
    pairs = enumerate(zip(critic_classes, dataset_classes, strict=True))
    wrong = [f"{i} is {one!r}, not {other!r}" for i, (one, other) in pairs if _plain(one) != _plain(other)]
    if wrong:
        raise WeightsError(f"{where}: its classes are not the dataset's: {'; '.join(wrong[:3])}{' ...' if wrong[3:] else ''}; {remedy}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
