"""What every kind of filter works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crfm_core.segmentor.critic import Critic
from crfm_core.text.clip import Clip


@dataclass(frozen=True)
class FilterInputs:
    """What a filter works on, and the models and measurements that its kind needs; what it does not need is None.

    Attributes:
        manifest: the synthetic tiles.
        root: folder that paths in the manifests must stay in.
        out: the manifest to write.
        classes: names of the dataset's classes.
        class_losses: the critic's mean loss per class on real tiles, None for a class that they lack.
    """

    manifest: Path
    root: Path
    out: Path
    classes: Sequence[str]
    critic: Critic | None = None
    class_losses: Sequence[float | None] | None = None
    clip: Clip | None = None
    batch_size: int = 16
