"""mmengine and mmsegmentation imported as this package needs them: without compiled operators and without what they look for in vain."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator

from crfm_core import ConfigError

#: What mmengine imports where it is there, for optimisers that nothing here uses: more than half of its time.
NOT_NEEDED = ("bitsandbytes", "transformers", "torch.distributed.optim")

#: mmcv's compiled operators, which mmcv-lite does not have.
OPERATORS = "mmcv._ext"


class _NoOperators(types.ModuleType):
    """Stands in for mmcv's compiled module while mmsegmentation is imported: any operator exists, none can be called."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            raise ConfigError(f"the operator {name} needs the full mmcv (mmcv-lite is installed); choose another architecture")

        return refuse


@contextlib.contextmanager
def stood_in(**modules: types.ModuleType | None) -> Iterator[None]:
    """Other modules under these names for imports inside the block, None for one that cannot be found; afterwards all is as before."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def lean_imports() -> contextlib.AbstractContextManager[None]:
    """For a block of imports from mmengine: what it takes along only because it is installed is not found there.

    >>> with lean_imports():
    ...     from mmengine.runner import Runner
    """
    return stood_in(**dict.fromkeys(NOT_NEEDED))


def mmseg_imports() -> contextlib.AbstractContextManager[None]:
    """For a block of imports from mmsegmentation.

    mmcv-lite has no compiled operators, yet mmsegmentation imports them. A stand-in is there while it does and gone
    afterwards, because mmengine looks the module up again when a Runner is built. With the full mmcv nothing is stood in.
    """
    missing = importlib.util.find_spec(OPERATORS) is None
    return stood_in(**dict.fromkeys(NOT_NEEDED), **({OPERATORS: _NoOperators(OPERATORS)} if missing else {}))


@functools.cache
def load_mmseg() -> None:
    """Import mmsegmentation and register its models, and those parts that :mod:`crfm_core.segmentor.parts` adds; once."""
    with mmseg_imports():
        import mmseg.models  # noqa: F401

    import crfm_core.segmentor.parts  # noqa: F401
