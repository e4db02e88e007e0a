"""The best weights of a training so far, by their loss on held-out tiles, and when it is no use to go on."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


class BestWeights:
    """What the looks at held-out tiles have found. It is the same in all processes, but weights are those of the main one alone.

    Attributes:
        patience: looks in a row without a lower loss that end the training; None: nothing does.
        history: step and loss of each look.
        weights: those of the look with the lowest loss.
        loss_mask_ignored: loss of these weights with the masks left out.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.history: list[dict[str, Any]] = []
        self.weights: dict[str, Tensor] = {}
        self.loss_mask_ignored = math.nan

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The look with the lowest loss, the earliest of equals; None where none had a loss that is a number."""
        finite = [look for look in self.history if math.isfinite(look["loss"])]
        return min(finite, key=lambda look: (look["loss"], look["step"])) if finite else None

    @property
    def over(self) -> bool:
        """Whether so many looks as there is patience have found nothing lower."""
        best = self.history.index(self.chosen) if self.chosen else -1
        return self.patience is not None and len(self.history) - 1 - best >= self.patience

    def add(self, step: int, loss: float) -> bool:
        """Note a look; whether its loss is the lowest so far."""
        self.history.append({"step": step, "loss": loss})
        return self.chosen == self.history[-1]

    def keep(self, weights: dict[str, Tensor], loss_mask_ignored: float) -> None:
        """Keep a copy of the weights of the last look."""
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.loss_mask_ignored = loss_mask_ignored

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"history": self.history, "weights": self.weights, "loss_mask_ignored": self.loss_mask_ignored}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` gave."""
        self.history, self.loss_mask_ignored = list(state["history"]), state["loss_mask_ignored"]
        self.weights = dict(state["weights"])

    def record(self) -> dict[str, Any]:
        """What the generator's record says of it."""
        return {**(self.chosen or {}), "loss_mask_ignored": self.loss_mask_ignored, "history": self.history}
