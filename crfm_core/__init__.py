"""Few labels in, a better remote-sensing segmentor out: the package behind the workflow, usable from a notebook.

A subpackage imports only from those before it in the order of :data:`ROOMS`; a test holds this.
"""

__version__ = "0.1.0"

ROOMS = (
    "settings",
    "files",
    "layout",
    "experiment",
    "manifest",
    "devices",
    "distributed",
    "checkpoints",
    "hub",
    "data",
    "metrics",
    "text",
    "models",
    "segmentor",
    "sampling",
    "generator",
    "layouts",
    "curation",
    "planning",
    "reporting",
)


class CrfmError(Exception):
    """Base of every error this package raises on purpose: the message names the fault and the remedy."""


class ConfigError(CrfmError):
    """A configuration key is unknown, of the wrong type or contradicts another."""


class DataError(CrfmError):
    """A scene, label, tile or manifest is missing, unreadable or inconsistent."""


class WeightsError(CrfmError):
    """A checkpoint or model folder is missing, damaged or does not fit the model."""


class ResourceError(CrfmError):
    """The machine lacks what the job needs: a GPU, memory or disk."""


class PreflightError(CrfmError):
    """What is left to be done would fail: a list of all that stands in its way, each with its remedy."""
