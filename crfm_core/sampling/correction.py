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

NO_LABELS = "no labelled pixel: not corrected"

#: What is recorded of each correction, by the fields of :class:`crfm_core.sampling.rectify.Correction`.
MEASUREMENTS = ("step_size", "loss_before", "loss_after", "agreement", "gradient_ratio", "clamp_ratio")

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
        self.notes = ["" if labelled or not self.step_sizes else NO_LABELS for labelled in self.active]

    def __call__(self, step: int, sigma: float, velocity: Tensor, latents: Tensor) -> Tensor:
        """The velocity [B, C, h, w] to follow at ``step`` and noise level ``sigma``, given the network's and the latents there."""
        settings, rows = self.settings, self.active.nonzero().flatten()
        if settings is None or step >= settings.steps or not len(rows):
            return velocity

        def correct(part: Tensor) -> Correction:
            longest = self.step_sizes[step]
            size = self.first_trial[part].clamp(max=longest) if settings.search != "none" else longest
            return correct_velocity(
                velocity[part], latents[part], sigma, self.labels[part].long(), self.decode, self.critic, settings, size,
                measure=settings.measure, batch=len(self.labels),
            )  # fmt: skip

        corrected = velocity.clone()
        for part, done in self._in_parts(rows, correct):
            finite = (done.loss_before if done.loss_after is None else done.loss_before + done.loss_after).isfinite().cpu()
            corrected[part[finite]] = done.velocity[finite]
            for row in part[~finite].tolist():
                self.notes[row] = f"the critic's loss is not finite at step {step}: not corrected from there on"
            self.active[part[~finite]] = False
            columns = [getattr(done, name) for name in MEASUREMENTS]
            values = [[None] * len(part) if column is None else column.tolist() for column in columns]
            for row, known, *numbers in zip(part.tolist(), finite.tolist(), *values, strict=True):
                if known:
                    self.records[row].append({"step": step, "sigma": sigma, **dict(zip(MEASUREMENTS, numbers, strict=True))})
            if settings.search != "none":
                self._plan_search(settings, part, done)
        return corrected

    def _in_parts(self, rows: Tensor, correct: Callable[[Tensor], Correction]) -> list[tuple[Tensor, Correction]]:
        """The rows' corrections, with as many samples at once as memory allows."""
        while True:
            parts = rows.split(self.chunk)
            try:
                return [(part, correct(part)) for part in parts]
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

    def _plan_search(self, settings: RectifySettings, rows: Tensor, done: Correction) -> None:
        """Where the next search starts, and which samples are done."""
        taken, tried = done.step_size.cpu().float(), done.tried.cpu().float()
        self.first_trial[rows] = torch.where(taken > 0, GROWTH * taken, tried)
        self.failures[rows] = torch.where(taken > 0, 0, self.failures[rows] + 1)
        finished = (done.agreement.cpu() >= settings.agreement) | (self.failures[rows] >= settings.patience)
        self.active[rows[finished]] = False
