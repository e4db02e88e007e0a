"""Kinds of filter and re-sampling: each is one module and one class of the settings, and a new one needs no more."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, get_args

import pytest
from pydantic import Field
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError
from crfm_core.curation import filters, resampling
from crfm_core.curation.filters import filter_tiles
from crfm_core.curation.resampling import resample_tiles
from crfm_core.settings import AnyFilter, AnyResampling, read_section
from crfm_core.settings.curation import ImageFilter, PixelFilter, Resampling


def kinds_of(union) -> dict[str, type]:
    """The classes of a discriminated union of the settings by their kind."""
    classes = get_args(get_args(union)[0])
    return {get_args(one.model_fields["kind"].annotation)[0]: one for one in classes}


@pytest.mark.parametrize(("room", "union", "entry"), [(filters, AnyFilter, "apply"), (resampling, AnyResampling, "choose")])
def test_every_kind_of_the_settings_is_a_module_and_every_module_a_kind(room, union, entry):
    modules = {path.stem for path in Path(room.__path__[0]).glob("*.py")} - {"__init__"}
    assert modules == set(kinds_of(union))
    assert all(callable(getattr(import_module(f"{room.__name__}.{kind}"), entry)) for kind in modules)


def add_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: ModuleType, text: str) -> None:
    """Add a module ``toy`` to a room, as a new file in its folder would be."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path / "toys")])


class ToyFilter(ImageFilter):
    """Keeps the images with the longest captions."""

    kind: Literal["toy"] = Field(description="kind of filter")


def test_a_new_filter_is_a_module_and_a_class_of_the_settings(monkeypatch, tmp_path):
    add_kind(monkeypatch, tmp_path, filters, """
from crfm_core.curation.selection import keep_best
from crfm_core.manifest import read_manifest

def apply(settings, inputs):
    scores = read_manifest(inputs.manifest).caption.map(len)
    return keep_best(inputs.manifest, "length", scores, settings.keep, inputs.out, inputs.classes)
""")  # fmt: skip
    manifest = write_tiles(tmp_path / "d" / "all.parquet", 4, caption=["a", "abcd", "abc", "ab"])
    settings = read_section(Annotated[PixelFilter | ToyFilter, Field(discriminator="kind")], {"kind": "toy", "keep": 0.5})
    table = filter_tiles(settings, manifest, tmp_path / "d", tmp_path / "d" / "long.parquet", CLASSES)
    assert table.tile_id.tolist() == ["t1", "t2"] and table.length.tolist() == [4, 3]
    next((tmp_path / "d").rglob("t3.png")).unlink()
    with pytest.raises(DataError, match=r"row t3: its \w+ \S+t3\.png is not there"):
        filter_tiles(settings, manifest, tmp_path / "d", tmp_path / "d" / "again.parquet", CLASSES)


class ToyResampling(Resampling):
    """Keeps the second copies."""

    kind: Literal["toy"] = Field(description="kind of re-sampling")
    copy_kept: int = 1


def test_a_new_resampling_is_a_module_and_a_class_of_the_settings(monkeypatch, tmp_path):
    add_kind(monkeypatch, tmp_path, resampling, """
REMEDY = "draw more copies"

def choose(settings, table, manifest, tiles, class_losses, classes):
    return (table["copy"] == settings.copy_kept).to_numpy()
""")  # fmt: skip
    manifest = write_tiles(tmp_path / "all.parquet", 4, copy=[0, 1, 0, 1])
    arguments = (manifest, tmp_path / "tiles.parquet", [0.1] * 3, CLASSES, tmp_path / "kept.parquet")
    assert resample_tiles(ToyResampling(kind="toy"), *arguments).tile_id.tolist() == ["t1", "t3"]
    with pytest.raises(DataError, match=r"none of the 4 tiles of .* is kept; draw more copies"):
        resample_tiles(ToyResampling(kind="toy", copy_kept=2), *arguments)
