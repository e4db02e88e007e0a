"""Real, synthetic and pseudo-labelled tiles in one training set: counts, weights, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pandas as pd
import pytest
from segmentor_tiles import CLASSES, write_tiles

from crfm_core import DataError
from crfm_core.curation.mixing import mix
from crfm_core.manifest import paths_of, read_manifest, write_manifest
from crfm_core.segmentor.dataset import WeightedDraws


def test_a_mix_has_the_counts_and_weights_asked_for(tmp_path):
    real = write_tiles(tmp_path / "tiles" / "train.parquet", 4, prefix="r")
    copies = [2, 1, 0] * 6
    synthetic = write_tiles(tmp_path / "synthetic" / "all.parquet", 18, prefix="s", copy=copies)
    table = mix(real, synthetic, tmp_path / "mixes" / "m.parquet", synthetic_per_real=3, real_weight=4, seed=1)
    assert table.source.tolist() == ["real"] * 4 + ["synthetic"] * 12
    assert table.weight.tolist() == [4.0] * 4 + [1.0] * 12
    assert sorted(table["copy"].dropna()) == [0] * 6 + [1] * 6
    for column in ("image", "label"):
        assert all(path.is_file() for path in paths_of(tmp_path / "mixes" / "m.parquet", table, column, tmp_path))


def test_a_mix_depends_on_its_seed_only_and_a_smaller_one_is_part_of_a_larger(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic.parquet", 12, prefix="s")
    again, same, larger, other = (
        mix(real, synthetic, tmp_path / f"{name}.parquet", share, seed=seed).tile_id.tolist()
        for name, share, seed in (("again", 2, 0), ("same", 2, 0), ("larger", 3, 0), ("other", 2, 1))
    )
    assert again == same
    assert larger[:9] == same
    assert other != same


def test_a_mix_of_real_tiles_alone_needs_nothing_synthetic(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3)
    assert len(mix(real, None, tmp_path / "mix.parquet")) == 3


def test_too_few_synthetic_tiles_are_an_error_that_names_the_counts(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic.parquet", 5, prefix="s")
    with pytest.raises(DataError, match=r"5 synthetic tiles, and 2 for each of 3 real ones are 6; make more copies"):
        mix(real, synthetic, tmp_path / "mix.parquet", synthetic_per_real=2)
    with pytest.raises(DataError, match="needs 3 synthetic tiles, and no synthetic manifest is given; give one"):
        mix(real, None, tmp_path / "mix.parquet", synthetic_per_real=1)


def test_what_a_filter_of_images_has_left_is_mixed_in_up_to_what_is_asked_for(tmp_path, capsys):
    real = write_tiles(tmp_path / "real.parquet", 4, prefix="r")
    few = write_tiles(tmp_path / "few.parquet", 5, prefix="s")
    table = mix(real, few, tmp_path / "mix.parquet", synthetic_per_real=2, real_weight=2, exactly=False, classes=CLASSES)
    assert Counter(table.source) == {"real": 4, "synthetic": 5}
    said = capsys.readouterr().out
    assert "4 real tiles, 5 of 8 wanted synthetic tiles" in said
    assert "a real tile is drawn 2 times as often as a synthetic one: 61.5 % of all draws are real" in said
    counts = [str(sum(pixels[c] for pixels in read_manifest(few).pixels)) for c in range(3)]
    assert [line.split()[:4] for line in said.splitlines()[-3:]] == [[n, c, c, "0.0"] for n, c in zip(CLASSES, counts, strict=True)]
    many = write_tiles(tmp_path / "many.parquet", 12, prefix="s")
    assert Counter(mix(real, many, tmp_path / "mix.parquet", 2, exactly=False).source) == {"real": 4, "synthetic": 8}


def test_what_a_resampling_favoured_stays_favoured_when_not_all_is_wanted(tmp_path):
    """Of a mask with six versions and thirty with one, taking first copies first would leave the six out."""
    real = write_tiles(tmp_path / "real.parquet", 18, prefix="r", size=8)
    synthetic = write_tiles(tmp_path / "s.parquet", 36, prefix="s", size=8, copy=[0] * 30 + list(range(1, 7)))
    in_turn = mix(real, synthetic, tmp_path / "mix.parquet", 1)
    drawn = mix(real, synthetic, tmp_path / "mix.parquet", 1, exactly=False)
    assert (in_turn["copy"].dropna() == 0).all() and (drawn["copy"].dropna() > 0).sum() >= 2
    assert drawn.tile_id.tolist() == mix(real, synthetic, tmp_path / "mix.parquet", 1, exactly=False).tile_id.tolist()


def test_a_mix_without_any_synthetic_tile_left_is_an_error_with_the_remedy(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 3, prefix="r")
    synthetic = write_tiles(tmp_path / "s.parquet", 3, prefix="s")
    table = read_manifest(synthetic)
    write_manifest(synthetic, table.assign(pixels=[[0, 0, 0]] * 3))
    with pytest.raises(DataError, match=r"rare\.parquet: none of the 3 synthetic tiles of \S*s\.parquet has a labelled pixel left; keep"):
        mix(real, synthetic, tmp_path / "rare.parquet", 1, exactly=False)
    table.iloc[:0].to_parquet(synthetic)
    with pytest.raises(DataError, match=r"rare\.parquet: no synthetic tile is left in \S*s\.parquet; keep more by the recipe's filter"):
        mix(real, synthetic, tmp_path / "rare.parquet", 1, exactly=False)
    assert not (tmp_path / "rare.parquet").exists()


def test_columns_of_synthetic_tiles_alone_are_empty_for_real_ones_and_unharmed(tmp_path):
    real = write_tiles(tmp_path / "real.parquet", 2, prefix="r", licence=["CC BY"] * 2)
    seeds = [2**62 + 1, 2**53 + 1]  # no float holds them
    own = {"copy": [0, 1], "kept": [0.5, 1.0], "agreement": [3.5, float("nan")], "caption": ["a", "b"], "note": ["", "x"]}
    synthetic = write_tiles(tmp_path / "s.parquet", 2, prefix="s", licence=["CC BY"] * 2, shown=[[1, 2], []], **own)
    write_manifest(synthetic, read_manifest(synthetic).assign(seed=seeds))
    mix(real, synthetic, tmp_path / "mixes" / "m.parquet", 1, real_weight=3, seed=4)
    table = read_manifest(tmp_path / "mixes" / "m.parquet").sort_values("tile_id")
    assert table.tile_id.tolist() == ["r0", "r1", "s0", "s1"] and table.licence.tolist() == ["CC BY"] * 4
    assert table.seed.dropna().tolist() == seeds and table["copy"].dropna().tolist() == [0, 1]
    assert table[[*own, "seed", "shown"]].iloc[:2].isna().all(axis=None)
    assert table.kept.tolist()[2:] == [0.5, 1.0] and table.caption.tolist()[2:] == ["a", "b"] and table.note.tolist()[2:] == ["", "x"]
    assert [list(shown) for shown in table.shown[2:]] == [[1, 2], []]
    assert table.weight.tolist() == [3, 3, 1, 1] and table["transform"].map(len).tolist() == [0] * 4


@pytest.mark.parametrize(("per_real", "weight"), [(3, 4), (1, 11), (3, 3), (2, 1), (5, 2.5)])
def test_a_real_tile_is_drawn_exactly_as_often_as_its_weight_says(tmp_path, per_real, weight):
    real = write_tiles(tmp_path / "real.parquet", 4, prefix="r", size=8)
    synthetic = write_tiles(tmp_path / "s.parquet", 4 * per_real, prefix="s", size=8)
    table = mix(real, synthetic, tmp_path / "mix.parquet", per_real, weight)
    draws = WeightedDraws(table.weight.to_numpy(), seed=0)
    rounds = 4  # so that a weight of 2.5 comes out even, too
    drawn = Counter(draw.row for draw in islice(draws, rounds * len(draws)))
    assert len(draws) == table.weight.sum()
    synthetic_draws = [drawn[row] for row in table.index[table.source == "synthetic"]]
    real_draws = [drawn[row] for row in table.index[table.source == "real"]]
    assert synthetic_draws == [rounds] * 4 * per_real
    assert sum(real_draws) == weight * 4 * rounds
    if weight == int(weight):
        assert real_draws == [weight * rounds] * 4
    else:
        assert all(weight * rounds - rounds / 2 <= count <= weight * rounds + rounds / 2 for count in real_draws)


def test_a_mix_of_other_classes_is_refused(tmp_path):
    real, synthetic = write_tiles(tmp_path / "r.parquet", 1, prefix="r"), write_tiles(tmp_path / "s.parquet", 1, prefix="s")
    with pytest.raises(DataError, match="row s0: pixels of another number of classes than 2"):
        mix(real, synthetic, tmp_path / "mix.parquet", 1, classes=CLASSES[:2])
    assert isinstance(mix(real, synthetic, tmp_path / "mix.parquet", 1), pd.DataFrame)


def pseudo_tiles(manifest, count=5, **columns):
    return write_tiles(manifest, count, prefix="u", seed=3, source=["pseudo"] * count, labelled_by=["a1b2"] * count, **columns)


@pytest.mark.parametrize("per_real", [0, 2])
def test_pseudo_labelled_tiles_are_mixed_in_with_a_weight_of_their_own(tmp_path, capsys, per_real):
    real = write_tiles(tmp_path / "tiles" / "train.parquet", 4, prefix="r")
    synthetic = write_tiles(tmp_path / "synthetic" / "all.parquet", 8, prefix="s", copy=[0, 1] * 4)
    pseudo = pseudo_tiles(tmp_path / "pseudo_labels.parquet")
    out, how = tmp_path / "mixes" / "m.parquet", {"synthetic_per_real": per_real, "real_weight": 3, "root": tmp_path}
    without = mix(real, synthetic if per_real else None, tmp_path / "mixes" / "without.parquet", **how)
    capsys.readouterr()
    table = mix(real, synthetic if per_real else None, out, **how, pseudo_manifest=pseudo, pseudo_weight=0.5)
    assert Counter(table.source) == Counter({"real": 4, "synthetic": 4 * per_real, "pseudo": 5})
    assert table.groupby("source").weight.unique().explode().to_dict() | {"synthetic": 1} == {"real": 3, "pseudo": 0.5, "synthetic": 1}
    assert table.tile_id.tolist()[:-5] == without.tile_id.tolist(), "the others are the same as without"
    for column in ("image", "label"):
        assert all(path.is_file() for path in paths_of(out, table, column, tmp_path))
    said = capsys.readouterr().out
    everything = 12 + 4 * per_real + 2.5
    assert f"5 pseudo-labelled tiles, each drawn 0.166667 times as often as a real one: {100 * 2.5 / everything:.1f} % of all draws" in said
    if per_real:
        assert f"a real tile is drawn 3 times as often as a synthetic one: {100 * 12 / everything:.1f} % of all draws are real" in said
    draws = WeightedDraws(table.weight.to_numpy(), seed=0)
    drawn = Counter(table.source.iloc[draw.row] for draw in islice(draws, 2 * len(draws)))
    assert drawn["pseudo"] / drawn["real"] == pytest.approx(2.5 / 12, rel=0.05)


def test_whole_numbers_of_synthetic_tiles_stay_whole_beside_pseudo_labelled_ones(tmp_path):
    real, seeds = write_tiles(tmp_path / "real.parquet", 2, prefix="r"), [2**62 + 1, 2**53 + 1]
    synthetic = write_tiles(tmp_path / "s.parquet", 2, prefix="s")
    write_manifest(synthetic, read_manifest(synthetic).assign(seed=seeds))
    mix(real, synthetic, tmp_path / "m.parquet", 1, pseudo_manifest=pseudo_tiles(tmp_path / "p.parquet"))
    table = read_manifest(tmp_path / "m.parquet")
    assert sorted(table.seed.dropna()) == sorted(seeds) and table.labelled_by.dropna().tolist() == ["a1b2"] * 5


def test_a_pseudo_label_that_is_gone_or_elsewhere_is_an_error_that_names_its_row(tmp_path):
    real, pseudo = write_tiles(tmp_path / "d" / "real.parquet", 2, prefix="r"), pseudo_tiles(tmp_path / "d" / "p.parquet")
    table = read_manifest(pseudo)
    for label, message in (("../../x.png", "row u1: path .* leads outside"), ("gone.png", "row u1: its label .* is not there")):
        write_manifest(pseudo, table.assign(label=table.label.mask(table.tile_id == "u1", label)))
        with pytest.raises(DataError, match=message):
            mix(real, None, tmp_path / "d" / "m.parquet", root=tmp_path / "d", pseudo_manifest=pseudo)


def test_a_pseudo_labelled_tile_that_is_a_real_one_is_taken_once_with_its_real_label(tmp_path):
    """By its id or its picture: a scene that is trained on may also be among the unlabelled ones."""
    real = write_tiles(tmp_path / "real.parquet", 2, prefix="r", image_digest=["a", "b"])
    pseudo = pseudo_tiles(tmp_path / "p.parquet", image_digest=["c", "b", "d", "e", "f"])
    table = read_manifest(pseudo)
    write_manifest(pseudo, table.assign(tile_id=["r0", *table.tile_id[1:]]))
    mixed = mix(real, None, tmp_path / "m.parquet", pseudo_manifest=pseudo)
    assert mixed.tile_id.tolist() == ["r0", "r1", "u2", "u3", "u4"] and mixed.source.tolist() == ["real"] * 2 + ["pseudo"] * 3
    write_manifest(pseudo, table.assign(image_digest="a"))
    with pytest.raises(DataError, match=r"all 5 tiles of \S*p\.parquet are among the real ones; name other unlabelled scenes"):
        mix(real, None, tmp_path / "m.parquet", pseudo_manifest=pseudo)
