"""Fine-tuning the mask-conditioned transformer on cached latents: a loop one can read, accelerate does the processes."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from crfm_core import ResourceError, WeightsError
from crfm_core.distributed import ParallelJob, ProcessGroup, process_group
from crfm_core.files import atomic_path, hash_of, read_json, require_disk, sha256_of, write_json
from crfm_core.generator.batches import draw_batch
from crfm_core.generator.latents import CachedLatents
from crfm_core.generator.memory import LEAN, explain_out_of_memory, meta_network, require_memory, training_memory
from crfm_core.generator.resuming import TrainingState, checkpoints_in, newest_readable, write_checkpoint
from crfm_core.generator.starting import start_from
from crfm_core.generator.trainable import choose_trainable, make_optimiser, merge_low_rank
from crfm_core.manifest import read_manifest
from crfm_core.models.controls import build_network
from crfm_core.models.flow_schedule import load_scheduler
from crfm_core.models.sd3_names import SD3_SETTINGS
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import Control
from crfm_core.text.encoders import ENCODER_PARTS, NO_PROMPT, PromptCache

#: Updates between two lines of the log and points of the curves.
LOG_EVERY = 100
#: Bins of the noise level whose losses are shown apart.
SIGMA_BINS = 10
#: What the weights in a generator's folder follow from.
RECORD = "training.json"


class GeneratorTraining(ParallelJob):
    """One training: what it reads, what it writes, and how.

    Attributes:
        base: pipeline folder of the base model.
        latents: file of :func:`crfm_core.generator.latents.encode_tiles` for the same tiles.
        prompts: prompt cache.
        captions: manifest with the column ``prompt``.
        num_classes: K, kept with the generator.
        out: the MaskToImagePipeline folder to write.
        curves: folder of TensorBoard scalars.
        device: "cpu" or "cuda".
    """

    base: Path
    latents: Path
    prompts: Path
    captions: Path
    num_classes: int
    control: Control
    out: Path
    curves: Path
    device: str = "cpu"

    @property
    def processes(self) -> int:
        return self.control.processes

    def run(self) -> None:
        train_generator(self)

    def fingerprint(self) -> str:
        """What the resulting weights depend on: continuing or keeping a training of another fingerprint would be wrong."""
        inputs = [self.base / "transformer", self.latents, self.prompts, self.captions]
        if self.control.start_from:
            inputs.append(Path(self.control.start_from))
        settings = self.control.model_dump(exclude={"checkpoint_every", "keep_checkpoints"})
        return hash_of(settings, self.num_classes, sha256_of(*inputs))


def train_generator(job: GeneratorTraining) -> None:
    """Train the control scheme on the job's tiles and write it as a MaskToImagePipeline folder.

    Objective: flow matching, ||net(z_sigma) - (noise - x0)||^2 (TODSynth, arXiv 2512.16740, and SD3). An update's samples, noise and
    noise levels follow from the seed and the samples' running numbers alone, so a stopped training that continues from ``work``
    ends with the weights of one that was not stopped. Every process of the job calls this.

    Raises:
        DataError: latents or prompts of other tiles, another autoencoder or other text encoders.
        WeightsError: the loss became infinite or NaN; the message names the last good checkpoint.
        ResourceError: no room for the next checkpoint, or a batch that does not fit into memory.
    """
    if job.control.start_from and not Path(job.control.start_from).exists():
        raise WeightsError(f"start_from: no file or folder {job.control.start_from}")
    with process_group(job.processes, job.device) as group:
        _train(job, group)


def _train(job: GeneratorTraining, group: ProcessGroup) -> None:
    control = job.control
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=control.precision,
        cpu=job.device == "cpu",
        log_with="tensorboard",
        project_dir=job.curves,
        kwargs_handlers=LEAN,
        fsdp_plugin=sharding(control),
    )
    table = read_manifest(job.captions)
    cached = CachedLatents(job.latents, table)
    embeddings = PromptCache(job.prompts)
    fingerprint = group.broadcast(job.fingerprint() if group.is_main else "")
    with group.work_folder(job.work, fingerprint) as held:
        if _is_done(job.out, fingerprint):  # another run has meanwhile finished this very training
            accelerator.print(f"{job.out} is already trained by these settings")
            return
        vae = AutoencoderKL.from_pretrained(job.base, subfolder="vae")  # read for its scale and shift; saved with the pipeline
        scheduler = load_scheduler(job.base)  # likewise
        if accelerator.is_main_process:
            cached.check(job.base, control.mask_code, job.num_classes)
            embeddings.check(job.base)
        network = initial_network(job.base, control, job.num_classes)
        if accelerator.device.type == "cuda":
            sizes = {name: network.config[name] for name in SD3_SETTINGS}
            needed = training_memory(meta_network(sizes, control), control, cached.shape, embeddings.tokens)
            require_memory(needed, torch.cuda.mem_get_info()[1], f"controls.{job.out.name}")
        names = choose_trainable(network, control)
        if control.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if control.compile:
            for block in network.repeated_blocks():
                block.compile()
        optimiser = make_optimiser([network.get_parameter(name) for name in names], control)
        schedule = get_scheduler(control.schedule, optimiser, num_warmup_steps=control.warmup, num_training_steps=control.steps)
        network, optimiser = accelerator.prepare(network, optimiser)
        state = TrainingState(network, accelerator.unwrap_model(network), names, optimiser.optimizer, schedule, control.ema)
        require_disk(held, (control.keep_checkpoints + 1) * state.size())
        start = 0
        if saved := newest_readable(held):
            state.restore(saved)
            start = saved["step"]
            accelerator.print(f"continuing from step {start} of {control.steps}")
        curves = _Curves(accelerator, job.curves, start)

        network.train()
        progress = tqdm(total=control.steps, initial=start, desc="generator", disable=None if accelerator.is_main_process else True)
        with _memory_explained(control):
            for step in range(start, control.steps):
                norm = _update(step, accelerator, network, state, control, cached, embeddings, table, vae, scheduler.config.shift, curves)
                if not math.isfinite(norm):
                    good = checkpoints_in(held)
                    kept = f"{good[-1]} holds the last good state" if good else "no checkpoint was written yet"
                    raise WeightsError(
                        f"generator: at step {step + 1} the loss became {curves.latest():.4g} and its gradient's norm {norm}; {kept}; "
                        "lower learning_rate or raise warmup"
                    )
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                if state.ema:
                    state.ema.step(state.parameters)
                progress.update()
                last = step + 1 == control.steps
                if last or (step + 1) % LOG_EVERY == 0:
                    curves.log(step + 1, control.steps, schedule.get_last_lr()[0], norm)
                if last or (step + 1) % control.checkpoint_every == 0:
                    gathered = state.gathered(step + 1)
                    if accelerator.is_main_process:
                        write_checkpoint(held, gathered, state.size(), control.keep_checkpoints)
        progress.close()
        trained = state.result()
        for tracker in accelerator.trackers:
            tracker.finish()
        if accelerator.is_main_process:
            save_generator(finished_network(job.base, control, job.num_classes, trained), vae, scheduler, job)


def sharding(control: Control) -> FullyShardedDataParallelPlugin | None:
    """How FSDP shares weights, gradients and optimiser state out over the processes; None where each holds them whole."""
    if control.processes == 1 or control.parallel != "fsdp":
        return None
    # accelerate's own choice is to add up gradients in bfloat16
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # block by block, as the network's _no_split_modules names them
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
        mixed_precision_policy=bf16 if control.precision == "bf16" else None,
    )


@contextlib.contextmanager
def _memory_explained(control: Control) -> Iterator[None]:
    """Turn an out-of-memory error of the device or the machine into one that says which settings lower the need."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise ResourceError(explain_out_of_memory(control)) from error


def _is_done(out: Path, fingerprint: str) -> bool:
    record = out / RECORD
    return record.is_file() and read_json(record)["fingerprint"] == fingerprint


def _update(
    step: int,
    accelerator: Accelerator,
    network: nn.Module,
    state: TrainingState,
    control: Control,
    cached: CachedLatents,
    embeddings: PromptCache,
    table,
    vae: AutoencoderKL,
    shift: float,
    curves: _Curves,
) -> float:
    """Accumulate the gradient of update ``step`` and clip it; returns its norm before clipping."""
    for micro in range(control.accumulate):
        turn = (step * control.accumulate + micro) * accelerator.num_processes + accelerator.process_index
        batch = draw_batch(range(turn * control.batch_size, (turn + 1) * control.batch_size), cached, vae, shift, control)
        prompts = zip(table.prompt.iloc[batch.rows], batch.unprompted, strict=True)
        text, pooled = embeddings.take([NO_PROMPT if empty else prompt for prompt, empty in prompts])
        clean, mask, noise, sigma = (part.to(accelerator.device) for part in batch[:4])
        # FSDP would keep whole gradients for as long as they are not shared out
        together = micro + 1 == control.accumulate or control.parallel == "fsdp"
        with contextlib.nullcontext() if together else accelerator.no_sync(network):
            losses = flow_losses(
                network, clean, noise, sigma, text.to(accelerator.device, torch.float32), pooled.to(accelerator.device, torch.float32), mask
            )
            accelerator.backward(losses.mean() / control.accumulate)
        curves.add(sigma, losses.detach())
    norm = accelerator.clip_grad_norm_(state.parameters, control.clip_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def flow_losses(
    network: nn.Module, clean: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor, mask: Tensor | None
) -> Tensor:
    """Each sample's flow-matching loss, [B]: the mean over its elements of (net(z_sigma) - (noise - clean))^2.

    Args:
        clean, noise: normalised latents, [B,C,h,w].
        sigma: noise levels, [B].
        text, pooled: prompt embeddings [B,T,D] and [B,P].
        mask: mask latents [B,C,h,w]; None ignores the mask.
    """
    level = sigma.view(-1, 1, 1, 1)
    velocity = network(
        hidden_states=(1 - level) * clean + level * noise,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=1000 * sigma,
        mask_latents=mask,
        return_dict=False,
    )[0]
    return (velocity.float() - (noise - clean)).square().mean(dim=(1, 2, 3))


class _Curves:
    """Losses between two points of the log: overall and by noise level."""

    def __init__(self, accelerator: Accelerator, folder: Path, start: int) -> None:
        self.accelerator = accelerator
        if accelerator.is_main_process and start == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the curves of another training
        accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": start + 1 if start else None}})
        self.sums = torch.zeros(2, SIGMA_BINS, device=accelerator.device)

    def add(self, sigma: Tensor, losses: Tensor) -> None:
        bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        self.sums[0].index_add_(0, bins, losses)
        self.sums[1].index_add_(0, bins, torch.ones_like(losses))

    def latest(self) -> float:
        """The mean loss since the last point."""
        return float(self.sums[0].sum() / self.sums[1].sum())

    def log(self, step: int, steps: int, learning_rate: float, norm: float) -> None:
        """Write a point of every curve, over the samples of all processes, and start the next."""
        sums, counts = self.accelerator.reduce(self.sums).tolist()
        self.sums.zero_()
        loss = sum(sums) / sum(counts)
        values = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": norm}
        for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                values[f"loss_by_sigma/{index / SIGMA_BINS:.1f}-{(index + 1) / SIGMA_BINS:.1f}"] = total / count
        self.accelerator.log(values, step=step)
        self.accelerator.print(f"generator step {step}/{steps} loss {loss:.4f}", flush=True)


def initial_network(base: Path, control: Control, num_classes: int) -> nn.Module:
    """The control scheme's network before training, in float32 on the CPU: the same for the same settings, whoever builds it."""
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32)
    torch.manual_seed(control.seed)
    network = build_network(transformer, control.scheme, control.initialisation, **control.scheme_options)
    if control.start_from:
        start_from(network, Path(control.start_from), num_classes, control.mask_code)
    return network


def finished_network(base: Path, control: Control, num_classes: int, trained: dict[str, Tensor]) -> nn.Module:
    """The network with ``trained`` weights (by the names of :func:`choose_trainable`), low-rank updates added in, in float32.

    The weights that did not train are those of the base model, to the bit, whatever type they had in training.
    """
    network = initial_network(base, control, num_classes)
    names = choose_trainable(network, control.model_copy(update={"precision": "no"}))
    if set(names) != set(trained):
        raise WeightsError(f"the checkpoint holds other weights than scheme {control.scheme} trains; delete it and train again")
    network.load_state_dict(trained, strict=False)
    if control.lora:
        merge_low_rank(network)
    return network.requires_grad_(False)


def save_generator(network: nn.Module, vae: AutoencoderKL, scheduler: FlowMatchEulerDiscreteScheduler, job: GeneratorTraining) -> None:
    """Write a MaskToImagePipeline folder; the base model's text encoders are linked, not copied, where the disk allows."""
    pipeline = MaskToImagePipeline(
        transformer=network,
        scheduler=scheduler,
        vae=vae,
        num_classes=job.num_classes,
        mask_code=job.control.mask_code,
        caption_dropout=job.control.caption_dropout,
    )
    with atomic_path(job.out) as aside:
        pipeline.save_pretrained(aside)
        index, base_index = read_json(aside / "model_index.json"), read_json(job.base / "model_index.json")
        for part in ENCODER_PARTS:
            shutil.copytree(job.base / part, aside / part, copy_function=link_or_copy)
            index[part] = base_index[part]
        write_json(aside / "model_index.json", index)
        write_json(aside / RECORD, {"fingerprint": job.fingerprint(), "control": job.control.model_dump(mode="json")})


def link_or_copy(source: str, target: str) -> None:
    """A copy of the file that takes no room where the file system can link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
