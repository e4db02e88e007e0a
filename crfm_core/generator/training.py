"""Fine-tuning the mask-conditioned transformer on cached latents: a loop one can read, accelerate does the processes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from tqdm import tqdm

from crfm_core import WeightsError
from crfm_core.files import atomic_path, hash_of, read_json, seed_of, sha256_of, work_folder, write_json
from crfm_core.generator.latents import CachedLatents
from crfm_core.manifest import read_manifest
from crfm_core.models.flow_schedule import training_sigmas
from crfm_core.models.latent_space import normalise
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import Control
from crfm_core.text.encoders import PARTS, read_prompts


def train_generator(
    base: Path,
    latents: Path,
    prompts: Path,
    captions: Path,
    num_classes: int,
    control: Control,
    out: Path,
    work: Path,
    device: str = "cpu",
) -> None:
    """Train the control scheme on the tiles of ``captions`` and write it as a MaskToImagePipeline folder.

    Objective: flow matching, ||net(z_sigma) - (noise - x0)||^2 (TODSynth, arXiv 2512.16740, and SD3). A step's samples, noise and
    noise levels follow from the seed and the sample's running number alone, so a stopped run that continues from ``work``
    ends with the weights of one that was not stopped.

    Args:
        base: pipeline folder of the base model.
        latents: file of :func:`crfm_core.generator.latents.encode_tiles` for the same tiles.
        prompts: prompt cache.
        captions: manifest with the column ``prompt``.
        out: folder to write.
        work: folder of resumable state.

    Raises:
        WeightsError: the loss became infinite or NaN; the message names the last good checkpoint.
    """
    table = read_manifest(captions)
    cached = CachedLatents(latents, list(table.tile_id))
    embeddings = read_prompts(prompts)
    accelerator = Accelerator(mixed_precision=control.precision, cpu=device == "cpu")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")  # read for its scale and shift; saved with the pipeline
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")  # likewise
    torch.manual_seed(control.seed)
    model = MaskMMDiT.from_sd3(
        SD3Transformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32),
        mask_mlp_modulation=control.mask_mlp_modulation,
        mask_init=control.mask_init,
    )
    parameters = _choose_trainable(model, control)
    if control.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW(parameters, lr=control.learning_rate, weight_decay=control.weight_decay, fused=True)
    schedule = get_scheduler(control.schedule, optimiser, num_warmup_steps=control.warmup, num_training_steps=control.steps)
    model, optimiser = accelerator.prepare(model, optimiser)
    ema = EMAModel(parameters, decay=control.ema, foreach=True) if control.ema else None
    bare = accelerator.unwrap_model(model)

    fingerprint = hash_of(control.model_dump(exclude={"checkpoint_every"}), sha256_of(base / "transformer", latents, prompts))
    with work_folder(work, fingerprint) as state:
        checkpoint = state / "checkpoint.pt"
        start = 0
        if checkpoint.is_file():
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            bare.load_state_dict(saved["model"], strict=False)
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
            if ema:
                ema.load_state_dict(saved["ema"])
            start = saved["step"]
            accelerator.print(f"continuing from step {start} of {control.steps}")

        model.train()
        running = 0.0
        progress = tqdm(total=control.steps, initial=start, desc="generator", disable=None if accelerator.is_main_process else True)
        for step in range(start, control.steps):
            for micro in range(control.accumulate):
                turn = (step * control.accumulate + micro) * accelerator.num_processes + accelerator.process_index
                numbers = range(turn * control.batch_size, (turn + 1) * control.batch_size)
                clean, mask, noise, sigma, rows = _batch(numbers, cached, vae, scheduler.config.shift, control, accelerator.device)
                text, pooled = embeddings.take(list(table.prompt.iloc[rows]))
                level = sigma.view(-1, 1, 1, 1)
                with accelerator.autocast():
                    velocity = model(
                        hidden_states=(1 - level) * clean + level * noise,
                        encoder_hidden_states=text.to(accelerator.device, torch.float32),
                        pooled_projections=pooled.to(accelerator.device, torch.float32),
                        timestep=1000 * sigma,
                        mask_latents=mask,
                        return_dict=False,
                    )[0]
                loss = F.mse_loss(velocity.float(), noise - clean)
                accelerator.backward(loss / control.accumulate)
                running += loss.item() / control.accumulate
            accelerator.clip_grad_norm_(parameters, control.clip_norm)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            if ema:
                ema.step(parameters)
            if not math.isfinite(running):
                held = f"{checkpoint} holds the last good state" if checkpoint.is_file() else "no checkpoint was written yet"
                raise WeightsError(f"generator: the loss became {running} at step {step + 1}; {held}; lower learning_rate")
            progress.update()
            if (step + 1) % 100 == 0:
                accelerator.print(f"generator step {step + 1}/{control.steps} loss {running / 100:.4f}", flush=True)
                running = 0.0
            if (step + 1) % control.checkpoint_every == 0 and accelerator.is_main_process:
                with atomic_path(checkpoint) as aside:
                    torch.save(
                        {
                            "model": {name: p for name, p in bare.state_dict().items() if name in _names(bare, parameters)},
                            "optimiser": optimiser.state_dict(),
                            "schedule": schedule.state_dict(),
                            "ema": ema.state_dict() if ema else None,
                            "step": step + 1,
                        },
                        aside,
                    )
        progress.close()
        if ema:
            ema.copy_to(parameters)
        if accelerator.is_main_process:
            save_generator(bare, vae, scheduler, base, num_classes, control.mask_code, out)
        accelerator.wait_for_everyone()


def _choose_trainable(model: MaskMMDiT, control: Control) -> list[torch.nn.Parameter]:
    """Freeze all but the branches that train and return their parameters, in a fixed order."""
    model.requires_grad_(False)
    chosen = []
    for branch, members in model.branch_parameters().items():
        if branch in control.trainable:
            chosen += [parameter for _, parameter in members]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _names(model: MaskMMDiT, parameters: list[torch.nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def _batch(
    numbers: range, cached: CachedLatents, vae: AutoencoderKL, shift: float, control: Control, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """The samples with these running numbers: clean, mask, noise [B,C,h,w], sigma [B] and the tiles' rows."""
    clean, masks, noises, sigmas, rows = [], [], [], [], []
    for number, row in zip(numbers, _rows(numbers, len(cached), control.seed), strict=True):
        generator = torch.Generator().manual_seed(seed_of("generator", control.seed, number))
        flip = int(torch.rand((), generator=generator) < control.flip)
        latent, mask = cached.sample(row, flip, torch.randn(cached.shape, generator=generator))
        clean.append(normalise(latent, vae))
        masks.append(mask)
        noises.append(torch.randn(cached.shape, generator=generator))
        sigmas.append(training_sigmas(1, generator, control.density, shift)[0])
        rows.append(row)
    stack = [torch.stack(items).to(device) for items in (clean, masks, noises, sigmas)]
    return *stack, rows


def _rows(numbers: range, tiles: int, seed: int) -> Iterator[int]:
    """Tile of each running number: every tile once per pass, each pass in an order of its own."""
    order, current = None, -1
    for number in numbers:
        if number // tiles != current:
            current = number // tiles
            order = torch.randperm(tiles, generator=torch.Generator().manual_seed(seed_of("pass", seed, current)))
        yield int(order[number % tiles])


def save_generator(
    model: MaskMMDiT,
    vae: AutoencoderKL,
    scheduler: FlowMatchEulerDiscreteScheduler,
    base: Path,
    num_classes: int,
    mask_code: str,
    out: Path,
) -> None:
    """Write a MaskToImagePipeline folder; the base model's text encoders are linked, not copied, where the disk allows."""
    pipeline = MaskToImagePipeline(
        transformer=model,
        scheduler=scheduler,
        vae=vae,
        num_classes=num_classes,
        mask_code=mask_code,
    )
    with atomic_path(out) as aside:
        pipeline.save_pretrained(aside)
        index, base_index = read_json(aside / "model_index.json"), read_json(base / "model_index.json")
        for part in PARTS:
            shutil.copytree(base / part, aside / part, copy_function=_link_or_copy)
            index[part] = base_index[part]
        write_json(aside / "model_index.json", index)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
