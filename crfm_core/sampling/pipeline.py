"""From label maps to images: the diffusers pipeline of the tri-attention generator, with the critic's correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor
from tqdm import tqdm

from crfm_core import WeightsError
from crfm_core.models.controls import Network, load_network
from crfm_core.models.latent_space import decode_latents, downscaling
from crfm_core.models.mask_encoding import CODES, IGNORE, mask_latents
from crfm_core.sampling.flow import euler_step, noise_levels
from crfm_core.sampling.rectify import RectifySettings, critic_loss, rectify_velocity
from crfm_core.text.encoders import PARTS, TextEncoders

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class MaskToImageOutput(BaseOutput):
    """Images, and per sample one record for each corrected step: ``step`` (index), ``sigma``, ``step_size``, the critic's
    ``loss_before`` and ``loss_after``, and the lengths of the gradient's and the clamp's change of the velocity relative to
    the velocity's (``gradient_ratio``, ``clamp_ratio``)."""

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    records: list[list[dict[str, float]]]


class MaskToImagePipeline(DiffusionPipeline):
    """Images for label maps and prompts, with a mask branch in the transformer and, if wanted, a critic that corrects.

    The components are those of Stable Diffusion 3.5, with a network of :mod:`crfm_core.models.controls` as transformer; the
    text encoders and tokenizers may be left out when prompt embeddings are given. ``num_classes`` and ``mask_code`` (see
    :func:`crfm_core.models.mask_encoding.encode_mask_levels`) are those the transformer was trained with and are kept in
    the folder. The VAE is frozen.

    Example:
        >>> pipe = MaskToImagePipeline.from_pretrained("results/embedded/generators/triattention")
        >>> masks = np.zeros((1, 64, 64), dtype=np.uint8)
        >>> image = pipe(masks, "a satellite image of background", generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components: ClassVar[list[str]] = list(PARTS)
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def __init__(
        self,
        transformer: Network,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        num_classes: int | None = None,  # diffusers takes an argument without a default for a component
        mask_code: str = "grey",
        text_encoder: torch.nn.Module | None = None,
        tokenizer: Any = None,
        text_encoder_2: torch.nn.Module | None = None,
        tokenizer_2: Any = None,
        text_encoder_3: torch.nn.Module | None = None,
        tokenizer_3: Any = None,
    ) -> None:
        super().__init__()
        if num_classes is None or not 1 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes={num_classes}: give the number of classes the transformer was trained with, 1 ... {IGNORE}")
        if mask_code not in CODES:
            raise ValueError(f"mask_code={mask_code!r}: must be one of {', '.join(CODES)}")
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae.requires_grad_(False),  # the correction differentiates through it, never by its weights
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.register_to_config(num_classes=num_classes, mask_code=mask_code)
        self.image_processor = VaeImageProcessor(vae_scale_factor=downscaling(vae))

    @torch.no_grad()
    def __call__(
        self,
        masks: np.ndarray | Tensor,
        prompts: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        critic: Callable[[Tensor], Tensor] | None = None,
        rectify: RectifySettings | None = None,
        num_inference_steps: int = 23,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = True,
        return_dict: bool = True,
    ) -> MaskToImageOutput | tuple:
        """Draw one image per mask.

        Args:
            masks: class ids, [B, H, W] integers; 255 is ignored, and a mask of nothing else is sampled without correction.
            prompts: one for all or one per mask; or ``prompt_embeds`` [B, T, D] and ``pooled_prompt_embeds`` [B, P].
            critic: images [B, 3, H, W] in [0, 1] -> logits [B, K, H, W], frozen and in eval mode; needed by ``rectify``.
            rectify: settings of the correction; None samples plainly.
            generator: for the noise, which is drawn sample by sample on the CPU in float32: one for all, or one per mask, which
                makes a sample independent of its batch.
            latents: noise to start from, [B, C, h, w], instead of drawing it.
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W] in [0, 1]) or "latent" (normalised).
            callback_on_step_end: called with the pipeline, the step, 1000 σ and the tensors named in
                ``callback_on_step_end_tensor_inputs``; tensors in the dict it returns replace them.
            progress: show a bar, on a terminal.

        Returns: :class:`MaskToImageOutput`, or the tuple of its fields.
        Raises: ValueError naming the argument and its value; WeightsError when the networks give numbers that are not finite.
        """
        self.check_inputs(
            masks,
            prompts,
            prompt_embeds,
            pooled_prompt_embeds,
            critic,
            rectify,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, dtype = self._execution_device, self.transformer.dtype
        labels = torch.as_tensor(masks).to(device=device, dtype=torch.long)
        if prompts is not None:
            prompts = [prompts] * len(labels) if isinstance(prompts, str) else list(prompts)
            prompt_embeds, pooled_prompt_embeds = self._text_encoders().encode(prompts)
        prompt_embeds, pooled_prompt_embeds = prompt_embeds.to(device, dtype), pooled_prompt_embeds.to(device, dtype)
        mask = mask_latents(labels, self.vae, self.config.num_classes, self.config.mask_code).to(dtype)
        if latents is None:
            latents = self._noise(mask.shape, generator)
        # z, v and σ stay in float32 whatever the networks compute in: a correction is lost in bfloat16.
        latents = latents.to(device, torch.float32)

        sigmas = noise_levels(num_inference_steps, self.scheduler.config.shift, self.scheduler.config.num_train_timesteps).tolist()
        step_sizes = rectify.step_sizes(num_inference_steps) if rectify else []
        records: list[list[dict[str, float]]] = [[] for _ in labels]
        bar = {"disable": None if progress else True, **getattr(self, "_progress_bar_config", {})}
        for step in tqdm(range(num_inference_steps), **bar):
            sigma = sigmas[step]
            timestep = torch.full((len(labels),), 1000 * sigma, device=device)
            velocity = self.transformer(latents.to(dtype), prompt_embeds, pooled_prompt_embeds, timestep, mask).sample.float()
            if step < len(step_sizes):
                velocity, measured = self._rectified(velocity, latents, sigma, labels, critic, rectify, step_sizes[step])
                for record, numbers in zip(records, measured, strict=True):
                    record.append({"step": step, "sigma": sigma, "step_size": step_sizes[step], **numbers})
            latents = euler_step(latents, velocity, sigma, sigmas[step + 1])
            if callback_on_step_end is not None:
                state = {"latents": latents, "prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
                given = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                state |= callback_on_step_end(self, step, 1000 * sigma, given) or {}
                latents, prompt_embeds, pooled_prompt_embeds = (state[name] for name in self._callback_tensor_inputs)

        images = latents if output_type == "latent" else decode_latents(latents, self.vae)
        if not images.isfinite().all():
            raise WeightsError(f"the images hold numbers that are not finite; damaged weights, or {dtype} is too narrow: use float32")
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return MaskToImageOutput(images=images, records=records) if return_dict else (images, records)

    def _rectified(
        self,
        velocity: Tensor,
        latents: Tensor,
        sigma: float,
        labels: Tensor,
        critic: Callable[[Tensor], Tensor],
        settings: RectifySettings,
        step_size: float,
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The corrected velocity, and what the correction did to each sample."""

        def decode(clean: Tensor) -> Tensor:
            return decode_latents(clean, self.vae)

        done = rectify_velocity(velocity, latents, sigma, labels, decode, critic, settings, step_size)
        after = critic_loss(latents - sigma * done.velocity, labels, decode, critic, settings.pixels)
        columns = {
            "loss_before": done.loss.tolist(),
            "loss_after": after.tolist(),
            "gradient_ratio": done.gradient_ratio.tolist(),
            "clamp_ratio": done.clamp_ratio.tolist(),
        }
        return done.velocity, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _noise(self, shape: torch.Size, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        each = generator if isinstance(generator, Sequence) else [generator] * shape[0]
        return torch.stack([torch.randn(shape[1:], generator=own) for own in each])

    def _text_encoders(self) -> TextEncoders:
        return TextEncoders(**{name: getattr(self, name) for name in PARTS})

    def check_inputs(
        self,
        masks: np.ndarray | Tensor,
        prompts: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        critic: Callable[[Tensor], Tensor] | None,
        rectify: RectifySettings | None,
        num_inference_steps: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise ValueError, naming argument and value, for what :meth:`__call__` cannot work with."""
        labels = torch.as_tensor(masks)
        if labels.ndim != 3 or labels.is_floating_point() or not labels.numel():
            raise ValueError(f"masks has shape {tuple(labels.shape)} and type {labels.dtype}: needs class ids, integers [B, H, W]")
        labels = labels.long()
        batch, *size = labels.shape
        self._check_ids(labels, self.config.num_classes, "the pipeline")
        shrink = downscaling(self.vae)
        grain = shrink * self.transformer.config.patch_size
        if size[0] % grain or size[1] % grain:
            raise ValueError(f"masks has size {size[0]}x{size[1]}: height and width must be divisible by {grain}")
        self._check_prompts(batch, prompts, prompt_embeds, pooled_prompt_embeds)

        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        if rectify is not None:
            if critic is None:
                raise ValueError("critic=None: rectify needs a critic to correct by")
            if rectify.steps > num_inference_steps:
                raise ValueError(f"rectify.steps={rectify.steps}: must not exceed num_inference_steps={num_inference_steps}")
            if hasattr(critic, "classes"):
                self._check_ids(labels, len(critic.classes), "the critic")

        each = generator if isinstance(generator, Sequence) else [generator]
        if isinstance(generator, Sequence) and len(each) != batch:
            raise ValueError(f"generator has {len(each)} entries: needs one for all or one for each of the {batch} masks")
        strange = {str(own.device) for own in each if own is not None and own.device.type != "cpu"}
        if strange:
            raise ValueError(f"generator lies on {', '.join(strange)}: noise is drawn on the CPU, so that no device changes it")
        expected = (batch, self.transformer.config.in_channels, size[0] // shrink, size[1] // shrink)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: needs {expected}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}: known are {self._callback_tensor_inputs}")

    def _check_ids(self, labels: Tensor, count: int, whose: str) -> None:
        strange = labels[((labels < 0) | (labels >= count)) & (labels != IGNORE)]
        if strange.numel():
            raise ValueError(f"masks holds ids {strange.unique().tolist()[:5]}: {whose} knows 0 ... {count - 1} and {IGNORE} = ignore")

    def _check_prompts(
        self, batch: int, prompts: str | Sequence[str] | None, prompt_embeds: Tensor | None, pooled_prompt_embeds: Tensor | None
    ) -> None:
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ValueError("prompt_embeds and pooled_prompt_embeds go together: give both or prompts")
        if (prompts is None) == (prompt_embeds is None):
            raise ValueError(f"prompts={prompts!r}: give either prompts or prompt_embeds and pooled_prompt_embeds")
        if prompts is not None:
            absent = [name for name in PARTS if getattr(self, name) is None]
            if absent:
                raise ValueError(f"prompts={prompts!r}: the pipeline has no {', '.join(absent)}; give prompt_embeds instead")
            if not isinstance(prompts, str) and len(prompts) != batch:
                raise ValueError(f"prompts has {len(prompts)} entries: needs one for all or one for each of the {batch} masks")
            return
        shapes, config = (tuple(prompt_embeds.shape), tuple(pooled_prompt_embeds.shape)), self.transformer.config
        if len(shapes[0]) != 3 or (shapes[0][0], shapes[0][2]) != (batch, config.joint_attention_dim):
            raise ValueError(f"prompt_embeds has shape {shapes[0]}: needs [{batch}, T, {config.joint_attention_dim}]")
        if shapes[1] != (batch, config.pooled_projection_dim):
            raise ValueError(f"pooled_prompt_embeds has shape {shapes[1]}: needs {(batch, config.pooled_projection_dim)}")


def open_generator(folder: Path) -> MaskToImagePipeline:
    """The pipeline in a generator's folder, without its text encoders: for prompt embeddings.

    Raises WeightsError naming what is damaged, or which weights do not fit the network's configuration.
    """
    network = load_network(folder / "transformer")
    return MaskToImagePipeline.from_pretrained(folder, transformer=network, **dict.fromkeys(PARTS))
