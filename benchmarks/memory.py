"""What fits where: memory and work of training and sampling at SD3.5-medium's size, 512x512, as a table.

python benchmarks/memory.py               computed on the meta device; needs no GPU
python benchmarks/memory.py --measure     on a GPU: real steps with random weights, peak memory and time beside the computed
python benchmarks/memory.py --measure --small     the same at a small size, also on the CPU (there without memory)
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel

from crfm_core.generator.memory import GIB, LEAN, SD35_MEDIUM, CudaCount, TrainingMemory, meta_network, training_memory
from crfm_core.generator.training import flow_losses
from crfm_core.generator.weights import choose_trainable, make_optimiser
from crfm_core.models.latent_space import decode_latents
from crfm_core.segmentor.critic import Critic
from crfm_core.segmentor.mmseg.networks import build_model
from crfm_core.settings import Control

#: Dense bf16 peaks in TFLOP/s (the vendor's figures), and the share of them that a time per step assumes.
PEAKS, SHARE = {"H100 SXM": 989, "RTX 4090": 165}, 0.4
SMALL = SD35_MEDIUM | {
    "sample_size": 32, "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64,
    "caption_projection_dim": 128, "pooled_projection_dim": 32, "pos_embed_max_size": 16, "dual_attention_layers": (0, 1),
}  # fmt: skip
LEANEST = {"optimiser": "adamw_8bit", "gradient_checkpointing": True}
ROWS = {
    "triattention, float32 Adam, batch 1": {},
    "… batch 4": {"batch_size": 4},
    "… batch 1, checkpointing": {"gradient_checkpointing": True},
    "… batch 4, checkpointing": {"batch_size": 4, "gradient_checkpointing": True},
    "… batch 1, checkpointing, averaged weights": {"gradient_checkpointing": True, "ema": 0.9999},
    "… 8-bit Adam, batch 1, checkpointing": LEANEST,
    "… image by LoRA, float32 Adam, batch 1": {"lora": {}},
    "… image by LoRA, float32 Adam, batch 1, checkpointing": {"lora": {}, "gradient_checkpointing": True},
    "… image by LoRA, 8-bit Adam, batch 1, checkpointing": LEANEST | {"lora": {}},
    "… image by LoRA, 8-bit Adam, batch 4, checkpointing": LEANEST | {"lora": {}, "batch_size": 4},
    "… float32 Adam, batch 1, each of 8 with FSDP": {"parallel": "fsdp", "processes": 8},
    "… float32 Adam, batch 4, checkpointing, each of 8 with FSDP": {
        "parallel": "fsdp", "processes": 8, "batch_size": 4, "gradient_checkpointing": True,
    },
    "siamese, float32 Adam, batch 1": {"scheme": "siamese"},
    "adapter, float32 Adam, batch 1": {"scheme": "adapter"},
    "controlnet, float32 Adam, batch 1": {"scheme": "controlnet"},
}  # fmt: skip


def control_of(changes: dict) -> Control:
    return Control(**({"steps": 1, "batch_size": 1, "learning_rate": 1e-5, "precision": "bf16"} | changes))


def measure(control: Control, sizes: dict, latent: tuple[int, int, int], device: str, steps: int = 5) -> tuple[float, float]:
    """Peak bytes and median seconds of a real update of one micro-step, with random weights (the first two updates are not timed)."""
    network = meta_network(sizes, control)
    with torch.device("meta"):
        names = choose_trainable(network, control)
    network.to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        torch.nn.init.normal_(tensor, std=0.02)
    if control.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    accelerator = Accelerator(mixed_precision=control.precision, cpu=device == "cpu", kwargs_handlers=LEAN)
    parameters = [network.get_parameter(name) for name in names]
    network, optimiser = accelerator.prepare(network.train(), make_optimiser(parameters, control))
    averages = EMAModel(parameters, decay=control.ema, foreach=True) if control.ema else None
    size, cuda, times = control.batch_size, device == "cuda", []
    with torch.device(device):
        clean, noise, mask = torch.randn(3, size, *latent)
        text, pooled = torch.randn(size, 333, sizes["joint_attention_dim"]), torch.randn(size, sizes["pooled_projection_dim"])
        sigma = torch.rand(size)
    for _ in range(steps):
        start = time.perf_counter()
        accelerator.backward(flow_losses(network, clean, noise, sigma, text, pooled, mask).mean())
        accelerator.clip_grad_norm_(parameters, control.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        if averages:
            averages.step(parameters)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return torch.cuda.max_memory_allocated() if cuda else 0, sorted(times[2:])[(steps - 2) // 2]


def cells(name: str, memory: TrainingMemory) -> list[str]:
    parts = [f"{size / GIB:.1f}" for part, size in memory.parts.items() if part != "ema"] + [f"{memory.total / GIB:.1f}"]
    seconds = [f"{memory.flops / (SHARE * peak * 1e12):.3f}" for peak in PEAKS.values()]
    return [name, *parts, f"{memory.flops / 1e12:.4g}", *seconds]


def row(values: list[str]) -> None:
    print("| " + " | ".join(values) + " |", flush=True)


def training_table(measured: bool, sizes: dict, latent: tuple[int, int, int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times = [f"s on {name}, computed" for name in PEAKS]
    header = ["setting", "weights", "gradients", "optimiser", "activations", "total GiB", "TFLOP", *times]
    header += ["measured GiB", "measured s", "measured TFLOP/s"] * measured
    row(header)
    row(["---"] + ["--:"] * (len(header) - 1))
    for name, changes in ROWS.items():
        control = control_of(changes)
        memory = training_memory(meta_network(sizes, control), control, latent)
        values = cells(name, memory)
        if measured and control.processes == 1:
            values += measured_cells(control, memory, sizes, latent, device)
        row(values)


def measured_cells(control: Control, memory: TrainingMemory, sizes: dict, latent: tuple[int, int, int], device: str) -> list[str]:
    gc.collect()  # the row before lives in reference cycles of accelerate's
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if memory.total > 0.95 * torch.cuda.get_device_properties(0).total_memory:
            return ["does not fit"]
    peak, seconds = measure(control, sizes, latent, device)
    return [f"{peak / GIB:.1f}" if peak else "-", f"{seconds:.3f}", f"{memory.flops / seconds / 1e12:.3g}"]


def sampling_table() -> None:
    """Sampling in bf16: what is always there, and what a corrected image adds (autoencoder in bf16, critic in float32)."""
    critic = Critic(build_model("segformer_b2", 18), ["class"] * 18).to("meta")
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).requires_grad_(False)
        torch.nn.Module.to(vae, torch.bfloat16)
        with CudaCount([vae, critic], autocast=False) as count:
            critic(decode_latents(torch.empty(1, 16, 64, 64, requires_grad=True), vae).clamp(0, 1))
    row(["sampling, bf16", "weights GiB", "each corrected image GiB"])
    row(["---", "--:", "--:"])
    for scheme in ("triattention", "siamese", "adapter", "controlnet"):
        network = meta_network(SD35_MEDIUM, control_of({"scheme": scheme}))
        held = sum(2 * tensor.numel() for part in (network, vae) for tensor in (*part.parameters(), *part.buffers()))
        held += sum(4 * parameter.numel() for parameter in critic.parameters())
        row([scheme, f"{held / GIB:.1f}", f"{count.saved / GIB:.2f}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run real steps as well")
    parser.add_argument("--small", action="store_true", help="a network of 4 layers of 4x32 and latents of 32x32")
    chosen = parser.parse_args()
    if chosen.measure and not chosen.small and not torch.cuda.is_available():
        parser.error("--measure needs a GPU at full size; add --small")
    training_table(chosen.measure, SMALL if chosen.small else SD35_MEDIUM, (16, 32, 32) if chosen.small else (16, 64, 64))
    if not chosen.small:
        print()
        sampling_table()
