"""Fine-tuning the mask-conditioned transformer on cached latents: a loop one can read, accelerate does the processes."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from crfm_core import WeightsError
from crfm_core.checkpoints import first_readable
from crfm_core.distributed import ParallelJob, ProcessGroup, process_group
from crfm_core.files import hash_of, require_disk, sha256_of
from crfm_core.generator.export import is_trained, save_generator
from crfm_core.generator.latents import CachedLatents, draw_batch
from crfm_core.generator.memory import LEAN, meta_network, out_of_memory_explained, require_memory, training_memory
from crfm_core.generator.resuming import TrainingState, checkpoints_in, write_checkpoint
from crfm_core.generator.weights import choose_trainable, finished_pipeline, initial_network, make_optimiser
from crfm_core.manifest import read_manifest
from crfm_core.models.flow_schedule import load_scheduler
from crfm_core.models.sd3_names import SD3_SETTINGS
from crfm_core.settings import Control
from crfm_core.text.encoders import NO_PROMPT, PromptCache

#: Updates between two lines of the log and points of the curves.
LOG_EVERY = 100
#: Bins of the noise level whose losses are shown apart.
SIGMA_BINS = 10


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
    """Train the control scheme on the job's tiles and write it as a MaskToImagePipeline folder; each process of the job calls this.

    Objective: flow matching, ||net(z_sigma) - (noise - x0)||^2 (TODSynth, arXiv 2512.16740, and SD3). An update's samples, noise and
    noise levels follow from the seed and the samples' running numbers alone, so a stopped training that continues from ``work``
    ends with the weights of one that was not stopped.

    Raises:
        DataError: latents or prompts of other tiles, another autoencoder or other text encoders.
        WeightsError: the loss became infinite or NaN; the message names the last good checkpoint.
        ResourceError: no room for the next checkpoint, or a batch that does not fit into memory.
    """
    control = job.control
    if control.start_from and not Path(control.start_from).exists():
        raise WeightsError(f"start_from: no file or folder {control.start_from}")
    with process_group(job.processes, job.device) as group:
        fingerprint = group.broadcast(job.fingerprint() if group.is_main else "")
        with group.work_folder(job.work, fingerprint) as work:
            if is_trained(job.out, fingerprint):  # by another run, for whose end this one waited
                if group.is_main:
                    print(f"{job.out} is already trained by these settings", flush=True)
                return
            with out_of_memory_explained(control):
                trained = train_network(job, group, work)
            if group.is_main:
                record = {"fingerprint": fingerprint, "control": control.model_dump(mode="json")}
                save_generator(finished_pipeline(job.base, control, job.num_classes, trained), job.base, job.out, record)


def train_network(job: GeneratorTraining, group: ProcessGroup, work: Path) -> dict[str, Tensor]:
    """The training itself, continued where the checkpoints in ``work`` end; returns the trained weights by name, in the main process."""
    control = job.control
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=control.precision,
        cpu=job.device == "cpu",
        log_with="tensorboard",
        project_dir=job.curves,
        kwargs_handlers=LEAN,
        fsdp_plugin=fsdp_plugin(control),
    )

    # inputs
    table = read_manifest(job.captions)
    latents, prompts = CachedLatents(job.latents, table), PromptCache(job.prompts)
    if group.is_main:
        latents.check(job.base, control.mask_code, job.num_classes)
        prompts.check(job.base)
    vae = AutoencoderKL.from_pretrained(job.base, subfolder="vae")  # for its scale and shift alone
    shift = load_scheduler(job.base).config.shift

    # network, optimiser and learning rate
    network = initial_network(job.base, control, job.num_classes)
    if accelerator.device.type == "cuda":
        sizes = {name: network.config[name] for name in SD3_SETTINGS}
        needed = training_memory(meta_network(sizes, control), control, latents.shape, prompts.tokens)
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

    # resume
    state = TrainingState(network, accelerator.unwrap_model(network), names, optimiser.optimizer, schedule, control.ema)
    require_disk(work, (control.keep_checkpoints + 1) * state.size())
    start = 0
    if saved := first_readable(reversed(checkpoints_in(work)), "the one before it is tried"):
        state.restore(saved)
        start = saved["step"]
        accelerator.print(f"continuing from step {start} of {control.steps}")
    curves = LossCurves(accelerator, job.curves, start)

    network.train()
    bar = {"initial": start, "total": control.steps, "desc": "generator", "disable": None if group.is_main else True}
    for step in tqdm(range(start, control.steps), **bar):
        for micro in range(control.accumulate):
            # all that is random in a sample follows from its running number; each process takes its own share of them
            turn = (step * control.accumulate + micro) * group.size + group.rank
            batch = draw_batch(range(turn * control.batch_size, (turn + 1) * control.batch_size), latents, vae, shift, control)
            named = zip(table.prompt.iloc[batch.rows], batch.unprompted, strict=True)
            text, pooled = prompts.take([NO_PROMPT if empty else prompt for prompt, empty in named])
            text, pooled = (part.to(accelerator.device, torch.float32) for part in (text, pooled))
            clean, mask, noise, sigma = (part.to(accelerator.device) for part in batch[:4])
            # the processes average their gradients once per update; FSDP would keep whole ones for as long as they do not
            synchronise = micro + 1 == control.accumulate or control.parallel == "fsdp"
            with contextlib.nullcontext() if synchronise else accelerator.no_sync(network):
                losses = flow_losses(network, clean, noise, sigma, text, pooled, mask)
                accelerator.backward(losses.mean() / control.accumulate)
            curves.add(sigma, losses.detach())
        norm = accelerator.clip_grad_norm_(state.parameters, control.clip_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            good = checkpoints_in(work)
            kept = f"{good[-1]} holds the last good state" if good else "no checkpoint was written yet"
            raise WeightsError(
                f"generator: at step {step + 1} the loss became {curves.mean():.4g} and its gradient's norm {norm}; {kept}; "
                "lower learning_rate or raise warmup"
            )
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if state.ema:
            state.ema.step(state.parameters)

        last = step + 1 == control.steps
        if last or (step + 1) % LOG_EVERY == 0:
            curves.log(step + 1, control.steps, schedule.get_last_lr()[0], norm)
        if last or (step + 1) % control.checkpoint_every == 0:
            gathered = state.gathered(step + 1)
            if group.is_main:
                write_checkpoint(work, gathered, state.size(), control.keep_checkpoints)
    for tracker in accelerator.trackers:
        tracker.finish()
    return state.result()


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


def fsdp_plugin(control: Control) -> FullyShardedDataParallelPlugin | None:
    """How FSDP shards weights, gradients and optimiser state over the processes; None where each holds them whole."""
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


class LossCurves:
    """TensorBoard's curves of the loss, overall and by noise level, each point the mean since the one before."""

    def __init__(self, accelerator: Accelerator, folder: Path, start: int) -> None:
        self.accelerator = accelerator
        if accelerator.is_main_process and start == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the curves of another training
        accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": start + 1 if start else None}})
        self.sums = torch.zeros(2, SIGMA_BINS, device=accelerator.device)  # of the losses, and how many

    def add(self, sigma: Tensor, losses: Tensor) -> None:
        bins = (sigma * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        self.sums[0].index_add_(0, bins, losses)
        self.sums[1].index_add_(0, bins, torch.ones_like(losses))

    def mean(self) -> float:
        """The mean loss of this process since the last point."""
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
