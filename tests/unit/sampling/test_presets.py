"""Presets of the correction: each says what it is, and a new one draws as soon as it is one function and one entry."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import pytest
import torch
from tiny_models import TinyCritic, tiny_pipeline

from crfm_core.sampling.sampler import OpenedSampler
from crfm_core.settings import PRESETS, RectifySettings, Sampler, describe_preset


def test_every_preset_says_what_it_is():
    sentences = [describe_preset(name) for name in PRESETS]
    assert all(sentence.endswith(".") for sentence in sentences) and len(set(sentences)) == len(PRESETS)


def gentle(**changes) -> RectifySettings:
    """A hundredth of the velocity's length."""
    return RectifySettings(**{"step_size": 0.01, "steps": 1} | changes)


class ToySampler(Sampler):
    """The settings of a sampler with one more value of the preset."""

    preset: Literal["gentle"] | None = None


def test_a_new_preset_corrects_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PRESETS, "gentle", gentle)
    settings = ToySampler(num_steps=3, preset="gentle", rectify={"steps": 2})
    assert describe_preset("gentle") == "A hundredth of the velocity's length." and settings.changed == ["steps"]
    assert asdict(settings.rectify) == asdict(RectifySettings(step_size=0.01, steps=2))
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    draw = OpenedSampler(settings, tiny_pipeline(), TinyCritic())
    (record,) = draw(torch.zeros(1, 16, 16, dtype=torch.long), text, text[:, 0, :24], torch.Generator().manual_seed(0)).records
    assert [entry["step_size"] for entry in record] == pytest.approx([0.01, 0.01])
