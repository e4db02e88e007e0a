"""What a hostile file of weights may hold, and the proof that it would do harm where it is run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch


class Program:
    """Unpickled, it calls ``function`` with ``arguments``."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def would_run(path: Path, mark: Path) -> bool:
    """Whether the program in ``path``, a file that the test has written itself, makes ``mark`` when it is read the careless way.

    This is the one careless read of the project: without it a test of a refusal would pass, too, where its file is harmless.
    """
    assert not mark.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    return mark.exists()
