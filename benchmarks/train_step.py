"""One training step, ours against the plain composition of diffusers' own blocks: seconds, peak memory, share of the counted work.

    python benchmarks/train_step.py [--rounds N]

Ours: MaskMMDiT, which leaves out the last block's dead work, fed from cached latents and prompts. Plain: diffusers' parts put together
as for SD3, with a third branch, all of the last block computed; image and mask encoded by the autoencoder and the prompts by the text
encoders in every step. Both have the very same weights (tensors they share), take the same batch and run by turns in one process.

On the CPU at a middle size in float32; text encoders and autoencoder are reduced so that their share of the step is about that at
full size. On a GPU at SD3.5-medium's size, under bf16 autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from crfm_core.generator.memory import SD35_MEDIUM, CudaCount, meta_network
from crfm_core.generator.training import flow_losses
from crfm_core.generator.weights import choose_trainable, make_optimiser
from crfm_core.models.latent_space import encode_images, mask_latents, normalise
from crfm_core.models.sd3_names import sd3_name
from crfm_core.settings import Control
from crfm_core.text.encoders import TextEncoders

MIDDLE = SD35_MEDIUM | {
    "sample_size": 32, "num_layers": 12, "num_attention_heads": 8, "joint_attention_dim": 1024, "caption_projection_dim": 512,
    "pooled_projection_dim": 512, "pos_embed_max_size": 64, "dual_attention_layers": tuple(range(6)),
}  # fmt: skip
CLASSES, PROMPTS = 18, ["a prompt"] * 8
#: Layers of T5, and (width, layers) of the CLIPs.
FULL_TEXT, MIDDLE_TEXT = (24, ((768, 12), (1280, 32))), (6, ((192, 12), (320, 12)))


class JointProcessor:
    """Attention over [image; text; mask], after diffusers' JointAttnProcessor2_0."""

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states, attention_mask=None, mask_attn=None, mask_states=None):
        streams = [
            (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, hidden_states),
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k, encoder_hidden_states),
            (mask_attn.to_q, mask_attn.to_k, mask_attn.to_v, mask_attn.norm_q, mask_attn.norm_k, mask_states),
        ]
        queries, keys, values = [], [], []
        for to_q, to_k, to_v, norm_q, norm_k, tokens in streams:
            query, key, value = (to(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in (to_q, to_k, to_v))
            queries.append(norm_q(query))
            keys.append(norm_k(key))
            values.append(value)
        joint = F.scaled_dot_product_attention(torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2))
        image, text, mask = joint.transpose(1, 2).flatten(2).split([tokens.shape[1] for *_, tokens in streams], dim=1)
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text, mask_attn.to_out[1](mask_attn.to_out[0](mask))


class PlainBlock(JointTransformerBlock):
    """diffusers' block of SD3, with a mask branch of the same parts."""

    def __init__(self, dim: int, heads: int, last: bool, dual: bool) -> None:
        super().__init__(dim, heads, dim // heads, context_pre_only=last, qk_norm="rms_norm", use_dual_attention=dual)
        self.attn.set_processor(JointProcessor())
        self.norm1_mask = AdaLayerNormZero(dim)
        self.attn_mask = Attention(dim, heads=heads, dim_head=dim // heads, out_dim=dim, bias=True, qk_norm="rms_norm", eps=1e-6)
        self.norm2_mask = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff_mask = FeedForward(dim, dim_out=dim, activation_fn="gelu-approximate")

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, temb: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        normed, *by_image = self.norm1(image, emb=temb)
        normed_mask, *by_mask = self.norm1_mask(mask, emb=temb)
        normed_text, *by_text = (self.norm1_context(text, temb),) if self.context_pre_only else self.norm1_context(text, emb=temb)
        of_image, of_text, of_mask = self.attn(normed, encoder_hidden_states=normed_text, mask_attn=self.attn_mask, mask_states=normed_mask)
        image = image + by_image[0].unsqueeze(1) * of_image
        if self.use_dual_attention:
            image = image + by_image[5].unsqueeze(1) * self.attn2(by_image[4])
        image = self._feed(image, self.norm2, self.ff, by_image)
        mask = self._feed(mask + by_mask[0].unsqueeze(1) * of_mask, self.norm2_mask, self.ff_mask, by_mask)
        if self.context_pre_only:
            return image, None, mask
        return image, self._feed(text + by_text[0].unsqueeze(1) * of_text, self.norm2_context, self.ff_context, by_text), mask

    @staticmethod
    def _feed(tokens: Tensor, norm: nn.Module, feed_forward: nn.Module, by: list[Tensor]) -> Tensor:
        shift, scale, gate = (vector.unsqueeze(1) for vector in by[1:4])
        return tokens + gate * feed_forward(norm(tokens) * (1 + scale) + shift)


class PlainMaskTransformer(nn.Module):
    """diffusers' SD3Transformer2DModel with a mask branch."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        dim, heads, layers, patch = (sizes[name] for name in ("caption_projection_dim", "num_attention_heads", "num_layers", "patch_size"))
        side, channels, table = sizes["sample_size"], sizes["in_channels"], sizes["pos_embed_max_size"]
        self.pos_embed, self.pos_embed_mask = (PatchEmbed(side, side, patch, channels, dim, pos_embed_max_size=table) for _ in range(2))
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, sizes["pooled_projection_dim"])
        self.context_embedder = nn.Linear(sizes["joint_attention_dim"], dim)
        self.transformer_blocks = nn.ModuleList(
            PlainBlock(dim, heads, last=index == layers - 1, dual=index in sizes["dual_attention_layers"]) for index in range(layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch * patch * sizes["out_channels"])
        self.patch = patch

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, mask_latents, return_dict=False):
        height, width = (side // self.patch for side in hidden_states.shape[-2:])
        image, mask = self.pos_embed(hidden_states), self.pos_embed_mask(mask_latents)
        temb, text = self.time_text_embed(timestep, pooled_projections), self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            image, text, mask = block(image, text, mask, temb)
        tokens = self.proj_out(self.norm_out(image, temb)).unflatten(1, (height, width)).unflatten(-1, (self.patch, self.patch, -1))
        return (torch.einsum("nhwpqc->nchpwq", tokens).flatten(4, 5).flatten(2, 3),)


def share_weights(plain: PlainMaskTransformer, ours: nn.Module) -> None:
    """Make the plain network's weights those of ours, not copies."""
    for name, _ in list(plain.named_parameters()):
        if name.startswith("pos_embed_mask."):
            own = name.replace("pos_embed_mask.proj", "mask_embed")
        else:  # the mask's modules are named like the image's
            own = sd3_name(name.replace("_mask.", "."))
            own = own.replace(".image.", ".mask.") if "_mask." in name else own
        module, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(module), leaf, ours.get_parameter(own))
    plain.pos_embed.pos_embed = plain.pos_embed_mask.pos_embed = ours.pos_embed.pos_embed


class RandomIds(SimpleNamespace):
    """In place of a tokenizer: ids of as many tokens as it pads to."""

    def __call__(self, prompts: list[str], **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.randint(0, 1000, (len(prompts), self.model_max_length)))


def text_encoders(width: int, t5_layers: int, clips: tuple[tuple[int, int], ...]) -> TextEncoders:
    """SD3's three encoders with random weights: T5 of a width and layers, CLIPs of (width, layers)."""
    parts = []
    for hidden, layers in clips:
        config = CLIPTextConfig(hidden_size=hidden, projection_dim=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers)
        config.num_attention_heads = hidden // 64
        parts += [RandomIds(model_max_length=77), CLIPTextModelWithProjection(config)]
    t5 = T5Config(d_model=width, d_ff=width * 5 // 2, num_heads=width // 64, num_layers=t5_layers, feed_forward_proj="gated-gelu")
    return TextEncoders(*parts, RandomIds(model_max_length=256), T5EncoderModel(t5))


def peak_memory(cuda: bool, reset: bool = False) -> float:
    """GiB at most since the last reset: allocated on the GPU, or resident."""
    if cuda:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large matrix products."""
    side = 8192 if device == "cuda" else 2048
    one, other = torch.randn(2, side, side, device=device, dtype=dtype)
    return max(2 * side**3 / seconds_of(lambda: one @ other, device == "cuda") for _ in range(5))


def seconds_of(step: Callable[[], object], cuda: bool) -> float:
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(title: str, variants: dict[str, Callable[[], object]], rounds: int, cuda: bool) -> dict[str, float]:
    """Run the variants by turns, print seconds, memory and ratio; returns the median seconds. The first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in sorted(variants, reverse=turn % 2 == 0):
            peak_memory(cuda, reset=True)
            times[name].append(seconds_of(variants[name], cuda))
            peaks[name].append(peak_memory(cuda))
    ratios = [plain / ours for plain, ours in zip(times["plain"][1:], times["ours"][1:], strict=True)]
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"\n{title}, {rounds} rounds")
    for name, seconds in medians.items():
        print(f"  {name}: median {seconds:.3f} s, fastest {min(times[name][1:]):.3f} s, peak {statistics.median(peaks[name][1:]):.2f} GiB")
    print(f"  plain / ours: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}", flush=True)
    return medians


def main(rounds: int) -> None:
    cuda = torch.cuda.is_available()
    device, dtype, sizes, batch, pixels = ("cuda", torch.bfloat16, SD35_MEDIUM, 4, 512) if cuda else ("cpu", torch.float32, MIDDLE, 2, 256)
    channels, encoding = ((128, 256, 512, 512), FULL_TEXT) if cuda else ((32, 64, 128, 128), MIDDLE_TEXT)
    torch.manual_seed(0)
    control = Control(steps=1, batch_size=batch, learning_rate=1e-5, precision="bf16" if cuda else "no")
    latent, width, pooled_width = (16, pixels // 8, pixels // 8), sizes["joint_attention_dim"], sizes["pooled_projection_dim"]

    ours, flops = meta_network(sizes, control), {}
    with torch.device("meta"):
        plain = PlainMaskTransformer(sizes)
        names = choose_trainable(ours, control)
        share_weights(plain, ours)
        shapes = [latent, latent, (), (333, width), (pooled_width,), latent]
        for name, network in (("ours", ours), ("plain", plain)):
            with CudaCount([network], autocast=cuda) as count:
                flow_losses(network, *(torch.empty(batch, *shape) for shape in shapes))
            flops[name] = count.flops
    ours.to_empty(device=device)
    for tensor in (*ours.parameters(), *ours.buffers()):
        nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5)
    share_weights(plain, ours)
    networks = {"ours": ours, "plain": plain}
    parameters = [ours.get_parameter(name) for name in names]
    optimiser = make_optimiser(parameters, control)

    with torch.device(device):
        vae = AutoencoderKL(block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=16,
                            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, scaling_factor=1.5305, shift_factor=0.0609,
                            use_quant_conv=False, use_post_quant_conv=False).eval()  # fmt: skip
        encoders = text_encoders(width, *encoding)
        images, labels = torch.rand(batch, 3, pixels, pixels) * 2 - 1, torch.randint(0, CLASSES, (batch, pixels, pixels))
        noise, sigma = torch.randn(batch, *latent), torch.rand(batch)
    for module in (vae, *(encoder for _, encoder in (*encoders.clips, encoders.t5))):
        nn.Module.to(module.eval(), dtype)
    with torch.no_grad():  # what the caches hold
        posterior = vae.encode(images.to(dtype)).latent_dist
        mean, logvar, masks = (part.half().cpu() for part in (posterior.mean, posterior.logvar, mask_latents(labels, vae, CLASSES)))
        texts = [part.cpu() for part in encoders.encode(PROMPTS[:batch])]

    def cached() -> list[Tensor]:
        clean = normalise(mean.float() + torch.exp(0.5 * logvar.float()) * torch.randn(mean.shape), vae)
        return [part.to(device, torch.float32) for part in (clean, *texts, masks)]

    @torch.no_grad()
    def encoded() -> list[Tensor]:
        clean = encode_images(images, vae, sample=True)
        return [part.float() for part in (clean, *encoders.encode(PROMPTS[:batch]), mask_latents(labels, vae, CLASSES))]

    def losses(network: nn.Module, clean: Tensor, text: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            return flow_losses(network, clean, noise, sigma, text, pooled, mask)

    def update(network: nn.Module, given: list[Tensor]) -> None:
        losses(network, *given).mean().backward()
        nn.utils.clip_grad_norm_(parameters, control.clip_norm)
        optimiser.step()
        optimiser.zero_grad()

    given = cached()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=cuda):
        loss = {name: losses(network, *given).mean().item() for name, network in networks.items()}
        one, other = (network(noise, *given[1:3], 1000 * sigma, given[3], return_dict=False)[0] for network in networks.values())
    print(f"{torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}; {batch} images of {pixels}x{pixels}")
    print(f"loss: ours {loss['ours']:.6f}, plain {loss['plain']:.6f}")
    print(f"velocity: largest difference {(one - other).abs().max():.1e}, root mean square {one.square().mean().sqrt():.2f}")
    alone = {"ours": lambda: update(ours, given), "plain": lambda: update(plain, given)}
    medians = compare("transformer: forward, backward, optimiser", alone, rounds, cuda)
    peak = matmul_peak(device, dtype)
    print(f"  matrix products here: {peak / 1e12:.3f} TFLOP/s")
    for name, seconds in medians.items():
        print(f"  {name}: {flops[name] / 1e12:.3f} TFLOP counted, {flops[name] / seconds / peak:.0%} of that")
    whole = {"ours": lambda: update(ours, cached()), "plain": lambda: update(plain, encoded())}
    compare("whole step, with what feeds it", whole, rounds, cuda)
    with FlopCounterMode(display=False) as counter:
        encoded()
    print(f"  what feeds it: {counter.get_total_flops() / 1e12:.3f} TFLOP counted, done in every step by plain, once by ours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args().rounds)
