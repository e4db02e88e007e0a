"""Fine-tuning the mask-conditioned transformer on cached latents: a loop one can read, accelerate does the processes."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm

from crfm_core import DataError, WeightsError
from crfm_core.checkpoints import first_readable
from crfm_core.distributed import ParallelJob, ProcessGroup, process_group
from crfm_core.files import hash_of, require_disk, sha256_of
from crfm_core.generator.best_weights import BestWeights
from crfm_core.generator.export import is_trained, save_generator
from crfm_core.generator.held_out import choose_held_out, first_by_hash
from crfm_core.generator.latents import draw_batch
from crfm_core.generator.memory import LEAN, meta_network, out_of_memory_explained, require_memory, training_memory
from crfm_core.generator.objective import flow_losses, losses_by_level
from crfm_core.generator.resuming import TrainingState, checkpoints_in, write_checkpoint
from crfm_core.generator.tiles import HeldOutTiles, OpenedTiles, TileFiles, embeddings_of
from crfm_core.generator.weights import choose_trainable, finished_pipeline, initial_network, make_optimiser
from crfm_core.models.flow_schedule import load_scheduler
from crfm_core.models.sd3_names import SD3_SETTINGS
from crfm_core.settings import Control

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
        unlabelled: tiles without labels, or with the critic's, for ``control.unlabelled_share``.
        validation: tiles to look at for ``control.validate_every``; None: some of the training tiles, which are left out.
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
    unlabelled: TileFiles | None = None
    validation: TileFiles | None = None

    @property
    def tiles(self) -> TileFiles:
        """Files of the tiles that are trained on."""
        return TileFiles(latents=self.latents, prompts=self.prompts, captions=self.captions)

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
        for files in (self.unlabelled, self.validation):
            inputs += files.paths() if files else []
        settings = self.control.older_keys(frozenset({"checkpoint_every", "keep_checkpoints"}))
        return hash_of(settings, self.num_classes, sha256_of(*inputs))


def train_generator(job: GeneratorTraining) -> None:
    """Train the control scheme on the job's tiles and write it as a MaskToImagePipeline folder; each process of the job calls this.

    Objective: flow matching, ||net(z_sigma) - (noise - x0)||^2 (TODSynth, arXiv 2512.16740, and SD3). An update's samples, noise and
    noise levels follow from the seed and the samples' running numbers alone, so a stopped training that continues from ``work``
    ends with the weights of one that was not stopped. With ``control.validate_every`` the weights are those with the lowest loss on
    held-out tiles, and the record says which step that was.

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
                trained, looks = train_network(job, group, work)
            if group.is_main:
                record = {"fingerprint": fingerprint, "control": control.older_keys()} | ({"validation": looks} if looks else {})
                save_generator(finished_pipeline(job.base, control, job.num_classes, trained), job.base, job.out, record)


def train_network(job: GeneratorTraining, group: ProcessGroup, work: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training itself, continued where the checkpoints in ``work`` end.

    Returns: the trained weights by name, in the main process, and what the looks at held-out tiles found, empty where there were none.
    """
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
    tiles = OpenedTiles(job.tiles)
    unlabelled = OpenedTiles(job.unlabelled, control.unlabelled_masks != "none") if job.unlabelled and control.unlabelled_share else None
    if control.unlabelled_share and unlabelled is None:
        raise DataError(f"controls.{job.out.name}.unlabelled_share: no unlabelled tiles were given; set it to 0")
    others = OpenedTiles(job.validation) if job.validation and control.validate_every else None
    for opened in filter(None, (tiles, unlabelled, others)) if group.is_main else ():
        opened.check(job.base, control.mask_code, job.num_classes)
    vae = AutoencoderKL.from_pretrained(job.base, subfolder="vae")  # for its scale and shift alone
    shift = load_scheduler(job.base).config.shift
    rows, looked_at = split_tiles(tiles, others, control)
    if control.validate_every and not looked_at:
        accelerator.print("no held-out tile to look at: training goes by steps", flush=True)
    held_out = HeldOutTiles.of(others or tiles, looked_at, vae) if looked_at else None
    if held_out and control.mask_dropout == 1:
        held_out = held_out._replace(mask=None)
    best = BestWeights(control.patience) if held_out else None

    # network, optimiser and learning rate
    network = initial_network(job.base, control, job.num_classes)
    if accelerator.device.type == "cuda":
        sizes = {name: network.config[name] for name in SD3_SETTINGS}
        needed = training_memory(meta_network(sizes, control), control, tiles.latents.shape, tiles.prompts.tokens)
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
    state = TrainingState(network, accelerator.unwrap_model(network), names, optimiser.optimizer, schedule, control.ema, best)
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
        if best and best.over:
            break
        for micro in range(control.accumulate):
            # all that is random in a sample follows from its running number; each process takes its own share of them
            turn = (step * control.accumulate + micro) * group.size + group.rank
            numbers = range(turn * control.batch_size, (turn + 1) * control.batch_size)
            batch = draw_batch(numbers, tiles.latents, vae, shift, control, rows, unlabelled.latents if unlabelled else None)
            text, pooled = (part.to(accelerator.device, torch.float32) for part in embeddings_of(batch, tiles, unlabelled))
            clean, noise, sigma = (part.to(accelerator.device) for part in (batch.clean, batch.noise, batch.sigma))
            mask, present = None, None
            if control.mask_dropout < 1:
                mask = batch.mask.to(accelerator.device)
                # a sample without a mask goes through the same forward pass: all processes then do the same, whichever samples they have
                present = None if all(batch.masked) else torch.tensor(batch.masked, device=accelerator.device)
            # the processes average their gradients once per update; FSDP would keep whole ones for as long as they do not
            synchronise = micro + 1 == control.accumulate or control.parallel == "fsdp"
            with contextlib.nullcontext() if synchronise else accelerator.no_sync(network):
                losses = flow_losses(network, clean, noise, sigma, text, pooled, mask, present)
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
        if best and held_out and (last or (step + 1) % (control.validate_every or 1) == 0):
            look(step + 1, best, held_out, state, group, shift)
            accelerator.log({"held_out_loss": best.history[-1]["loss"]}, step=step + 1)
            last = last or best.over
        if last or (step + 1) % LOG_EVERY == 0:
            curves.log(step + 1, control.steps, schedule.get_last_lr()[0], norm)
        if last or (step + 1) % control.checkpoint_every == 0:
            gathered = state.gathered(step + 1)
            if group.is_main:
                write_checkpoint(work, gathered, state.size(), control.keep_checkpoints)
    for tracker in accelerator.trackers:
        tracker.finish()
    if best and best.chosen:
        accelerator.print(f"the weights of step {best.chosen['step']} have the lowest loss on held-out tiles and are kept", flush=True)
        tiles_of_looks = {"left_out": others is None, "tiles": [(others or tiles).ids[row] for row in looked_at]}
        return best.weights, best.record() | tiles_of_looks
    return state.result(), {}


def split_tiles(tiles: OpenedTiles, others: OpenedTiles | None, control: Control) -> tuple[list[int] | None, list[int]]:
    """The rows of the tiles that are trained on, None for all, and the rows that are looked at: of ``others`` where there are such tiles,
    else of the tiles themselves."""
    if not control.validate_every:
        return None, []
    if others:
        return None, first_by_hash(others.ids)
    looked_at = choose_held_out(tiles.ids, control.validation_share)
    return [row for row in range(len(tiles.ids)) if row not in {*looked_at}], looked_at


def look(step: int, best: BestWeights, tiles: HeldOutTiles, state: TrainingState, group: ProcessGroup, shift: float) -> None:
    """Take the loss on held-out tiles after ``step`` updates, and keep the weights where it is the lowest; all processes must call it."""

    def loss_of(mask: Tensor | None) -> float:
        by_level = losses_by_level(state.network, tiles.clean, tiles.text, tiles.pooled, mask, shift, group.device)
        # the processes' own may differ in their last digits, and all must go the same way
        return group.broadcast(fmean(loss for _, loss in by_level))

    with state.averaged():
        lowest = best.add(step, loss_of(tiles.mask))
        mask_ignored = loss_of(None) if lowest else math.nan
    if lowest:
        best.keep(state.result(), mask_ignored)
    if group.is_main:
        found = f"step {step}: loss on held-out tiles {best.history[-1]['loss']:.4f}"
        print(f"{found}, the lowest so far; {mask_ignored:.4f} with the masks left out" if lowest else found, flush=True)


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
