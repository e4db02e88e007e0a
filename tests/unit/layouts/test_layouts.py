"""New layouts of all kinds: how many, in which order, and what is refused."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import pytest
from hand_made_tiles import write_by_hand
from pydantic import Field, ValidationError
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError, layouts
from crfm_core.data.rasters import read_label
from crfm_core.files import sha256_of
from crfm_core.layouts import draw_layouts
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.settings import AnyLayouts, AugmentedLayouts, PredictedLayouts
from crfm_core.settings.layouts import Layouts

KINDS = [PredictedLayouts(kind="predicted"), AugmentedLayouts(kind="augmented"), AugmentedLayouts(kind="augmented", shares="uniform")]
NAMES = ["predicted", "augmented", "uniform"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A dataset's results: six georeferenced training tiles, and eight of which the critic has labelled seven."""
    root = tmp_path_factory.mktemp("results") / "d"
    write_tiles(root / "tiles" / "train.parquet", 6, georeferenced=True)
    labelled = read_manifest(write_tiles(root / "pseudo_labels.parquet", 8, seed=1, prefix="u", georeferenced=True))
    labelled.at[3, "pixels"] = np.zeros(len(CLASSES), int)
    write_manifest(root / "pseudo_labels.parquet", labelled.assign(source="pseudo"))
    return root


def draw(root: Path, settings: AnyLayouts, copies: int = 2, name: str = "new") -> pd.DataFrame:
    out = root / "layouts" / f"{name}.parquet"
    return draw_layouts(settings, root / "tiles" / "train.parquet", copies, CLASSES, out, root / "pseudo_labels.parquet")


def test_every_kind_of_the_settings_is_a_module_and_every_module_a_kind():
    modules = {path.stem for path in Path(layouts.__path__[0]).glob("*.py")} - {"__init__", "sources"}
    assert modules == {get_args(one.model_fields["kind"].annotation)[0] for one in get_args(get_args(AnyLayouts)[0])}
    assert all(callable(import_module(f"{layouts.__name__}.{kind}").draw) for kind in modules)


class MirroredLayouts(Layouts):
    """Training masks upside down."""

    kind: Literal["mirrored"] = Field(description="kind of layouts")


def test_a_new_kind_is_a_module_and_a_class_of_the_settings(root, monkeypatch, tmp_path):
    (tmp_path / "mirrored.py").write_text("""
from crfm_core.data.rasters import read_label
from crfm_core.layouts.sources import LabelledTiles, mask_row

def draw(settings, sources, out, count):
    tiles = LabelledTiles.read(sources.tiles, sources, sources.remedy(settings))
    for index in range(count):
        again, tile = divmod(index, len(tiles))
        yield mask_row(tiles, tile, again, read_label(tiles.labels[tile])[::-1], sources, out)
""")
    monkeypatch.setattr(layouts, "__path__", [*layouts.__path__, str(tmp_path)])
    table = draw(root, MirroredLayouts(kind="mirrored"))
    assert list(table.tile_id) == [f"t{tile}-new-{again}" for again in (0, 1) for tile in range(6)]
    masks = paths_of(root / "layouts" / "new.parquet", table, "label", root)
    assert (read_label(masks[7]) == read_label(root / "tiles" / "train" / "labels" / "t1.tif")[::-1]).all()


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_there_are_copies_times_as_many_as_training_tiles_and_rows_say_what_their_masks_show(root, settings):
    table = draw(root, settings, copies=3)
    assert len(table) == table.tile_id.nunique() == 18 and table["copy"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert set(table.layouts) == {settings.kind}
    manifest = root / "layouts" / "new.parquet"
    for row, image, label in zip(
        table.itertuples(), *(paths_of(manifest, table, column, root) for column in ("image", "label")), strict=True
    ):
        mask = read_label(label)
        assert mask.shape == (row.height, row.width) == (32, 32)
        assert np.bincount(mask[mask != 255], minlength=3).tolist() == list(row.pixels) and np.flatnonzero(row.pixels).tolist() == list(
            row.classes
        )
        assert image.stem == row.mask_of  # the tile it was made from


@pytest.mark.parametrize("settings", KINDS, ids=NAMES)
def test_fewer_copies_are_the_beginning_of_more_and_the_same_again_gives_the_same_bytes(root, settings):
    def files(name: str, copies: int) -> tuple[pd.DataFrame, list[str]]:
        table = draw(root, settings, copies, name).astype({"transform": str, "classes": str, "pixels": str})
        return table, [sha256_of(path) for path in paths_of(root / "layouts" / f"{name}.parquet", table, "label", root)]

    more, masks = files("again", 3)
    manifest = sha256_of(root / "layouts" / "again.parquet")
    fewer, first = files("again", 1)
    pd.testing.assert_frame_equal(fewer, more[:6])
    assert first == masks[:6]
    assert files("again", 3)[1] == masks and sha256_of(root / "layouts" / "again.parquet") == manifest
    other = draw(root, settings.model_copy(update={"seed": 1}), 3, "again")
    assert list(other.tile_id) != list(more.tile_id) or list(other.digest) != list(more.digest)


def test_predicted_masks_stay_where_they_are_and_repeat_when_there_are_too_few(root):
    table, pseudo = draw(root, KINDS[0]), read_manifest(root / "pseudo_labels.parquet").set_index("tile_id")
    assert "u3" not in set(table.mask_of)  # the critic is sure of none of its pixels
    assert list(table.mask_of[:7]) == list(dict.fromkeys(table.mask_of)) and list(table.mask_of[7:]) == list(table.mask_of[:5])
    assert table.tile_id[7] == f"{table.mask_of[0]}-new-1"
    for row in table.itertuples():
        assert row.crs == pseudo.crs[row.mask_of] and list(row.transform) == list(pseudo["transform"][row.mask_of])
        assert row.digest == pseudo.digest[row.mask_of]
    labels = paths_of(root / "layouts" / "new.parquet", table, "label", root)
    assert all(label.parent == root / "pseudo_labels" / "labels" for label in labels) and any(
        (read_label(one) == 255).any() for one in labels
    )


def test_an_augmented_mask_is_no_real_place(root):
    table = draw(root, KINDS[1])
    assert set(table.crs) == {""} and all(len(one) == 0 for one in table["transform"])
    assert all(path.suffix == ".tif" for path in paths_of(root / "layouts" / "new.parquet", table, "label", root))


@pytest.mark.parametrize("kind", ["predicted", "augmented"])
def test_layouts_of_one_class_are_refused_and_nothing_is_written(tmp_path, kind):
    root, label = tmp_path / "d", np.full((8, 8), 1, np.uint8)
    for manifest in (root / "tiles" / "train.parquet", root / "pseudo_labels.parquet"):
        write_by_hand(manifest, [np.zeros((8, 8, 3))] * 2, [label] * 2)
    settings = next(one for one in KINDS if one.kind == kind)
    with pytest.raises(DataError, match=r"layouts\.new: all 4 masks are of one class, water, from which nothing can be learnt; \w+"):
        draw(root, settings)
    assert not (root / "layouts" / "new.parquet").exists()


def test_without_labels_of_unlabelled_tiles_none_are_predicted(root, tmp_path):
    arguments = (root / "tiles" / "train.parquet", 1, CLASSES, root / "layouts" / "new.parquet")
    with pytest.raises(DataError, match=r"layouts\.new: kind predicted needs the critic's labels of unlabelled tiles"):
        draw_layouts(KINDS[0], *arguments)
    nothing = read_manifest(root / "pseudo_labels.parquet")
    nothing["pixels"] = [np.zeros(3, int)] * len(nothing)
    write_manifest(root / "unsure.parquet", nothing)
    with pytest.raises(DataError, match=r"unsure\.parquet: no tile has a labelled pixel, .*; raise pseudo_labels.keep"):
        draw_layouts(KINDS[0], *arguments, pseudo_labels=root / "unsure.parquet")


@pytest.mark.parametrize("settings", KINDS[:2], ids=NAMES[:2])
@pytest.mark.parametrize(("label", "message"), [("../../elsewhere.png", "leads outside"), ("nothing.png", "its label .* is not there")])
def test_a_mask_that_lies_elsewhere_or_nowhere_is_refused_with_its_row(tmp_path, settings, label, message):
    for manifest in (tmp_path / "d" / "tiles" / "train.parquet", tmp_path / "d" / "pseudo_labels.parquet"):
        table = read_manifest(write_tiles(manifest, 2))
        table.loc[1, "label"] = label
        write_manifest(manifest, table)
    with pytest.raises(DataError, match=rf"row t1: .*{message}"):
        draw(tmp_path / "d", settings)


def test_tiles_of_other_classes_are_refused(root):
    with pytest.raises(DataError, match=r"train\.parquet: row t0: counts 3 classes, the dataset has 2"):
        draw_layouts(KINDS[1], root / "tiles" / "train.parquet", 1, CLASSES[:2], root / "layouts" / "new.parquet")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": [1.5, 0.7]}, "scale: 1.5 must not exceed 0.7; give the smaller zoom first"),
        ({"scale": [0, 1]}, "greater than 0"),
        ({"shares": {"water": 0.7, "wood": 0.4}}, "shares: add up to 1.1; allowed: more than 0, at most 1"),
        ({"shares": {"water": 0}}, "greater than 0"),
        ({"shares": {}}, "shares: add up to 0"),
        ({"paste": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        AugmentedLayouts(kind="augmented", **wrong)
