"""The networks of a Stable Diffusion 3.5 pipeline, random and so small that a test can afford them."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from crfm_core.models.controls import build_network
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.models.network import ControlNetwork
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import SCHEMES

SIZES = {
    "sample_size": 8, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4, "in_channels": 16, "out_channels": 16,
    "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 24, "pos_embed_max_size": 12,
}  # fmt: skip


def tiny_sd3(**changes) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(**(SIZES | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} | changes))


def tiny_transformer(mask_mlp_modulation: str = "own", mask_init: str = "random", **changes) -> MaskMMDiT:
    return MaskMMDiT.from_sd3(tiny_sd3(**changes), mask_mlp_modulation, mask_init)


def tiny_network(scheme: str, mask_init: str = "random", mask_mlp_modulation: str = "own", **changes) -> ControlNetwork:
    """A scheme's network over four blocks; half of them make a control network of two."""
    options = {"mask_mlp_modulation": mask_mlp_modulation} if "mask_mlp_modulation" in SCHEMES[scheme].options else {}
    return build_network(tiny_sd3(**({"num_layers": 4} | changes)), scheme, mask_init, **options)


def network_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What such a network takes, but for the mask: two samples."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(2, 16, 8, 12),
        "encoder_hidden_states": normal(2, 7, 32),
        "pooled_projections": normal(2, 24),
        "timestep": torch.tensor([1000.0, 321.5]),
    }


def tiny_vae(channels: tuple[int, ...] = (8, 16), **changes) -> AutoencoderKL:
    torch.manual_seed(1)
    levels = len(channels)
    settings = {"latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **(settings | changes),
    ).eval()


class TinyCritic(nn.Module):
    """A segmentor with the interface of the package's critic: frozen, its normalisation inside."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.classes = [f"class {index}" for index in range(classes)]
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1), nn.Conv2d(12, classes, 1)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = (images.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        coarse = self.c3(torch.relu(self.c2(torch.relu(self.c1((images - mean) / std)))))
        return nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)


def tiny_text_parts() -> dict[str, object]:
    """Tokenizers over single letters and random encoders; CLIP widths 12 + 12, T5 width 32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    letters = string.ascii_lowercase + ","
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(vocabulary)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -1.0), *((letter, -2.0) for letter in letters)]

    def clip(seed: int) -> CLIPTextModelWithProjection:
        torch.manual_seed(seed)
        config = CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=12, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            projection_dim=12, max_position_embeddings=40, bos_token_id=54, eos_token_id=55, pad_token_id=55,
        )  # fmt: skip
        return CLIPTextModelWithProjection(config).eval()

    t5 = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return {
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=40),
        "text_encoder": clip(3),
        "tokenizer_2": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=40),
        "text_encoder_2": clip(4),
        "tokenizer_3": T5TokenizerFast(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=50),
        "text_encoder_3": T5EncoderModel(t5).eval(),
    }


def tiny_pipeline(text: bool = False, **changes) -> MaskToImagePipeline:
    """Masks of 16x16 pixels, latents of 8x8, seven classes."""
    parts = {"transformer": tiny_transformer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": tiny_vae()}
    return MaskToImagePipeline(**(parts | (tiny_text_parts() if text else {}) | {"num_classes": 7} | changes))


def save_tiny_pipeline(folder: Path) -> Path:
    """A tiny Stable Diffusion 3 pipeline folder, the weights of its T5 in shards."""
    parts = tiny_text_parts()
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3(num_layers=1, dual_attention_layers=(0,)),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )
    pipeline.save_pretrained(folder)
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    parts["text_encoder_3"].save_pretrained(folder / "text_encoder_3", max_shard_size="20KB")
    (folder / "LICENSE.md").write_text("Be kind.\n")
    return folder
