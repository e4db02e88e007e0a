"""What is chosen by name in the settings is what there is; sources, schemes, architectures and filters have such a test in their room."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
from pydantic import ValidationError

from crfm_core.settings import PLAIN, PRESETS, Comparison, RectifySettings, Sampler
from crfm_core.settings.sampling import Preset


def test_every_preset_of_the_settings_has_its_function():
    assert get_args(Preset) == tuple(PRESETS) and PLAIN not in PRESETS
    assert Comparison.model_fields["presets"].annotation == list[Preset]


def test_a_new_preset_is_one_function_and_one_name(monkeypatch):
    monkeypatch.setitem(PRESETS, "gentle", lambda **changes: RectifySettings(**{"step_size": 0.01, "reduction": "mean"} | changes))

    class ToySampler(Sampler):
        preset: Literal["paper", "gentle"] | None = None

    sampler = ToySampler(preset="gentle", rectify={"steps": 2})
    assert sampler.rectify == RectifySettings(steps=2, step_size=0.01, reduction="mean") and sampler.changed == ["steps"]
    assert "batch_size" in sampler.result_keys()  # it divides by the batch
    assert ToySampler(**sampler.result_keys(), **sampler.performance_keys()) == sampler  # as a job gets it
    assert "step size 0.01" in sampler.rectify.describe()


def test_a_preset_that_is_not_there_is_refused():
    with pytest.raises(ValidationError, match="Input should be 'paper', 'released', 'default' or 'adaptive'"):
        Sampler(preset="gentle")
    with pytest.raises(ValidationError, match="Input should be"):
        Sampler(preset=["paper"])
