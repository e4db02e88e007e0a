"""The control schemes: how the mask's tokens meet those of image and text. One module per scheme, named like it in the settings.

A module holds either ``BLOCK``, a :class:`crfm_core.models.blocks.JointBlock` of which :class:`crfm_core.models.mmdit.MaskMMDiT` is made,
or ``NETWORK``, a :class:`crfm_core.models.network.ControlNetwork` of its own. What of a scheme is known without its network (the branches
that train, how they start, the options it takes, what the report says) stands in :data:`crfm_core.settings.SCHEMES`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from crfm_core import ConfigError


def scheme_names() -> list[str]:
    """The schemes that have a module here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def scheme_module(name: str) -> ModuleType:
    """The module of a scheme. Raises ConfigError for one that is not known."""
    if name not in scheme_names():
        raise ConfigError(f"scheme={name!r}: must be one of {', '.join(scheme_names())}")
    return importlib.import_module(f"{__name__}.{name}")
