"""Critics: segmentors as frozen, differentiable functions from images to logits, from this workflow or from elsewhere.

Each origin of critics is a module here, with a sentence on what it reads (``READS``), a test of whether a file or folder is its own
(``recognises``), and the reading itself (``critic_of``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from crfm_core import WeightsError
from crfm_core.segmentor.critic import mmseg_checkpoint, own_checkpoint, transformers_folder
from crfm_core.segmentor.critic.base import Critic, as_critic
from crfm_core.segmentor.mmseg.weights import read_mmseg_checkpoint

__all__ = ["ORIGINS", "Critic", "as_critic", "check_classes", "load_critic"]

#: Where critics come from; the first module that recognises a file or folder reads it. A new one is a module and its entry here.
ORIGINS = [transformers_folder, own_checkpoint, mmseg_checkpoint]

#: Names that say nothing but the id, as libraries give them to classes without names.
_GENERIC = re.compile(r"((label|class)[\s_-]*)?\d+", re.IGNORECASE)


def load_critic(path: Path | str, device: torch.device | str = "cpu", classes: Sequence[str] | None = None) -> Critic:
    """The critic of a checkpoint or model folder, by the first of :data:`ORIGINS` that recognises it.

    Nothing is downloaded and no code from the checkpoint is run. With ``classes``, those of the data, the critic's must be the same
    (:func:`check_classes`).

    Raises WeightsError when the file is missing, damaged, of another kind, or for other classes.
    """
    path = Path(path)
    content = {} if path.is_dir() else read_mmseg_checkpoint(path)
    weights, meta = content.get("state_dict"), content.get("meta")
    if not isinstance(weights, dict) or not isinstance(meta, dict):
        weights, meta = {}, {}
    for origin in ORIGINS:
        if origin.recognises(path, meta):
            critic = origin.critic_of(path, weights, meta)
            if classes is not None:
                check_classes(critic.classes, classes, path)
            return critic.to(device)
    known = "; ".join(module.READS for module in ORIGINS)
    raise WeightsError(f"{path}: no critic can be read from it (it lacks weights, or meta that says what they are); give one of: {known}")


def check_classes(critic_classes: Sequence[str], dataset_classes: Sequence[str], path: Path | str) -> None:
    """Check that a critic's classes are those of the data, in the same order: its logits are compared with the masks by id.

    Names are compared without regard to case, and to which of space, underscore and hyphen separates words. If all of the critic's
    names are generic (``LABEL_0``, ``0``), only their number is compared. Raises WeightsError naming the first ids that differ;
    ``path`` is the checkpoint.
    """
    remedy = "give a critic of the dataset's classes, or put `classes` of the dataset, and its label_map, in the order of the critic"
    if len(critic_classes) != len(dataset_classes):
        raise WeightsError(
            f"{path}: has {len(critic_classes)} classes ({', '.join(critic_classes)}), the dataset {len(dataset_classes)} "
            f"({', '.join(dataset_classes)}); {remedy}"
        )
    if all(_GENERIC.fullmatch(name.strip()) for name in critic_classes):
        return
    pairs = enumerate(zip(critic_classes, dataset_classes, strict=True))
    wrong = [f"{i} is {one!r}, not {other!r}" for i, (one, other) in pairs if _plain(one) != _plain(other)]
    if wrong:
        raise WeightsError(f"{path}: its classes are not the dataset's: {'; '.join(wrong[:3])}{' ...' if wrong[3:] else ''}; {remedy}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
