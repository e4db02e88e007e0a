"""Correction of a batch's velocities by the critic: which samples at which step, and a record of what it did."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from crfm_core import ResourceError
from crfm_core.data.rasters import IGNORE
from crfm_core.sampling.rectify import Correction, RectifySettings, correct_velocity

UNLABELLED = "no labelled pixel: not corrected"

#: A search starts from this multiple of the step size that it found last.
GROWTH = 2.0


class VelocityCorrector:
    """Corrects the velocities of B samples over the steps of a sampling run.

    A sample is no longer corrected once nothing can be gained: it has no labelled pixel, the critic's loss for it was not finite, or,
    with ``settings.search``, the critic agrees with its mask or no step has lowered its loss for ``settings.patience`` steps. If memory
    does not suffice for all samples at once they are corrected in parts, which changes nothing but the time.

    Attributes:
        records: per sample one dict for each step it was corrected in; see
            :class:`crfm_core.sampling.pipeline.MaskToImageOutput`.
        notes: per sample what its user should know, "" for nothing.
    """

    def __init__(
        self,
        labels: Tensor,
        decode: Callable[[Tensor], Tensor],
        critic: Callable[[Tensor], Tensor] | None,
        settings: RectifySettings | None,
        num_steps: int,
    ) -> None:
        """Args: ``labels`` [B, H, W] on the device of the latents; ``decode`` and ``critic`` as in
        :func:`crfm_core.sampling.rectify.rectify_velocity`; ``settings`` None corrects nothing; ``num_steps`` of the whole run."""
        self.labels = labels.to(torch.uint8)  # the labels of many windows are held at once
        self.decode, self.settings = decode, settings
        self.critic: Any = getattr(critic, "logits", critic)
        self.step_sizes = settings.step_sizes(num_steps) if settings else []
        self.active = (labels != IGNORE).flatten(1).any(1).cpu()
        self.first_trial = torch.full((len(labels),), torch.inf)  # the step size a search starts from
        self.failures = torch.zeros(len(labels), dtype=torch.long)
        self.chunk = len(labels)  # samples corrected at once
        self.records: list[list[dict[str, float | None]]] = [[] for _ in labels]
        self.notes = ["" if labelled or not self.step_sizes else UNLABELLED for labelled in self.active]

    def __call__(self, step: int, sigma: float, velocity: Tensor, latents: Tensor) -> Tensor:
        """The velocity [B, C, h, w] to follow at ``step`` and noise level ``sigma``, given the network's and the latents there."""
        rows = self.active.nonzero().flatten()
        settings = self.settings
        if settings is None or step >= settings.steps or not len(rows):
            return velocity
        velocity = velocity.clone()
        for part, done in zip(*self._correct_in_chunks(settings, rows, step, sigma, velocity, latents), strict=True):
            finite = (done.loss_before if done.loss_after is None else done.loss_before + done.loss_after).isfinite().cpu()
            velocity[part[finite]] = done.velocity[finite]
            for row in part[~finite].tolist():
                self.notes[row] = f"the critic's loss is not finite at step {step}: not corrected from there on"
            self.active[part[~finite]] = False
            self._record(part, done, finite, step, sigma)
            if settings.search != "none":
                self._plan_search(settings, part, done)
        return velocity

    def _correct_in_chunks(
        self, settings: RectifySettings, rows: Tensor, step: int, sigma: float, velocity: Tensor, latents: Tensor
    ) -> tuple[tuple[Tensor, ...], list[Correction]]:
        """The rows' corrections, with as many samples at once as memory allows."""
        while True:
            parts = rows.split(self.chunk)
            try:
                return parts, [self._correct(settings, part, step, sigma, velocity, latents) for part in parts]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                reason = str(error).splitlines()[0]
            # Out of the block above, so that the tensors its error holds are gone.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.chunk = min(self.chunk, len(rows)) // 2
            if not self.chunk:
                raise ResourceError(
                    f"not enough memory to correct a single sample of {self.labels.shape[1]}x{self.labels.shape[2]} ({reason}); "
                    "sample smaller masks, give a critic_decoder, or use a machine with more memory"
                )
            print(f"not enough memory to correct {len(parts[0])} samples at once; going on with {self.chunk}", flush=True)

    def _correct(self, settings: RectifySettings, rows: Tensor, step: int, sigma: float, velocity: Tensor, latents: Tensor) -> Correction:
        longest = self.step_sizes[step]
        size = self.first_trial[rows].clamp(max=longest) if settings.search != "none" else longest
        labels = self.labels[rows].long()
        return correct_velocity(
            velocity[rows], latents[rows], sigma, labels, self.decode, self.critic, settings, size,
            measure=settings.measure, batch=len(self.labels),
        )  # fmt: skip

    def _plan_search(self, settings: RectifySettings, rows: Tensor, done: Correction) -> None:
        """Where the next search starts, and which samples are done."""
        taken, tried = done.step_size.cpu().float(), done.tried.cpu().float()
        self.first_trial[rows] = torch.where(taken > 0, GROWTH * taken, tried)
        self.failures[rows] = torch.where(taken > 0, 0, self.failures[rows] + 1)
        finished = (done.agreement.cpu() >= settings.agreement) | (self.failures[rows] >= settings.patience)
        self.active[rows[finished]] = False

    def _record(self, rows: Tensor, done: Correction, finite: Tensor, step: int, sigma: float) -> None:
        columns = ("step_size", "loss_before", "loss_after", "agreement", "gradient_ratio", "clamp_ratio")
        values = [[None] * len(rows) if (column := getattr(done, name)) is None else column.tolist() for name in columns]
        for row, known, *numbers in zip(rows.tolist(), finite.tolist(), *values, strict=True):
            if known:
                self.records[row].append({"step": step, "sigma": sigma, **dict(zip(columns, numbers, strict=True))})
