"""The typed configuration: every key, its meaning, its default and its bounds.

``config.yaml`` and ``configs/*.yaml`` are read into :class:`Settings`; the JSON schema in ``configs/schema.json`` is written from it
(``python -m crfm_core.settings schema``), so what the documentation, the validator and the code say is one thing.
"""

from crfm_core.settings.base import Section, read_section
from crfm_core.settings.curation import (
    MARGIN,
    AgreementFilter,
    AnyFilter,
    AnyResampling,
    ClipFilter,
    Filter,
    HardnessResampling,
    PixelFilter,
    PseudoLabels,
    RareResampling,
    Recipe,
    Resampling,
)
from crfm_core.settings.data import PSEUDO, UNLABELLED, AnySplit, BlockSplit, Dataset, GroupSplit, Scale, Selection, Split, Tiling
from crfm_core.settings.generator import SCHEMES, AnyBase, Control, EmbeddedBase, EmbeddedVAE, FolderBase, HubBase
from crfm_core.settings.layouts import TRAINING, AnyLayouts, AugmentedLayouts, PredictedLayouts
from crfm_core.settings.loading import load_dataset, load_datasets, load_settings
from crfm_core.settings.report import Generation, Table
from crfm_core.settings.run import Settings
from crfm_core.settings.sampling import PLAIN, PRESETS, Comparison, Preset, RectifySettings, Sampler, describe_preset
from crfm_core.settings.schema import json_schema, merge_layers
from crfm_core.settings.segmentor import Architecture, Download, Evaluation, Judge, Segmentor
from crfm_core.settings.sources import (
    AnySource,
    EmbeddedSource,
    FolderSource,
    FolderSplit,
    FusuSource,
    GeotiffSource,
    LoveDASource,
    ReleasedSource,
    Source,
)
from crfm_core.settings.text import CaptionModel, Captions, Model
