"""What every kind of filter works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from crfm_core import ConfigError
from crfm_core.files import read_json
from crfm_core.segmentor.critic import Critic, load_critic
from crfm_core.text.clip import Clip, load_clip


@dataclass
class FilterInputs:
    """What a filter works on, and the models and measurements that its kind needs, opened when it asks for them.

    Attributes:
        manifest: the synthetic tiles.
        root: folder that paths in the manifests must stay in.
        out: the manifest to write.
        classes: names of the dataset's classes.
        critic_path: checkpoint or folder of the critic.
        losses_path: what :func:`crfm_core.curation.class_losses.class_losses` gave, as JSON.
        clip_path: folder of the CLIP-like model, or the note of fetching it.
    """

    manifest: Path
    root: Path
    out: Path
    classes: Sequence[str]
    critic_path: Path | None = None
    losses_path: Path | None = None
    clip_path: Path | None = None
    device: str = "cpu"
    batch_size: int = 16

    @cached_property
    def critic(self) -> Critic:
        return load_critic(self._required("critic_path"), self.device, self.classes)

    @cached_property
    def class_losses(self) -> Sequence[float | None]:
        """The critic's mean loss per class on real tiles, None for a class that they lack."""
        return read_json(self._required("losses_path"))["losses"]

    @cached_property
    def clip(self) -> Clip:
        return load_clip(self._required("clip_path"), self.device)

    def _required(self, name: str) -> Path:
        if (path := getattr(self, name)) is None:
            raise ConfigError(f"{self.out}: the filter needs {name}, and none is given")
        return path
