"""The typed configuration: every key, its meaning, its default and its bounds.

``config.yaml`` and ``configs/*.yaml`` are read into :class:`Settings`; the JSON schema in ``configs/schema.json`` is written from it
(``python -m crfm_core.settings``), so what the documentation, the validator and the code say is one thing.
"""

from crfm_core.settings.base import Byte, Location, Name, Positive, Section, Words
from crfm_core.settings.curation import MARGIN, Filter, Recipe, Resampling
from crfm_core.settings.data import (
    BlockSplit,
    Colour,
    Dataset,
    EmbeddedSource,
    FolderSource,
    FolderSplit,
    FusuSource,
    GeotiffSource,
    GroupSplit,
    LoveDASource,
    ReleasedSource,
    Scale,
    Selection,
    Source,
    Tiling,
)
from crfm_core.settings.generator import SCHEMES, Control, EmbeddedBase, EmbeddedTransformer, EmbeddedVAE, FolderBase, HubBase, LoRA
from crfm_core.settings.loading import KINDS, json_schema, load_dataset, load_datasets, load_settings
from crfm_core.settings.report import Generation, Table
from crfm_core.settings.run import Settings
from crfm_core.settings.sampling import PLAIN, PRESETS, Comparison, Preset, RectifySettings, Sampler
from crfm_core.settings.segmentor import Download, Evaluation, Judge, Segmentor
from crfm_core.settings.text import CaptionModel, Captions, Model

__all__ = [
    "KINDS",
    "MARGIN",
    "PLAIN",
    "PRESETS",
    "SCHEMES",
    "BlockSplit",
    "Byte",
    "CaptionModel",
    "Captions",
    "Colour",
    "Comparison",
    "Control",
    "Dataset",
    "Download",
    "EmbeddedBase",
    "EmbeddedSource",
    "EmbeddedTransformer",
    "EmbeddedVAE",
    "Evaluation",
    "Filter",
    "FolderBase",
    "FolderSource",
    "FolderSplit",
    "FusuSource",
    "Generation",
    "GeotiffSource",
    "GroupSplit",
    "HubBase",
    "Judge",
    "LoRA",
    "Location",
    "LoveDASource",
    "Model",
    "Name",
    "Positive",
    "Preset",
    "Recipe",
    "RectifySettings",
    "ReleasedSource",
    "Resampling",
    "Sampler",
    "Scale",
    "Section",
    "Segmentor",
    "Selection",
    "Settings",
    "Source",
    "Table",
    "Tiling",
    "Words",
    "json_schema",
    "load_dataset",
    "load_datasets",
    "load_settings",
]
