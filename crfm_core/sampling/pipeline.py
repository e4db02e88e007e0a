"""From label maps to images: the diffusers pipeline of the tri-attention generator, with the critic's correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from crfm_core import WeightsError
from crfm_core.checkpoints import check_scheduler
from crfm_core.data.rasters import IGNORE
from crfm_core.models.controls import network_classes
from crfm_core.models.decoder import choose_checkpointing
from crfm_core.models.latent_space import CODES, decode_latents, downscaling, mask_latents
from crfm_core.models.network import ControlNetwork
from crfm_core.sampling.correction import VelocityCorrector
from crfm_core.sampling.flow import euler_sample, noise_levels
from crfm_core.sampling.guidance import GuidedVelocity
from crfm_core.sampling.rectify import RectifySettings
from crfm_core.text.encoders import ENCODER_PARTS, TextEncoders

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class MaskToImageOutput(BaseOutput):
    """Images and what the critic's correction did.

    Attributes:
        images: as ``output_type`` says.
        records: per sample one dict for each step it was corrected in: ``step`` (index), ``sigma``, ``step_size`` (0 where a search
            found none that helps), the critic's ``loss_before`` and ``loss_after`` (None where it was not measured), the share of
            labelled pixels it gave the right class before (``agreement``), and the lengths of the gradient's and the clamp's
            change of the velocity relative to the velocity's (``gradient_ratio``, ``clamp_ratio``).
        notes: per sample what its user should know, e.g. that it could not be corrected; "" for nothing.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    records: list[list[dict[str, float | None]]]
    notes: list[str]


class MaskToImagePipeline(DiffusionPipeline):
    """Images for label maps and prompts, with a mask branch in the transformer and, if wanted, a critic that corrects.

    The components are those of Stable Diffusion 3.5, with a :class:`crfm_core.models.network.ControlNetwork` as transformer; the
    text encoders and tokenizers may be left out when prompt embeddings are given. ``num_classes``, ``mask_code`` (see
    :func:`crfm_core.models.latent_space.encode_mask_levels`), ``caption_dropout`` (the share of empty prompts) and ``knows_missing_masks``
    (its velocity without a mask is a learnt one, see :attr:`crfm_core.settings.Control.knows_missing_masks`) are those the transformer was
    trained with and are kept in the folder. The VAE is frozen.

    Examples:
        >>> pipe = MaskToImagePipeline.from_pretrained("results/embedded/generators/triattention")
        >>> masks = np.zeros((1, 64, 64), dtype=np.uint8)
        >>> image = pipe(masks, "a satellite image of background", generator=torch.Generator().manual_seed(0)).images[0]
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components: ClassVar[list[str]] = list(ENCODER_PARTS)
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def __init__(
        self,
        transformer: ControlNetwork,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        num_classes: int | None = None,  # diffusers takes an argument without a default for a component
        mask_code: str = "grey",
        caption_dropout: float = 0.0,
        knows_missing_masks: bool = False,
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
        check_scheduler({**scheduler.config, "_class_name": type(scheduler).__name__}, "scheduler")
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
        known = {"caption_dropout": caption_dropout, "knows_missing_masks": knows_missing_masks}
        self.register_to_config(num_classes=num_classes, mask_code=mask_code, **known)
        self.image_processor = VaeImageProcessor(vae_scale_factor=downscaling(vae))

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> MaskToImagePipeline:
        """The pipeline that :meth:`save_pretrained` wrote; arguments as of diffusers' ``DiffusionPipeline``."""
        network_classes()  # diffusers takes components from modules that are imported already
        return super().from_pretrained(*arguments, **options)

    @torch.no_grad()
    def __call__(
        self,
        masks: np.ndarray | Tensor,
        prompts: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
        mask_guidance_scale: float = 1.0,
        critic: Callable[[Tensor], Tensor] | None = None,
        critic_decoder: torch.nn.Module | None = None,
        rectify: RectifySettings | None = None,
        num_inference_steps: int = 23,
        pad: bool = False,
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
            negative_prompt_embeds: with ``negative_pooled_prompt_embeds`` what guidance leads away from, [1 or B, T, D] and
                [1 or B, P]; with ``prompts`` the empty prompt is encoded.
            guidance_scale: s > 1 follows v₀ + s (v - v₀), v₀ being the velocity of the empty prompt (classifier-free guidance, Ho
                and Salimans, 2022), at twice the cost; for generators trained with ``caption_dropout``.
            mask_guidance_scale: s > 1 adds s (v - v') in place of v - v', v' being the velocity without the mask, at the cost of one more
                pass; with ``guidance_scale`` v₀ is then without mask, too. For generators that know missing masks.
            critic: images [B, 3, H, W] in [0, 1] -> logits [B, K, H, W], frozen and in eval mode: a function, or anything with such
                a method ``logits``; needed by ``rectify``.
            critic_decoder: a smaller diffusers decoder for the same latents, through which the critic looks; None: the VAE.
            rectify: settings of the correction; None samples plainly.
            pad: enlarge masks that the latent grid does not divide by repeating their edge, which the critic does not judge, and
                crop their images (but not latents); False refuses them.
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
        labels = torch.as_tensor(masks)
        self.check_masks(labels, pad)
        height, width = labels.shape[1:]
        judged, labels = self.pad_labels(labels.long())
        self._check_prompts(len(labels), prompts, prompt_embeds, pooled_prompt_embeds)
        self._check_guidance(len(labels), guidance_scale, prompts, negative_prompt_embeds, negative_pooled_prompt_embeds)
        self._check_mask_guidance(mask_guidance_scale)
        self._check_correction(labels, critic, rectify, num_inference_steps)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * len(labels)
        self._check_drawing(labels, generators, latents, output_type, callback_on_step_end_tensor_inputs)

        device, dtype = self._execution_device, self.transformer.dtype
        judged, labels = judged.to(device), labels.to(device)
        negative = _pair(negative_prompt_embeds, negative_pooled_prompt_embeds)
        if prompts is not None:
            negative = self._text_encoders().encode([""]) if guidance_scale > 1 else None
        texts = [prompts] * len(labels) if isinstance(prompts, str) else list(prompts or ())
        prompt = _pair(prompt_embeds, pooled_prompt_embeds) or self._text_encoders().encode(texts)
        mask = mask_latents(labels, self.vae, self.config.num_classes, self.config.mask_code).to(dtype)
        if latents is None:
            latents = torch.stack([torch.randn(mask.shape[1:], generator=own) for own in generators])
        # z, v and σ stay in float32 whatever the networks compute in: a correction is lost in bfloat16.
        latents = latents.to(device, torch.float32)

        sigmas = self.noise_levels(num_inference_steps)
        scales = guidance_scale, mask_guidance_scale
        guided = GuidedVelocity(self.transformer, sigmas, mask, prompt, negative, *scales)
        decoder = critic_decoder or self.vae
        if rectify is not None:
            choose_checkpointing(decoder, latents)
        corrector = VelocityCorrector(judged, lambda clean: decode_latents(clean, decoder), critic, rectify, num_inference_steps)

        def velocity(latents: Tensor, step: int) -> Tensor:
            return corrector(step, sigmas[step], guided(latents, step), latents)

        def after_step(step: int, latents: Tensor) -> Tensor:
            nonlocal prompt, guided
            state = {"latents": latents, **dict(zip(("prompt_embeds", "pooled_prompt_embeds"), prompt, strict=True))}
            tensors = {name: state[name] for name in callback_on_step_end_tensor_inputs}
            replaced = callback_on_step_end(self, step, 1000 * sigmas[step], tensors) or {} if callback_on_step_end else {}
            if replaced.keys() - {"latents"}:
                prompt = replaced.get("prompt_embeds", prompt[0]), replaced.get("pooled_prompt_embeds", prompt[1])
                guided = GuidedVelocity(self.transformer, sigmas, mask, prompt, negative, *scales)
            return replaced.get("latents", latents)

        steps = tqdm(range(num_inference_steps), **{"disable": None if progress else True, **getattr(self, "_progress_bar_config", {})})
        latents = euler_sample(velocity, latents, sigmas, steps, after_step if callback_on_step_end else None)

        images = latents
        if output_type != "latent":
            images = decode_latents(latents, self.vae)[..., :height, :width]
        if not images.isfinite().all():
            raise WeightsError(f"the images hold numbers that are not finite; damaged weights, or {dtype} is too narrow: use float32")
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        output = MaskToImageOutput(images, corrector.records, corrector.notes)
        return output if return_dict else (output.images, output.records, output.notes)

    def compile_networks(self, mode: str = "default") -> None:
        """Compile the transformer's blocks with torch.compile; the first batch of each shape then takes minutes.

        The decoder stays as it is: its time is that of its convolutions, which a compiler leaves alone.
        ``mode``: "default", or "reduce-overhead", which replays the blocks as CUDA graphs: for small batches.
        """
        for block in self.transformer.repeated_blocks():
            block.compile(mode=None if mode == "default" else mode)

    def noise_levels(self, num_steps: int) -> list[float]:
        """The noise levels of a run, as :func:`crfm_core.sampling.flow.noise_levels` gives them for this scheduler."""
        return noise_levels(num_steps, self.scheduler.config.shift, self.scheduler.config.num_train_timesteps).tolist()

    def pad_labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [B, H, W] enlarged to the latent grid, for the critic (255 outside) and for the generator (the edge repeated)."""
        height, width = (-side % self.size_divisor for side in labels.shape[1:])
        if not height and not width:
            return labels, labels
        repeated = F.pad(labels[:, None].double(), (0, width, 0, height), mode="replicate")[:, 0].long()
        return F.pad(labels, (0, width, 0, height), value=IGNORE), repeated

    @property
    def size_divisor(self) -> int:
        """What a mask's sides must be divisible by, in pixels."""
        return downscaling(self.vae) * self.transformer.config.patch_size

    def _text_encoders(self) -> TextEncoders:
        return TextEncoders(**{name: getattr(self, name) for name in ENCODER_PARTS})

    def check_masks(self, labels: Tensor, pad: bool) -> None:
        """Raise ValueError for masks that are not ids [B, H, W] known to the generator, or, without ``pad``, off the latent grid."""
        if labels.ndim != 3 or labels.is_floating_point() or not labels.numel():
            raise ValueError(f"masks has shape {tuple(labels.shape)} and type {labels.dtype}: needs class ids, integers [B, H, W]")
        self._check_ids(labels.long(), self.config.num_classes, "the pipeline")
        height, width = labels.shape[1:]
        if not pad and (height % self.size_divisor or width % self.size_divisor):
            raise ValueError(
                f"masks has size {height}x{width}: height and width must be divisible by {self.size_divisor}; pad=True enlarges and crops"
            )

    def _check_guidance(
        self, batch: int, scale: float, prompts: str | Sequence[str] | None, embeds: Tensor | None, pooled: Tensor | None
    ) -> None:
        if scale < 1:
            raise ValueError(f"guidance_scale={scale}: must be at least 1, which is none")
        if scale > 1 and not self.config.caption_dropout:
            raise ValueError(f"guidance_scale={scale}: the generator never saw an empty prompt; train one with caption_dropout")
        if scale > 1 and prompts is None:
            if embeds is None or pooled is None:
                raise ValueError(f"guidance_scale={scale}: needs negative_prompt_embeds and negative_pooled_prompt_embeds, or prompts")
            if len(embeds) not in (1, batch) or len(pooled) not in (1, batch):
                raise ValueError(f"negative_prompt_embeds has {len(embeds)} entries: needs one, or one for each of the {batch} masks")

    def _check_mask_guidance(self, scale: float) -> None:
        if scale < 1:
            raise ValueError(f"mask_guidance_scale={scale}: must be at least 1, which is none")
        if scale > 1 and not self.config.knows_missing_masks:
            raise ValueError(
                f"mask_guidance_scale={scale}: the generator never saw a missing mask; train one with mask_dropout, or on unlabelled tiles "
                "without masks"
            )

    def _check_correction(
        self, labels: Tensor, critic: Callable[[Tensor], Tensor] | None, rectify: RectifySettings | None, num_inference_steps: int
    ) -> None:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        if rectify is not None:
            if critic is None:
                raise ValueError("critic=None: rectify needs a critic to correct by")
            if rectify.steps > num_inference_steps:
                raise ValueError(f"rectify.steps={rectify.steps}: must not exceed num_inference_steps={num_inference_steps}")
            if hasattr(critic, "classes"):
                self._check_ids(labels, len(critic.classes), "the critic")

    def _check_drawing(
        self,
        labels: Tensor,
        generators: Sequence[torch.Generator | None],
        latents: Tensor | None,
        output_type: str,
        callback_tensors: Sequence[str],
    ) -> None:
        batch, *size = labels.shape
        if len(generators) != batch:
            raise ValueError(f"generator has {len(generators)} entries: needs one for all or one for each of the {batch} masks")
        strange = {str(own.device) for own in generators if own is not None and own.device.type != "cpu"}
        if strange:
            raise ValueError(f"generator lies on {', '.join(strange)}: noise is drawn on the CPU, so that no device changes it")
        shrink = downscaling(self.vae)
        expected = (batch, self.transformer.config.in_channels, size[0] // shrink, size[1] // shrink)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: needs {expected}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        if unknown := [name for name in callback_tensors if name not in self._callback_tensor_inputs]:
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
            absent = [name for name in ENCODER_PARTS if getattr(self, name) is None]
            if absent:
                raise ValueError(f"prompts={prompts!r}: the pipeline has no {', '.join(absent)}; give prompt_embeds instead")
            if not isinstance(prompts, str) and len(prompts) != batch:
                raise ValueError(f"prompts has {len(prompts)} entries: needs one for all or one for each of the {batch} masks")
        config = self.transformer.config
        if prompt_embeds is not None and (prompt_embeds.ndim != 3 or prompt_embeds.shape[::2] != (batch, config.joint_attention_dim)):
            raise ValueError(f"prompt_embeds has shape {tuple(prompt_embeds.shape)}: needs [{batch}, T, {config.joint_attention_dim}]")
        expected = (batch, config.pooled_projection_dim)
        if pooled_prompt_embeds is not None and pooled_prompt_embeds.shape != expected:
            raise ValueError(f"pooled_prompt_embeds has shape {tuple(pooled_prompt_embeds.shape)}: needs {expected}")


def _pair(embeds: Tensor | None, pooled: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if embeds is None or pooled is None else (embeds, pooled)
