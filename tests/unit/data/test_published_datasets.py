"""Published datasets: found, fetched from servers on the loopback, and refused with a remedy."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from loopback_files import FLAT, REPO, Server, archive_bytes, dataset, in_small_disk, png
from loopback_hub import NEXT_REVISION, REVISION, Hub, contents, serve_hub, stop
from paths import CONFIGS, ROOT

from crfm_core import ConfigError, DataError
from crfm_core.data import sources
from crfm_core.data.scenes import list_scenes, read_scenes
from crfm_core.data.sources import fetch_dataset, loveda, open_source
from crfm_core.settings import Dataset

LOVEDA = {
    f"{part}/{area}/{kind}/{number}.png": png(number, value)
    for part, area, number in (("Train", "Urban", 1), ("Train", "Rural", 2), ("Val", "Urban", 3), ("Val", "Rural", 4))
    for kind, value in (("images_png", 200), ("masks_png", 1))
}
TEST = {f"Test/{area}/images_png/{number}.png": png(number, 200) for area, number in (("Urban", 6), ("Rural", 5))}
SPLIT = {f"{split}/{kind}/{value}_1.png": png(value, len(kind)) for value, split in enumerate(("train", "val", "test"))
         for kind in ("im1", "label1", "im2", "label2")}  # fmt: skip
TEXTS = {"README.md": b"Read me.", "LICENSE": b"Ask us."}
NOT_NEEDED = {"Times/6_1_A_8.tif": b"?", "A/8/6_1_A_8.png": b"?", "view.png": b"?", ".gitattributes": b"?"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def state_of(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder, *folder.rglob("*"))}


def data_of(folder: Path) -> dict[str, bytes]:
    return {name: body for name, body in contents(folder).items() if name != "fetched.json"}


def note_of(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def zenodo(server, monkeypatch) -> Server:
    """A record of three archives, and what the package knows of them."""
    monkeypatch.setenv("CRFM_ZENODO", f"{server.url}/")
    server.files = {}
    for part in ("Train", "Val", "Test"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, body in (LOVEDA | TEST).items():
                if name.startswith(part):
                    archive.writestr(name, body)
        body = buffer.getvalue()
        server.files[f"/records/5706578/files/{part}.zip"] = body
        monkeypatch.setitem(loveda.ARCHIVES, part, (len(body), hashlib.md5(body).hexdigest()))
    return server


def test_the_checksums_of_loveda_are_those_that_zenodo_lists():
    assert loveda.ARCHIVES == {
        "Train": (4021669263, "de2b196043ed9b4af1690b3f9a7d558f"),
        "Val": (2425958254, "84cae2577468ff0b5386758bb386d31d"),
        "Test": (3126023212, "a489be0090465e01fb067795d24e6b47"),
    }


def test_loveda_is_fetched_checked_unpacked_and_listed(zenodo, tmp_path, capsys):
    note = tmp_path / "results" / "source.json"
    fetch_dataset(dataset("loveda"), tmp_path, note)
    folder = tmp_path / "data" / "loveda"
    assert data_of(folder) == LOVEDA, "and neither archives nor anything else"
    said = capsys.readouterr().out
    assert said.startswith("loveda: licence: CC BY-NC-SA 4.0\n")
    archives = {name.rsplit("/", 1)[-1]: body for name, body in zenodo.files.items() if "Test" not in name}
    files = {name: {"size": len(body), "md5": hashlib.md5(body).hexdigest()} for name, body in archives.items()}
    assert note_of(note) == {
        "source": "loveda", "folder": str(folder), "repo": "https://zenodo.org/records/5706578", "revision": None, "files": files,
        "licence": "CC BY-NC-SA 4.0",
    }  # fmt: skip
    list_scenes(dataset("loveda"), tmp_path, tmp_path / "scenes.parquet", note)
    assert read_scenes(tmp_path / "scenes.parquet").split.tolist() == ["train", "train", "val", "val"]
    before = state_of(folder)
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "again.json")
    assert note_of(tmp_path / "again.json") == note_of(note) and len(zenodo.requests) == 2 and state_of(folder) == before


def test_a_copy_that_the_user_has_is_used_as_it_is(zenodo, tmp_path):
    folder = write(tmp_path / "data" / "loveda", LOVEDA | {"Test/Urban/images_png/9.png": b"?"})
    before = state_of(folder)
    fetch_dataset(dataset("loveda", download=False), tmp_path, tmp_path / "source.json")
    assert note_of(tmp_path / "source.json")["files"] == {} and note_of(tmp_path / "source.json")["repo"] is None
    assert state_of(folder) == before and zenodo.requests == []


def test_only_what_is_missing_of_loveda_is_fetched_and_the_users_own_archive_is_taken(zenodo, tmp_path):
    folder = write(tmp_path / "data" / "loveda", {name: body for name, body in LOVEDA.items() if name.startswith("Train")})
    body = zenodo.files["/records/5706578/files/Val.zip"]
    (folder / "Val.zip").write_bytes(body)
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == LOVEDA | {"Val.zip": body} and zenodo.requests == []
    shutil.rmtree(folder / "Val"), (folder / "Val.zip").write_bytes(b"half")
    with pytest.raises(DataError, match=r"Val\.zip: has 4 bytes, expected \d+; delete it to have it fetched from"):
        fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    (folder / "Val.zip").unlink()
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == LOVEDA and [path for path, _ in zenodo.requests] == ["/records/5706578/files/Val.zip"]


def test_a_broken_off_fetch_of_loveda_continues_and_writes_its_note_last(zenodo, tmp_path):
    whole = zenodo.files["/records/5706578/files/Val.zip"]
    zenodo.files["/records/5706578/files/Val.zip"] = whole[:-1] + b"?"
    with pytest.raises(DataError, match=r"/records/5706578/files/Val\.zip: the download has the md5"):
        fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert not (tmp_path / "source.json").exists() and (tmp_path / "data" / "loveda" / "Train").is_dir()
    assert [path.name for path in (tmp_path / "data" / "loveda" / ".fetching").iterdir()] == [".lock"], (
        "an archive goes once it is unpacked"
    )
    zenodo.files["/records/5706578/files/Val.zip"], zenodo.requests = whole, []
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(tmp_path / "data" / "loveda") == LOVEDA and len(zenodo.requests) == 1
    assert set(note_of(tmp_path / "source.json")["files"]) == {"Train.zip", "Val.zip"}


def test_the_images_of_the_server_are_fetched_alone_and_beside_the_scenes(zenodo, tmp_path, capsys):
    folder, note = tmp_path / "data" / "loveda", tmp_path / "test_images.json"
    fetch_dataset(dataset("loveda"), tmp_path, note, submission=True)
    assert data_of(folder) == TEST and [path for path, _ in zenodo.requests] == ["/records/5706578/files/Test.zip"]
    assert (set(note_of(note)["files"]), note_of(note)["folder"]) == ({"Test.zip"}, str(folder))
    images = open_source(dataset("loveda"), note=note).submission_images()
    assert [path.name for path in images] == ["5.png", "6.png"] and "2 images; the official test split has 1796" in capsys.readouterr().out
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == LOVEDA | TEST and set(note_of(tmp_path / "source.json")["files"]) == {"Train.zip", "Val.zip", "Test.zip"}
    before, zenodo.requests = state_of(folder), []
    fetch_dataset(dataset("loveda", download=False), tmp_path, note, submission=True)
    assert state_of(folder) == before and zenodo.requests == []


def test_a_fetch_of_the_servers_images_keeps_what_came_of_the_scenes(zenodo, tmp_path):
    part = tmp_path / "data" / "loveda" / ".fetching" / "Train.zip.part"
    begun = zenodo.files["/records/5706578/files/Train.zip"][:100]
    write(part.parent, {part.name: begun})
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "test_images.json", submission=True)
    assert part.read_bytes() == begun
    fetch_dataset(dataset("loveda"), tmp_path, tmp_path / "source.json")
    assert ("/records/5706578/files/Train.zip", "bytes=100-") in zenodo.requests and not part.parent.exists()


def test_a_dataset_without_a_server_or_without_leave_to_fetch_says_so(tmp_path):
    with pytest.raises(DataError, match=r"lacks Test/Urban/images_png, Test/Rural/images_png; set source\.download to true"):
        fetch_dataset(dataset("loveda", download=False), tmp_path, tmp_path / "test_images.json", submission=True)
    with pytest.raises(ConfigError, match="dataset fusu: a source of kind fusu has no images for a server of its own"):
        fetch_dataset(dataset("fusu"), tmp_path, tmp_path / "test_images.json", submission=True)


def test_two_jobs_at_once_fetch_each_archive_once(zenodo, tmp_path):
    jobs = [threading.Thread(target=fetch_dataset, args=(dataset("loveda"), tmp_path, tmp_path / f"{n}.json")) for n in range(2)]
    [job.start() for job in jobs], [job.join() for job in jobs]
    assert note_of(tmp_path / "0.json") == note_of(tmp_path / "1.json") and len(zenodo.requests) == 2
    assert data_of(tmp_path / "data" / "loveda") == LOVEDA


def lose(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name)


@pytest.mark.parametrize(
    ("files", "source", "damage", "message"),
    [
        ({}, {"kind": "loveda", "download": False}, None, "source.root: FOLDER lacks Train/Urban/images_png, Train/Urban/masks_png"),
        ({}, {"kind": "loveda", "download": False}, None, "set source.download to true to have the dataset fetched, or"),
        (LOVEDA, {"kind": "loveda"}, ["Val/Rural"], "FOLDER has Val but lacks Val/Rural/images_png, Val/Rural/masks_png; complete"),
        ({}, {"kind": "fusu", "download": False}, None, "FOLDER lacks images (.png) in im1/ with labels in im1_label/ or label1/"),
        (FLAT, {"kind": "fusu", "download": False}, ["im1_label"], "FOLDER lacks images (.png) in im1/"),
        (FLAT, {"kind": "fusu"}, ["im1_label"], "FOLDER has im1, im2, im2_label but lacks images (.png) in im1/ with labels in im1_label/"),
        (SPLIT, {"kind": "fusu", "date": 2}, [f"{split}/label2" for split in ("train", "val", "test")], "has train, val, test but lacks"),
        ({f"{a}/{n}": b for a in "xy" for n, b in FLAT.items()}, {"kind": "fusu"}, None, "FOLDER/x, FOLDER/y each hold a layout of FUSU;"),
    ],
)  # fmt: skip
def test_what_is_lacking_of_a_dataset_is_named_with_the_remedy_and_nothing_is_changed(
    tmp_path, server, monkeypatch, files, source, damage, message
):
    monkeypatch.setenv("CRFM_ZENODO", server.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    wanted = dataset(**source)
    folder = write(tmp_path / "data" / source["kind"], files)
    lose(folder, *(damage or []))
    before = data_of(folder) if folder.exists() else None
    with pytest.raises(DataError) as caught:
        fetch_dataset(wanted, tmp_path, tmp_path / "source.json")
    assert message.replace("FOLDER", str(folder)) in str(caught.value)
    after = {name: body for name, body in data_of(folder).items() if not name.startswith(".fetching/")} if folder.exists() else None
    assert after == before and server.requests == [] and not (tmp_path / "source.json").exists()


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": body for name, body in files.items()}


def of(folder: str, files: dict[str, bytes], keep: bool) -> dict[str, bytes]:
    """The files of one folder, with or without its name."""
    return {name if keep else name.removeprefix(f"{folder}/"): body for name, body in files.items() if name.startswith(f"{folder}/")}


HOLDINGS = {
    "single images": (FLAT, {}),
    "single images in splits": (SPLIT, {}),
    "one archive": ({}, {"FUSU.zip": FLAT}),
    "one archive with a folder": ({}, {"FUSU.zip": below("FUSU", SPLIT)}),
    "one archive with another folder": ({}, {"data/all.tar.gz": FLAT}),
    "an archive per folder": ({}, {f"{name}.zip": of(name, FLAT, False) for name in ("im1", "im1_label", "im2", "im2_label")}),
    "an archive per split": ({}, {f"{name}.tar.gz": of(name, SPLIT, True) for name in ("train", "val", "test")}),
}


@pytest.fixture
def fusu_hub(request, tmp_path, monkeypatch) -> Iterator[Hub]:
    files, archives = HOLDINGS[request.param]
    packed = {name: archive_bytes(tmp_path / Path(name).name, content) for name, content in archives.items()}
    hub = Hub(files | packed | TEXTS | NOT_NEEDED, REPO, "dataset")
    hub.wanted = files | packed | TEXTS
    hub.layout = SPLIT if any("/label1/" in name for name in (*files, *(n for content in archives.values() for n in content))) else FLAT
    with serve_hub(hub, monkeypatch) as hub:
        yield hub


def fusu(hub: Hub, **changes: object) -> Dataset:
    splits = {"splits": ["train", "val", "test"]} if hub.layout is SPLIT else {}
    return dataset("fusu", repo=REPO, **splits | changes)


@pytest.mark.parametrize("fusu_hub", HOLDINGS, indirect=True)
def test_fusu_is_fetched_from_the_hub_in_both_layouts_and_however_it_is_packed(fusu_hub, tmp_path, capsys):
    note, folder = tmp_path / "results" / "source.json", tmp_path / "data" / "fusu"
    fetch_dataset(fusu(fusu_hub), tmp_path, note)
    assert data_of(folder) == fusu_hub.layout | TEXTS, "and neither archives nor what the hub holds beside"
    assert {name for name, _ in fusu_hub.downloads()} == set(fusu_hub.wanted)
    assert capsys.readouterr().out.startswith("fusu: licence: CC BY-NC-SA 4.0\n")
    files = {name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} for name, body in sorted(fusu_hub.wanted.items())}
    assert note_of(note) == {
        "source": "fusu", "folder": str(folder), "repo": REPO, "revision": REVISION, "files": files,
        "licence": "CC BY-NC-SA 4.0",
    }  # fmt: skip
    for date in (1, 2):
        list_scenes(fusu(fusu_hub, date=date), tmp_path, tmp_path / "scenes.parquet", note)
        assert len(read_scenes(tmp_path / "scenes.parquet")) == (3 if fusu_hub.layout is SPLIT else 4)
    before = state_of(folder)
    stop(fusu_hub)
    fetch_dataset(fusu(fusu_hub, date=2), tmp_path, tmp_path / "again.json")
    assert note_of(tmp_path / "again.json") == note_of(note) and state_of(folder) == before


@pytest.mark.parametrize("files", [FLAT, SPLIT], ids=["flat", "splits"])
@pytest.mark.parametrize("where", ["", "FUSU/"], ids=["there", "one folder down"])
def test_a_copy_of_fusu_that_the_user_has_is_found_and_used_as_it_is(tmp_path, files, where):
    folder = write(tmp_path / "data" / "fusu", {f"{where}{name}": body for name, body in files.items()})
    before = state_of(folder)
    fetch_dataset(dataset("fusu", download=False), tmp_path, tmp_path / "source.json")
    note = note_of(tmp_path / "source.json")
    assert Path(note["folder"]) == folder / where and (note["repo"], note["files"]) == (None, {}) and state_of(folder) == before


@pytest.mark.parametrize("fusu_hub", ["an archive per folder"], indirect=True)
def test_a_broken_off_fetch_of_fusu_keeps_the_commit_it_began_with(fusu_hub, tmp_path):
    name = "im2_label.zip"
    fusu_hub.broken.add(name)
    with pytest.raises(DataError, match=r"source\.repo: .*status 500; wait, then run `get it` again"):
        fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json", "get it")
    fusu_hub.branches["main"], fusu_hub.revisions[NEXT_REVISION] = NEXT_REVISION, {"README.md": b"All is otherwise now."}
    fusu_hub.broken.clear(), fusu_hub.requests.clear()
    fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json")
    assert note_of(tmp_path / "source.json")["revision"] == REVISION and data_of(tmp_path / "data" / "fusu") == FLAT | TEXTS
    assert [name for name, _ in fusu_hub.downloads()] == [name]
    with pytest.raises(DataError, match=rf"source\.revision: \S+fusu holds {REPO} at {REVISION}, not {REPO} at {NEXT_REVISION}; set"):
        fetch_dataset(fusu(fusu_hub, revision=NEXT_REVISION), tmp_path, tmp_path / "source.json")


@pytest.mark.parametrize("fusu_hub", ["one archive with a folder", "single images"], indirect=True)
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_fetch_of_fusu_that_is_killed_while_it_moves_the_data_is_finished(fusu_hub, tmp_path, monkeypatch, moved):
    folder, rename = tmp_path / "data" / "fusu", Path.rename

    def killed(path: Path, target: Path) -> Path:
        if Path(target).parent == folder and len(list(folder.glob("[!.]*/"))) == moved:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json")
    monkeypatch.undo()
    assert len([path for path in folder.iterdir() if path.is_dir() and path.name != ".fetching"]) == moved
    os.truncate(folder / "fetched.json", 40)
    fetch_dataset(fusu(fusu_hub), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == fusu_hub.layout | TEXTS and note_of(tmp_path / "source.json")["revision"] == REVISION


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (TEXTS, "source.repo: someone/fusu holds neither images in im1, im2, im1_label, im2_label, label1, label2 nor"),
        ({"x.rar": b"?"}, "nor archives"),
        ({"im1.zip": {"1.png": b"1"}}, "what someone/fusu holds (im1.zip) lacks images (.png) in im1/ with labels in im1_label/"),
        ({"im1.zip": {"1.png": b"1"}, "im1/2.png": b"2"}, "someone/fusu has im1.zip and files in a folder of that name or two such"),
        ({"im1.zip": {"1.png": b"1"}, "im1.tar.gz": {"1.png": b"1"}}, "or two such archives; put the dataset into FOLDER by hand"),
        ({"im1.zip": {"../../evil.png": b"1"}}, "im1.zip: member '../../evil.png' is refused: its name leads upwards"),
        ({"im1.zip": b"<html>"}, "im1.zip: is damaged, truncated or no such archive"),
        ({"../im1/evil.png": b"1"}, "source.repo: someone/fusu lists a file '../im1/evil.png', whose name leads upwards"),
    ],
)  # fmt: skip
def test_a_repository_that_does_not_hold_fusu_is_named(tmp_path, monkeypatch, held, message):
    files = {name: archive_bytes(tmp_path / name, body) if isinstance(body, dict) else body for name, body in held.items()}
    with serve_hub(Hub(files, REPO, "dataset"), monkeypatch), pytest.raises(DataError) as caught:
        fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
    assert message.replace("FOLDER", str(tmp_path / "data" / "fusu")) in str(caught.value)
    assert list(tmp_path.rglob("evil.png")) == []


@pytest.mark.parametrize("fusu_hub", ["one archive"], indirect=True)
def test_two_jobs_at_once_fetch_fusu_once_and_leave_what_the_user_has_beside_it(fusu_hub, tmp_path):
    folder = write(tmp_path / "data" / "fusu", {"README.md": b"Mine.", "notes/1.txt": b"Mine."})
    jobs = [threading.Thread(target=fetch_dataset, args=(fusu(fusu_hub), tmp_path, tmp_path / f"{n}.json")) for n in range(2)]
    [job.start() for job in jobs], [job.join() for job in jobs]
    assert note_of(tmp_path / "0.json") == note_of(tmp_path / "1.json") and len(fusu_hub.downloads()) == 3
    assert data_of(folder) == FLAT | {"LICENSE": TEXTS["LICENSE"], "README.md": b"Mine.", "notes/1.txt": b"Mine."}


def test_what_was_unpacked_of_one_revision_is_no_part_of_another(tmp_path, monkeypatch):
    images, labels = of("im1", FLAT, False), of("im1_label", FLAT, False)
    first = {"im1.zip": archive_bytes(tmp_path / "im1.zip", images | {"old.png": b"?"})}
    hub = Hub(first, REPO, "dataset")
    second = {"im1.zip": archive_bytes(tmp_path / "im1.zip", images), "im1_label.zip": archive_bytes(tmp_path / "l.zip", labels)}
    hub.revisions[NEXT_REVISION] = second
    with serve_hub(hub, monkeypatch):
        for _ in range(2):
            with pytest.raises(DataError, match=r"what someone/fusu holds \(im1\.zip\) lacks images .*; it lies unpacked in"):
                fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
        assert [name for name, _ in hub.downloads()] == ["im1.zip"]
        fetch_dataset(dataset("fusu", repo=REPO, revision=NEXT_REVISION), tmp_path, tmp_path / "source.json")
    assert data_of(tmp_path / "data" / "fusu") == below("im1", images) | below("im1_label", labels)


def test_a_folder_of_the_user_is_not_mixed_with_one_of_the_dataset(tmp_path, monkeypatch):
    folder = write(tmp_path / "data" / "fusu", {"more/mine.txt": b"Mine."})
    hub = Hub({"all.zip": archive_bytes(tmp_path / "all.zip", FLAT | {"more/theirs.txt": b"Theirs."})}, REPO, "dataset")
    with serve_hub(hub, monkeypatch):
        with pytest.raises(DataError, match=r"source\.root: \S+more is there already; move it away to have the dataset's put there"):
            fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
        assert (folder / "more" / "mine.txt").is_file()
        (folder / "more").rename(folder / "mine")
        fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
    assert data_of(folder) == FLAT | {"mine/mine.txt": b"Mine.", "more/theirs.txt": b"Theirs."} and len(hub.downloads()) == 1


def test_of_very_many_files_the_note_names_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LISTED_FILES", 3)
    with serve_hub(Hub(FLAT, REPO, "dataset"), monkeypatch):
        fetch_dataset(dataset("fusu", repo=REPO), tmp_path, tmp_path / "source.json")
    record = (tmp_path / "data" / "fusu" / "fetched.json").read_bytes()
    files = {"fetched.json": {"size": len(record), "sha256": hashlib.sha256(record).hexdigest()}}
    assert note_of(tmp_path / "source.json")["files"] == files and set(json.loads(record)["files"]) == set(FLAT)


def test_a_disk_that_cannot_be_written_serves_what_is_whole_and_says_so_for_the_rest(tmp_path):
    program = """
import os, shutil
from crfm_core.data.sources import fetch_dataset
from crfm_core.settings import Dataset
shutil.copytree(sys.argv[2], sys.argv[1] + "/whole")
shutil.copytree(sys.argv[2] + "/Val", sys.argv[1] + "/half/Val")
os.system(f"mount -o remount,ro '{sys.argv[1]}'")
for part in ("whole", "half"):
    fields = {"source": {"kind": "loveda", "root": part}, "test": "val", "tile": {"size": 4}}
    try:
        fetch_dataset(Dataset(name="d", classes=["a", "b"], palette=["#000000"] * 2, **fields), sys.argv[1], sys.argv[3])
        print("used", os.path.exists(sys.argv[3]))
    except CrfmError as error:
        print(type(error).__name__, error)
"""
    write(tmp_path / "copy", LOVEDA)
    said = in_small_disk(tmp_path / "disk", "size=1m", program, str(tmp_path / "copy"), str(tmp_path / "source.json"))
    assert said.splitlines()[0] == "d: licence: not stated; ask those who publish it" and "used True" in said
    assert re.search(r"ResourceError source\.root: .*Read-only file system.*; set it to a folder that can be written", said)


@pytest.mark.parametrize("fusu_hub", ["one archive"], indirect=True)
def test_the_rule_fetches_shows_the_licence_and_its_scenes_are_listed_from_there(fusu_hub, tmp_path):
    for file in (CONFIGS).iterdir():
        shutil.copy(file, tmp_path)
    config = yaml.safe_load((tmp_path / "smallest.yaml").read_text())
    config["recipes"]["reference"] = {"split": "val"}
    wanted = fusu(fusu_hub).model_dump(mode="json", exclude_defaults=True)
    wanted["split"] = {"by": "group", "group": "scene", "shares": {"train": 2, "val": 1, "test": 1}}
    (tmp_path / "fusu.yaml").write_text(yaml.safe_dump(wanted))
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(config | {"datasets": ["small_world.yaml", "fusu.yaml"]} | {"recipes": config["recipes"]})
    )
    embedded = yaml.safe_load((tmp_path / "small_world.yaml").read_text())
    embedded["source"]["scenes"]["val"] = 1
    (tmp_path / "small_world.yaml").write_text(yaml.safe_dump(embedded))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--cores", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_VerySecretToken"}

    def run(*targets: str) -> str:
        done = subprocess.run([*command, *targets], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = run("results/fusu/scenes.parquet", "results/small/scenes.parquet")
    assert said.count("Fetching fusu unless it is there; its licence: CC BY-NC-SA 4.0") == 1 and "Listing the scenes of fusu" in said
    assert len(read_scenes(tmp_path / "results" / "fusu" / "scenes.parquet")) == 4
    assert note_of(tmp_path / "results" / "fusu" / "source.json")["revision"] == REVISION
    assert "Secret" not in said and not [name for name, body in contents(tmp_path).items() if b"VerySecret" in body]
    (tmp_path / "fusu.yaml").write_text(yaml.safe_dump(wanted | {"about": "Otherwise said."}))
    said = run("results/fusu/source.json", "results/fusu/scenes.parquet")
    assert "Nothing to be done" in said, "words about a dataset make no scenes anew"
