"""Sampling with and without the critic's correction, ours against the plain composition of diffusers' own parts.

    python benchmarks/synthesis.py [--size tiny|middle|full] [--device cpu|cuda] [--batch B] [--rounds N] [--whole N] [--compile]

Ours: MaskToImagePipeline as `open_generator` makes it, with what does not depend on the latents computed once (`prepare`) and the
decoder made faster (`speed_up`). Plain: diffusers' SD3 blocks with a third branch (as in train_step.py), everything computed in
every step and all of the last block, a plain AutoencoderKL, the same Euler steps and the same correction. Both work on the very same
weights, start from the same noise and run by turns in one process; that they give the same latents is checked first.

What is timed: each part by itself, by turns (`--rounds`), added up to whole runs of 23 steps with 0 or 4 corrected; then
whole runs of as many steps as `--whole` says. --compile compiles our networks as a sampler's `compile: default` does; the plain
composition runs as it is.

Sizes: "middle", float32, for a CPU: 12 layers of width 512, 256x256, 333 text tokens of width 1024 (instead of SD3's 4096, to save
memory), a decoder of half of SD3's width, SegFormer MiT-B0 as critic. "full", bfloat16, for a GPU: SD3.5-medium's sizes, 512x512,
SegFormer MiT-B2 (float32). "tiny" only shows that the program runs. All weights are random.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from train_step import MIDDLE, PlainMaskTransformer, matmul_peak, peak_memory, seconds_of, share_weights
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from crfm_core.generator.memory import SD35_MEDIUM, meta_network
from crfm_core.models.decoder import speed_up
from crfm_core.models.latent_space import decode_latents, mask_latents
from crfm_core.sampling.flow import euler_step, noise_levels
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.rectify import critic_loss, rectify_velocity
from crfm_core.segmentor.critic import Critic, as_critic
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.segmentor.preparation import IMAGENET_MEAN, IMAGENET_STD
from crfm_core.settings import Control, RectifySettings

STEPS, CORRECTED, CLASSES, TEXT_TOKENS = 23, 4, 7, 333
RUNS = {"plain sampling": None, f"CRFM k={CORRECTED}": False, f"CRFM k={CORRECTED}, measured": True}


class Size(NamedTuple):
    transformer: dict
    pixels: int
    channels: tuple[int, ...]
    layers: int  # of a decoder's block
    groups: int
    batch: int


TINY = MIDDLE | {
    "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
    "joint_attention_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0,),
}  # fmt: skip
SIZES = {
    "tiny": Size(TINY, 64, (8, 8, 16, 16), 1, 4, 1),
    "middle": Size(MIDDLE, 256, (64, 128, 256, 256), 2, 32, 1),
    "full": Size(SD35_MEDIUM, 512, (128, 256, 512, 512), 2, 32, 4),
}


class Given(NamedTuple):
    """What both are given: label maps [B,H,W], prompt embeddings, noise [B,C,h,w]."""

    masks: Tensor
    text: Tensor
    pooled: Tensor
    noise: Tensor


class Plain:
    """The straightforward composition."""

    def __init__(self, network: PlainMaskTransformer, vae: AutoencoderKL, critic: Critic) -> None:
        self.network, self.vae, self.critic = network, vae, critic
        self.processor = VaeImageProcessor()

    def decode(self, clean: Tensor) -> Tensor:
        return decode_latents(clean, self.vae)

    def velocity(self, latents: Tensor, given: Given, mask: Tensor, sigma: float) -> Tensor:
        time = torch.full((len(latents),), 1000 * sigma, device=latents.device)
        return self.network(latents.to(mask.dtype), given.text, given.pooled, time, mask)[0].float()

    @torch.no_grad()
    def __call__(self, given: Given, rectify: RectifySettings | None, steps: int, output_type: str = "pil"):
        sigmas = noise_levels(steps).tolist()
        sizes = rectify.step_sizes(steps) if rectify else []
        mask = mask_latents(given.masks, self.vae, CLASSES).to(given.text.dtype)
        latents = given.noise
        for step, sigma in enumerate(sigmas[:-1]):
            velocity = self.velocity(latents, given, mask, sigma)
            if step < len(sizes):
                asked = (given.masks, self.decode, self.critic)
                velocity = rectify_velocity(velocity, latents, sigma, *asked, rectify, sizes[step]).velocity
                if rectify.measure:
                    critic_loss(latents - sigma * velocity, *asked)
            latents = euler_step(latents, velocity, sigma, sigmas[step + 1])
        return latents if output_type == "latent" else self.processor.postprocess(self.decode(latents), output_type=output_type)


def make(size: Size, device: str, dtype: torch.dtype, critic: str) -> tuple[MaskToImagePipeline, Plain, Critic]:
    """Our pipeline and the plain composition with the same random weights, and the critic of both."""
    torch.manual_seed(0)
    ours = meta_network(size.transformer, Control(steps=1, batch_size=1, learning_rate=1e-5))
    with torch.device("meta"):
        plain = PlainMaskTransformer(size.transformer)
    nn.Module.to(ours, dtype).to_empty(device=device)
    for tensor in (*ours.parameters(), *ours.buffers()):
        nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5)
    share_weights(plain, ours)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=size.channels, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=size.layers, norm_num_groups=size.groups, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        ).eval().requires_grad_(False)  # fmt: skip
    nn.Module.to(vae, dtype)
    names = [f"class {index}" for index in range(CLASSES)]
    if critic == "segformer_b2":
        judge = Critic(build_model("segformer_b2", CLASSES), names).to(device)
    else:
        widths = {} if critic == "segformer_b0" else {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16}
        widths |= {} if critic == "segformer_b0" else {"num_attention_heads": [1, 1, 2, 2]}
        judge = as_critic(
            SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, **widths)), names, IMAGENET_MEAN, IMAGENET_STD
        ).to(device)
    fast = copy.deepcopy(vae)
    speed_up(fast)
    pipeline = MaskToImagePipeline(ours.eval().requires_grad_(False), FlowMatchEulerDiscreteScheduler(shift=3.0), fast, CLASSES)
    return pipeline, Plain(plain.eval(), vae, judge), judge


def settings_of(measure: bool | None, steps: int = CORRECTED) -> RectifySettings | None:
    return None if measure is None else RectifySettings(steps=steps, measure=measure)


def run_ours(pipeline: MaskToImagePipeline, critic: Critic, given: Given, rectify: RectifySettings | None, steps: int, kind: str = "pil"):
    return pipeline(
        given.masks, prompt_embeds=given.text, pooled_prompt_embeds=given.pooled, critic=critic, rectify=rectify, num_inference_steps=steps,
        latents=given.noise, output_type=kind, progress=False,
    ).images  # fmt: skip


def check_equal(pipeline: MaskToImagePipeline, plain: Plain, critic: Critic, given: Given, tolerance: float) -> None:
    """Both give the same latents, corrected ones too."""
    for measure in (None, False):
        rectify = settings_of(measure, steps=2)
        one, other = run_ours(pipeline, critic, given, rectify, 3, "latent"), plain(given, rectify, 3, "latent")
        apart, size = (one - other).square().mean().sqrt().item(), other.square().mean().sqrt().item()
        print(
            f"latents after 3 steps{', 2 of them corrected' if rectify else ''}: root mean square {size:.2f}, of the difference {apart:.1e}"
        )
        assert apart < tolerance * size, "ours and plain disagree"


def parts_of(decode: Callable[[Tensor], Tensor], given: Given, critic: Critic) -> dict[str, Callable[[], object]]:
    """One correction in parts, each of which leaves what the next one takes."""
    held: dict[str, Tensor] = {}

    def forward() -> None:
        held["clean"] = given.noise.clone().requires_grad_()
        with torch.enable_grad():
            held["images"] = decode(held["clean"])

    def judge() -> None:
        held["seen"] = held["images"].detach().requires_grad_()
        with torch.enable_grad():
            loss = critic_loss(held["seen"], given.masks, lambda images: images, critic).sum()
        (held["by_images"],) = torch.autograd.grad(loss, held["seen"])

    def backward() -> None:
        torch.autograd.grad(held.pop("images"), held["clean"], held["by_images"])

    @torch.no_grad()
    def look() -> None:
        critic_loss(given.noise, given.masks, decode, critic)

    return {"decoder forward": forward, "critic": judge, "decoder backward": backward, "loss afterwards": look}


def flops_of(run: Callable[[], object]) -> int:
    """Work of the products, a multiply-add being two; torch's counter does not know the CPU's attention."""
    attention, counted = F.scaled_dot_product_attention, 0

    def counting(query: Tensor, key: Tensor, *rest, **named) -> Tensor:
        nonlocal counted
        counted += 4 * query.numel() * key.shape[-2] * (query.device.type == "cpu")
        return attention(query, key, *rest, **named)

    F.scaled_dot_product_attention = counting
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        F.scaled_dot_product_attention = attention
    return counter.get_total_flops() + counted


def convolution_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large 3x3 convolutions."""
    side = 128 if device == "cuda" else 64
    layer = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    images = torch.randn(4, 256, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return max(2 * 9 * 256 * images.numel() / seconds_of(lambda: layer(images), device == "cuda") for _ in range(5))


def by_turns(variants: dict[str, dict[str, Callable[[], object]]], rounds: int, cuda: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part of each variant in each round; the variants run by turns, the first round is not counted."""
    times = {name: {part: [] for part in parts} for name, parts in variants.items()}
    for turn in range(rounds + 1):
        for name in sorted(variants, reverse=turn % 2 == 0):
            for part, run in variants[name].items():
                times[name][part].append(seconds_of(run, cuda))
    return {name: {part: values[1:] for part, values in parts.items()} for name, parts in times.items()}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def ratios(one: list[float], other: list[float]) -> str:
    return spread([first / second for first, second in zip(one, other, strict=True)])


def main(size_name: str, device: str, batch: int | None, rounds: int, whole: int, compiled: bool) -> None:
    size, cuda = SIZES[size_name], device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    kind = {"tiny": "tiny", "middle": "segformer_b0", "full": "segformer_b2"}[size_name]
    pipeline, plain, critic = make(size, device, dtype, kind)
    batch, side = batch or size.batch, size.pixels // 8
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, TEXT_TOKENS, size.transformer["joint_attention_dim"], generator=generator).to(device, dtype)
    pooled = torch.randn(batch, size.transformer["pooled_projection_dim"], generator=generator).to(device, dtype)
    masks = torch.randint(0, CLASSES, (batch, size.pixels // 32, size.pixels // 32), generator=generator)
    masks = masks.repeat_interleave(32, 1).repeat_interleave(32, 2).to(device)
    given = Given(masks, text, pooled, torch.randn(batch, 16, side, side, generator=generator).to(device))
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; {size_name}: {batch} images of {size.pixels}x{size.pixels}, {str(dtype).removeprefix('torch.')}, critic {kind}")
    check_equal(pipeline, plain, critic, given, 0.1 if cuda else 1e-3)
    if compiled:
        pipeline.compile_networks()
        check_equal(pipeline, plain, critic, given, 0.1 if cuda else 1e-3)

    if pipeline.vae.is_gradient_checkpointing:
        print("memory is short: our decoder computes its blocks again in the backward pass")

    times = torch.tensor([1000 * sigma for sigma in noise_levels(STEPS).tolist()[:-1]], device=device)
    with torch.no_grad():
        mask = mask_latents(masks, pipeline.vae, CLASSES).to(dtype)
        prepared = pipeline.transformer.prepare(text, pooled, times, mask)
    folder = tempfile.TemporaryDirectory()

    def files(vae: AutoencoderKL) -> Callable[[], object]:
        """The mask's latents, and images to files."""

        def run() -> None:
            mask_latents(masks, vae, CLASSES)
            for index, image in enumerate(plain.processor.postprocess(given.noise[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))):
                image.save(Path(folder.name) / f"{index}.png")

        return run

    no_grad = torch.no_grad()
    ours_decode = lambda clean: decode_latents(clean, pipeline.vae)  # noqa: E731
    variants = {
        "ours": {
            "prepared once": no_grad(lambda: pipeline.transformer.prepare(text, pooled, times, mask)),
            "transformer, a step": no_grad(lambda: pipeline.transformer.velocity(given.noise.to(dtype), prepared, 3)),
            **parts_of(ours_decode, given, critic),
            "final decode": no_grad(lambda: ours_decode(given.noise)),
            "mask in, images out": files(pipeline.vae),
        },
        "plain": {
            "prepared once": lambda: None,
            "transformer, a step": no_grad(lambda: plain.velocity(given.noise, given, mask, 0.9)),
            **parts_of(plain.decode, given, critic),
            "final decode": no_grad(lambda: plain.decode(given.noise)),
            "mask in, images out": files(plain.vae),
        },
    }
    seconds = by_turns(variants, rounds, cuda)
    print(f"\nseconds for {batch} images, median of {rounds} rounds")
    for part in variants["ours"]:
        row = [statistics.median(seconds[name][part]) for name in ("ours", "plain")]
        ratio = ratios(seconds["plain"][part], seconds["ours"][part]) if part != "prepared once" else ""
        print(f"  {part}: ours {row[0]:.3f}, plain {row[1]:.3f}" + (f", plain / ours {ratio}" if ratio else ""))

    peaks = {"matrix products": matmul_peak(device, dtype), "convolutions": convolution_peak(device, dtype)}
    print("\nreached here: " + ", ".join(f"{name} {value / 1e12:.3f} TFLOP/s" for name, value in peaks.items()))
    if not compiled:
        for name, parts in variants.items():
            for part, peak in (("transformer, a step", "matrix products"), ("final decode", "convolutions")):
                work = flops_of(parts[part])
                share = work / statistics.median(seconds[name][part]) / peaks[peak]
                print(f"  {name}, {part}: {work / 1e12:.3f} TFLOP counted, {share:.0%} of that of {peak}")

    print(f"\nadded up, {STEPS} steps, {CORRECTED} of them corrected")
    correction, totals = ("decoder forward", "critic", "decoder backward"), {}
    for name, parts in seconds.items():
        for title, measure in RUNS.items():
            corrected = [] if measure is None else [*correction, *(["loss afterwards"] if measure else [])]
            totals[name, title] = [
                parts["prepared once"][turn] + STEPS * parts["transformer, a step"][turn] + parts["final decode"][turn]
                + parts["mask in, images out"][turn] + CORRECTED * sum(parts[part][turn] for part in corrected)
                for turn in range(rounds)
            ]  # fmt: skip
    summarise(totals, batch)

    print(f"\nwhole runs of {whole} steps, {min(CORRECTED, whole)} of them corrected, by turns")
    measured = {}
    for title, measure in RUNS.items():
        rectify = settings_of(measure, min(CORRECTED, whole))
        calls = {"ours": lambda r=rectify: run_ours(pipeline, critic, given, r, whole), "plain": lambda r=rectify: plain(given, r, whole)}
        for name, call in calls.items():
            peak_memory(cuda, reset=True)
            measured[name, title] = [seconds_of(call, cuda)]
            print(f"  {name}, {title}: {measured[name, title][0]:.2f} s, peak {peak_memory(cuda):.2f} GiB", flush=True)
    summarise(measured, batch)
    folder.cleanup()


def summarise(totals: dict[tuple[str, str], list[float]], batch: int) -> None:
    """Images per second, CRFM over plain sampling, and ours over the plain composition."""
    sampling, *rectified = RUNS
    for name in ("ours", "plain"):
        rates = ", ".join(f"{title} {batch / statistics.median(totals[name, title]):.4f}" for title in RUNS)
        print(f"  {name}, images per second: {rates}")
        print("    " + ", ".join(f"{title} / {sampling}: {ratios(totals[name, title], totals[name, sampling])}" for title in rectified))
    for title in RUNS:
        print(f"  plain / ours, {title}: {ratios(totals['plain', title], totals['ours', title])}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="middle")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="images at once; by default 1, at full size 4")
    parser.add_argument("--rounds", type=int, default=5, help="of the parts")
    parser.add_argument("--whole", type=int, default=STEPS, help="steps of a whole run")
    parser.add_argument("--compile", action="store_true", help="compile our networks")
    chosen = parser.parse_args()
    main(chosen.size, chosen.device, chosen.batch, chosen.rounds, chosen.whole, chosen.compile)
