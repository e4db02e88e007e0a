"""mmengine and mmsegmentation imported as this package needs them: lean, and with or without mmcv's compiled operators.

The full mmcv holds operators that must be compiled for each version of torch and CUDA. mmcv-lite is the same package without them, installs
everywhere, and is all that the architectures known by name need: while mmsegmentation is imported, a stand-in takes the place of the
compiled module. A network that calls an operator is refused with its name. With the full mmcv installed in its place
(``pip uninstall mmcv-lite; pip install mmcv==2.1.0``, built for the torch that is there) nothing stands in. No test runs that combination.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator

from crfm_core import ConfigError

#: What mmengine imports where it is installed, for optimisers that nothing here uses: more than half of its time.
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
def replaced_modules(**modules: types.ModuleType | None) -> Iterator[None]:
    """Other modules under these names for imports inside the block, None for one that cannot be found; afterwards all is as before."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)  # type: ignore[arg-type]  # None is what the import system takes for a module that is not there
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def lean_imports() -> contextlib.AbstractContextManager[None]:
    """For a block of imports from mmengine: what it imports only because it is installed is not found there."""
    return replaced_modules(**dict.fromkeys(NOT_NEEDED))


def mmseg_imports() -> contextlib.AbstractContextManager[None]:
    """For a block of imports from mmcv and mmsegmentation: lean, and with a stand-in for compiled operators that are not installed.

    The stand-in is gone afterwards, because mmengine looks the module up again when a Runner is built.
    """
    missing = importlib.util.find_spec(OPERATORS) is None
    return replaced_modules(**dict.fromkeys(NOT_NEEDED), **({OPERATORS: _NoOperators(OPERATORS)} if missing else {}))
