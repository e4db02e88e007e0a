"""The processes of one training: which of them this is, and what they tell each other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from crfm_core import ConfigError

Value = TypeVar("Value")

#: The environment variable that says where the processes meet.
RENDEZVOUS = "CRFM_RENDEZVOUS"


@dataclasses.dataclass(frozen=True)
class Place:
    """Process ``rank`` of ``count``, on ``device`` ("cpu", "cuda" or "cuda:1"). With one process nothing is told to anybody."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def part(self, batch_size: int) -> range:
        """The places in a batch of all processes that are this one's."""
        own = batch_size // self.count
        return range(self.rank * own, (self.rank + 1) * own)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def told(self, value: Value) -> Value:
        """What the first process passed here, in all of them."""
        box: list[Any] = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, value: torch.Tensor) -> float:
        """The mean over the processes of a number, which lies on their device."""
        value = value.detach()
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value) / self.count

    def total(self, counts: np.ndarray) -> np.ndarray:
        """The sum over the processes of an array of whole numbers."""
        if self.count == 1:
            return counts
        summed = torch.from_numpy(counts).to(self.device)
        dist.all_reduce(summed)
        return summed.cpu().numpy()


@contextlib.contextmanager
def joined(count: int, device: str) -> Iterator[Place]:
    """This process's place among the ``count`` that train together, each with a GPU of its own where ``device`` is "cuda".

    :func:`crfm_core.segmentor.launching.launch_training` starts them; torchrun could. Raises ConfigError when they are not as many.
    """
    if count == 1:
        yield Place(device=device)
        return
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) != count:
        raise ConfigError(f"processes: {count}, and {started} was started; use launch_training, or set processes: 1")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    # the others wait while the first measures, writes, or reads a slow disk
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=os.environ.get(RENDEZVOUS, "env://"),
        rank=int(os.environ["RANK"]),
        world_size=count,
        timeout=timedelta(hours=1),
    )
    yield Place(dist.get_rank(), count, device)
    dist.barrier()
    dist.destroy_process_group()  # after a fault the process ends, and asking the others would only hang
