"""A sampler opened once, with its generator, critic, decoder and guidance, for tiles, whole scenes and the comparison of corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from crfm_core import ConfigError, WeightsError
from crfm_core.devices import compute_dtype
from crfm_core.files import read_json, sha256_of
from crfm_core.models.controls import check_weights, load_network
from crfm_core.models.decoder import speed_up
from crfm_core.models.flow_schedule import load_scheduler
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.segmentor.critic import Critic, load_critic
from crfm_core.settings import Sampler
from crfm_core.text.encoders import ENCODER_PARTS


@dataclass(frozen=True)
class SamplerSpec:
    """What a named sampler is opened from.

    Attributes:
        name: of the sampler in the configuration; part of each sample's seed.
        settings: the sampler's section.
        generator: MaskToImagePipeline folder.
        classes: the dataset's, which must be the critic's.
        critic: checkpoint or model folder that guides, when the settings correct.
        device: where the networks run.
    """

    name: str
    settings: Sampler
    generator: Path
    classes: Sequence[str]
    critic: Path | None = None
    device: str = "cpu"

    def open(self, unconditional: tuple[Tensor, Tensor] | None = None) -> OpenedSampler:
        """Load the networks. ``unconditional``: embeddings of the empty prompt, [1, T, D] and [1, P], for settings with guidance.

        Raises ConfigError without a critic that the settings need, WeightsError naming what is damaged, of another kind, or for other
        classes.
        """
        settings, dtype, critic = self.settings, compute_dtype(self.device), None
        if settings.rectify:  # the critic first: it may be for other classes, and the generator takes longer to load
            if self.critic is None:
                raise ConfigError(f"sampler {self.name}: corrects its samples and has no critic; give one, or leave out its preset")
            critic = load_critic(self.critic, self.device, self.classes)
        decoder = open_decoder(settings.critic_decoder).to(self.device, dtype) if settings.critic_decoder else None
        pipeline = open_generator(self.generator).to(self.device, dtype)
        if settings.compile:
            pipeline.compile_networks(settings.compile)
        return OpenedSampler(settings, pipeline, critic, decoder, unconditional)

    def weights_digest(self) -> str:
        """Hash of the generator's weights, 64 hex digits."""
        return sha256_of(self.generator / "transformer", self.generator / "vae")

    def dependencies(self) -> dict[str, Any]:
        """What an image depends on beside generator, prompt and seed: settings, and the files they name by their contents."""
        correction = self.settings.rectify
        found = {key: value for key, value in self.settings.result_keys().items() if key not in ("preset", "rectify", "critic_decoder")}
        if correction:
            found["rectify"] = asdict(correction)
            found["guided_by"] = [sha256_of(path) for path in (self.critic, self.settings.critic_decoder) if path]
        return found


class DrawnImages(NamedTuple):
    """Images [B, H, W, 3] in [0, 1], and the records and notes of :class:`crfm_core.sampling.pipeline.MaskToImageOutput`."""

    images: np.ndarray
    records: list[list[dict[str, float]]]
    notes: list[str]


@dataclass(frozen=True)
class OpenedSampler:
    """The networks of a sampler and its settings, ready to draw.

    ``dataclasses.replace(sampler, settings=...)`` draws with other settings by the same networks.
    """

    settings: Sampler
    pipeline: MaskToImagePipeline
    critic: Critic | None = None
    critic_decoder: torch.nn.Module | None = None
    unconditional: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        masks: np.ndarray | Tensor,
        embeds: Tensor,
        pooled: Tensor,
        generator: torch.Generator | Sequence[torch.Generator],
        callback_on_step_end: Callable | None = None,
    ) -> DrawnImages:
        """Draw one image per mask [B, H, W]; arguments as of :meth:`MaskToImagePipeline.__call__`."""
        negative_embeds, negative_pooled = self.unconditional or (None, None)
        drawn = self.pipeline(
            masks=masks,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative_embeds,
            negative_pooled_prompt_embeds=negative_pooled,
            guidance_scale=self.settings.guidance_scale,
            mask_guidance_scale=self.settings.mask_guidance_scale,
            critic=self.critic,
            critic_decoder=self.critic_decoder,
            rectify=self.settings.rectify,
            num_inference_steps=self.settings.num_steps,
            pad=self.settings.pad,
            generator=generator,
            output_type="np",
            callback_on_step_end=callback_on_step_end,
            progress=False,
            return_dict=False,
        )
        return DrawnImages(*drawn)


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] as uint8 of the same shape."""
    return (images * 255).round().astype(np.uint8)


def open_generator(folder: Path) -> MaskToImagePipeline:
    """The pipeline in a generator's folder, without its text encoders: for prompt embeddings.

    Raises WeightsError naming what is damaged, or which weights do not fit the network's configuration.
    """
    network = load_network(folder / "transformer")
    check_weights(folder / "vae", AutoencoderKL)
    try:
        pipeline = MaskToImagePipeline.from_pretrained(
            folder, transformer=network, scheduler=load_scheduler(folder), **dict.fromkeys(ENCODER_PARTS)
        )
    except (OSError, ValueError) as error:  # among others when the folder asks to run code that came with it
        raise WeightsError(f"{folder}: cannot be opened as a generator ({error}); copy or make it again") from None
    speed_up(pipeline.vae)
    return pipeline


def open_decoder(folder: Path | str) -> torch.nn.Module:
    """A smaller decoder for the critic to look through: a diffusers ``AutoencoderTiny`` or ``AutoencoderKL``, frozen.

    Raises WeightsError when the folder holds neither, or its weights are damaged.
    """
    kinds = {kind.__name__: kind for kind in (AutoencoderTiny, AutoencoderKL)}
    name = read_json(Path(folder) / "config.json").get("_class_name")
    if name not in kinds:
        raise WeightsError(f"{folder}: holds a {name}; critic_decoder needs one of {', '.join(kinds)}")
    check_weights(folder, kinds[name])
    decoder = kinds[name].from_pretrained(str(folder), local_files_only=True).requires_grad_(False).eval()
    speed_up(decoder)
    return decoder
