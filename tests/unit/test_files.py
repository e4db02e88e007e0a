"""Files are whole or absent, paths stay inside, locks die with their holder, and a damaged manifest is refused."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from loopback_files import in_small_disk
from paths import ROOT
from segmentor_tiles import write_tiles

from crfm_core import DataError, ResourceError
from crfm_core.files import (
    atomic_path,
    exclusive,
    hash_of,
    inside,
    read_json,
    require_disk,
    seed_of,
    sha256_of,
    work_folder,
    write_json,
    write_text,
)
from crfm_core.manifest import TILE_COLUMNS, check_paths, paths_of, read_manifest, relocate, write_manifest

# ---------------------------------------------------------------------------------------------------------- whole files


def fail_halfway(target: Path, folder: bool) -> None:
    with atomic_path(target) as aside:
        if folder:
            aside.mkdir()
        (aside / "part" if folder else aside).write_text("half")
        raise RuntimeError("stopped")


@pytest.mark.parametrize("folder", [False, True])
def test_a_failed_write_leaves_nothing(tmp_path, folder):
    with pytest.raises(RuntimeError, match="stopped"):
        fail_halfway(tmp_path / "new", folder)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_as_it_was(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="stopped"):
        fail_halfway(tmp_path / "a.txt", folder=False)
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_new_folder_replaces_the_old_one(tmp_path):
    for name in ("old", "new"):
        with atomic_path(tmp_path / "deep" / "folder") as aside:
            aside.mkdir()
            (aside / name).touch()
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    first = start("atomic_path", tmp_path / "a.txt", then="time.sleep(600)")
    assert first.stdout.readline() == "held\n"
    (holder,) = tmp_path.iterdir()
    (holder / "a.txt").write_text("half")
    first.kill()
    first.communicate()
    assert list(tmp_path.iterdir()) == [holder], "a kill -9 leaves it"
    write_text(tmp_path / "a.txt", "whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"] and (tmp_path / "a.txt").read_text() == "whole"


def test_a_file_that_another_living_process_writes_can_be_written_beside_it(tmp_path):
    first = start("atomic_path", tmp_path / "a.txt", then="sys.stdin.readline(), aside.write_text('first')")
    assert first.stdout.readline() == "held\n"
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    first.communicate("go on\n")
    assert first.returncode == 0 and (tmp_path / "a.txt").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


FILL = """
import subprocess, torch
from pathlib import Path
from safetensors.torch import save_file
from crfm_core.files import atomic_path
many = {"a": torch.zeros(100_000)}
for write in (torch.save, save_file, lambda tensors, path: path.write_bytes(bytes(400_000))):
    try:
        with atomic_path(Path(sys.argv[1]) / "state") as aside:
            write(many, aside)
    except CrfmError as error:
        print(type(error).__name__, error, [path.name for path in Path(sys.argv[1]).iterdir()])
"""


def test_a_full_disk_is_named_whichever_library_meets_it_and_nothing_is_left(tmp_path):
    said = in_small_disk(tmp_path / "disk", "size=100k", FILL).splitlines()
    assert len(said) == 3
    for line in said:
        assert re.search(r"ResourceError \S+/disk/state: could not be written whole \(.*\); free some space on its disk \[\]$", line), line


def test_json_comes_back_and_what_is_no_json_is_named(tmp_path):
    value = {"b": [1.1, None], "a": "ü"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value and list(read_json(tmp_path / "x.json")) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "nan.json", float("nan"))
    assert not (tmp_path / "nan.json").exists()
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(DataError, match=r"y\.json: not valid JSON"):
        read_json(tmp_path / "y.json")
    with pytest.raises(DataError, match=r"z\.json: no such file"):
        read_json(tmp_path / "z.json")


def test_hashes_follow_content_and_names_and_nothing_else(tmp_path):
    for name in ("one", "two"):
        write_text(tmp_path / name / "a", "text")
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "two")
    write_text(tmp_path / "two" / "b", "")
    assert sha256_of(tmp_path / "one") != sha256_of(tmp_path / "two")
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": 1, "b": 2.5})


def test_seeds_are_pinned_and_fit_what_torch_and_numpy_take():
    assert seed_of("embedded", "scene_0_0", "plain", 0, 0) == 5476626574331363094
    assert all(0 <= seed_of(index) < 2**63 for index in range(100)) and len({seed_of(index) for index in range(100)}) == 100


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "link/x", "link"])
def test_a_path_that_leaves_its_root_is_refused(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match=f"path '{path}' leads outside"):
        inside(root, path)


def test_a_path_below_its_root_is_resolved(tmp_path):
    assert inside(tmp_path, "a/../b/c.png") == tmp_path.resolve() / "b" / "c.png"


def test_too_little_disk_is_refused_with_both_numbers(tmp_path):
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match=r"yet: 1000000000\.0 GB needed, [\d.]+ GB free; free some space or set `results`"):
        require_disk(tmp_path / "not" / "yet", 10**18)


# ---------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from crfm_core.files import {manager}
with {manager}({arguments}) as aside:
    print("held", flush=True)
    {then}
"""


def start(manager: str, *arguments: object, then: str = "time.sleep(600)") -> subprocess.Popen:
    program = HOLD.format(manager=manager, arguments=", ".join(repr(str(a)) for a in arguments), then=then)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment)


def test_a_second_process_waits_and_goes_on_when_the_first_is_killed(tmp_path):
    first = start("exclusive", tmp_path / "work")
    assert first.stdout.readline() == "held\n"
    second = start("exclusive", tmp_path / "work", then="pass")
    assert "which a job of an earlier run still holds" in second.stdout.readline()
    time.sleep(0.3)
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    assert second.stdout.readline() == "held\n" and second.wait(60) == 0
    first.communicate()


def test_a_second_process_starts_afresh_when_the_first_finishes_and_clears_the_folder(tmp_path):
    work = tmp_path / "work"
    first = start("work_folder", work, "same", then="sys.stdin.readline()")
    assert first.stdout.readline() == "held\n"
    second = start("work_folder", work, "same", then="sys.stdin.readline()")
    assert "still holds" in second.stdout.readline()
    first.communicate("go on\n")
    assert second.stdout.readline() == "held\n" and (work / "fingerprint").read_text() == "same"
    second.communicate("go on\n")
    assert (first.returncode, second.returncode) == (0, 0) and not work.exists()


def test_a_held_folder_is_free_after_its_block(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path / "work") as folder:
            assert folder.is_dir()


def interrupted(work: Path, fingerprint: str, name: str) -> list[str]:
    """Names found in the work folder by a job that leaves ``name`` there and is stopped."""
    with work_folder(work, fingerprint) as folder:
        found = sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "fingerprint"))
        (folder / name).mkdir()
        raise InterruptedError(found)


def test_state_survives_an_interruption_and_goes_with_success(tmp_path):
    with pytest.raises(InterruptedError):
        interrupted(tmp_path / "work", "one", "state")
    with work_folder(tmp_path / "work", "one") as folder:
        assert (folder / "state").is_dir()
    assert not (tmp_path / "work").exists()


def test_state_of_another_fingerprint_is_discarded(tmp_path):
    for fingerprint, name, expected in (("one", "a", []), ("one", "b", ["a"]), ("two", "c", []), ("two", "d", ["c"])):
        with pytest.raises(InterruptedError) as caught:
            interrupted(tmp_path / "work", fingerprint, name)
        assert caught.value.args[0] == expected


# ------------------------------------------------------------------------------------------------------------ manifests


@pytest.fixture
def manifest(tmp_path) -> Path:
    return write_tiles(tmp_path / "set" / "tiles" / "train.parquet", count=3)


def rewritten(manifest: Path, change) -> Path:
    change(pd.read_parquet(manifest)).to_parquet(manifest)
    return manifest


def test_a_missing_or_damaged_manifest_is_named_with_the_remedy(manifest):
    with pytest.raises(DataError, match=r"none\.parquet: no such manifest; build it by naming it as a target"):
        read_manifest(manifest.with_name("none.parquet"))
    manifest.write_bytes(manifest.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train\.parquet: not a readable parquet file .*; delete it and run the workflow again"):
        read_manifest(manifest)


def test_a_manifest_that_is_empty_or_lacks_columns_is_refused(manifest):
    with pytest.raises(DataError, match="columns missing: label, digest"):
        read_manifest(rewritten(manifest, lambda table: table.drop(columns=["label", "digest"])))
    write_tiles(manifest, count=2)
    with pytest.raises(DataError, match="it has no rows"):
        read_manifest(rewritten(manifest, lambda table: table[:0]))


def test_a_manifest_that_would_be_refused_is_not_written(manifest):
    table = read_manifest(manifest)
    out = manifest.with_name("new.parquet")
    for rows, message in (
        ([], "no rows; the stage before it selected nothing"),
        (table.drop(columns="scene"), "columns missing: scene"),
        (pd.concat([table, table[1:2]]), "tile_id repeated: t1"),
    ):
        with pytest.raises(DataError, match=message):
            write_manifest(out, rows)
    assert not out.exists()


def test_a_manifest_comes_back_with_its_columns_and_additions(manifest):
    table = read_manifest(manifest).assign(caption=["a", "b", "c"])
    write_manifest(manifest, table)
    again = read_manifest(manifest)
    assert list(again.columns) == [*TILE_COLUMNS, "caption"] and list(again.tile_id) == ["t0", "t1", "t2"]
    assert [list(classes) for classes in again.classes] == [list(classes) for classes in table.classes]


@pytest.mark.parametrize("path", ["../../../outside.png", "/etc/hostname"])
def test_a_row_that_leads_outside_is_named(manifest, path):
    table = read_manifest(manifest)
    table.loc[1, "image"] = path
    with pytest.raises(DataError, match=r"train\.parquet: row t1: path .* (leads outside|is absolute)"):
        paths_of(manifest, table, "image", manifest.parents[1])


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("label", None, "its label is (None|nan), which is no path"),
        ("image", float("nan"), "its image is nan, which is no path"),
        ("classes", [9], r"its classes are \[9\], and it counts the pixels of 0\.\.\.2"),
        ("classes", None, "its classes are None"),
    ],
)
def test_a_row_that_cannot_be_is_named_with_the_manifest_to_delete(manifest, column, value, fault):
    table = pd.read_parquet(manifest)
    table.at[1, column] = value
    table.to_parquet(manifest)
    with pytest.raises(DataError, match=rf"train\.parquet: row t1: {fault}.*; delete \S+train\.parquet and run the workflow again"):
        read_manifest(manifest)


def test_a_row_whose_file_is_gone_is_named(manifest):
    table = read_manifest(manifest)
    (manifest.parent / table.label[2]).unlink()
    assert len(paths_of(manifest, table, "image", manifest.parents[1])) == 3
    with pytest.raises(DataError, match=r"train\.parquet: row t2: its label \S+t2\S* is not there; delete \S+ and run"):
        check_paths(manifest, table, manifest.parents[1])


def test_rows_may_point_to_a_neighbouring_stage(manifest):
    table = read_manifest(manifest)
    other = manifest.parents[1] / "mixes" / "real.parquet"
    table["image"] = [relocate(path, manifest, other) for path in table.image]
    assert table.image[0] == "../tiles/train/images/t0.png"
    assert all(path.is_file() for path in paths_of(other, table, "image", manifest.parents[1]))
