"""Repositories of the model hub: what is needed of one at a fixed commit, downloaded once and compared with the hub's hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from crfm_core import CrfmError, DataError, ResourceError, WeightsError
from crfm_core.checkpoints import COMPONENTS, check_base_model, lacking_parts
from crfm_core.files import exclusive, hash_of, read_json, require_disk, sha256_of, write_json
from crfm_core.settings import HubBase

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

RECORD = "fetched.json"
GATED = "stabilityai/stable-diffusion-3"  #: what repositories begin with whose licence must be accepted on their page
SMALL = 10_000_000  # bytes; files up to it are fetched several at a time, as what they take is mostly the answering
WORKERS = 8


@dataclass(frozen=True)
class _Wish:
    """What :func:`fetch_repository` was asked for, and the words of its messages."""

    repo: str
    revision: str
    folder: Path
    needed: Callable[[str], bool] = bool
    repo_type: Literal["model", "dataset"] = "model"
    check: Callable[[set[str]], None] | None = None
    key: str = "base_model"
    place: str = "path"
    instead: str = ""
    command: str = "fetch_repository"

    @property
    def fault(self) -> type[CrfmError]:
        """The error that says what is wrong with the repository or the way to it."""
        return DataError if self.repo_type == "dataset" else WeightsError

    @property
    def url(self) -> str:
        """The repository's address below that of the hub."""
        return f"datasets/{self.repo}" if self.repo_type == "dataset" else self.repo

    def whole(self) -> bool:
        """Whether all files of the wanted revision are there, by the record and their sizes."""
        record = self.record()
        return (
            record.get("revision") is not None
            and self.is_of(record)
            and all(
                (self.folder / name).is_file() and (self.folder / name).stat().st_size == file["size"]
                for name, file in record["files"].items()
            )
        )

    def record(self) -> dict:
        """What the folder's record says; nothing where there is none."""
        return read_record(self.folder)

    def is_of(self, record: dict) -> bool:
        """Whether a record is of the wanted revision: of that commit, or of the one a branch of that name was fixed to."""
        return record.get("repo") == self.repo and self.revision in (record.get("revision"), record.get("asked"))


def read_record(folder: Path) -> dict:
    """What the record of a fetched folder says; nothing where there is none, or one that a power cut left damaged: then every file is
    compared with what the hub lists."""
    if not (folder / RECORD).is_file():
        return {}
    try:
        return read_json(folder / RECORD)
    except DataError as error:
        print(f"{error}; going on without it", flush=True)
        return {}


def fetch_base_model(hub: HubBase, command: str = "fetch_base_model") -> Path:
    """Download an SD3 pipeline at a pinned revision from the model hub into ``hub.path``, and return that folder.

    Only what the pipeline loads is fetched: configurations, tokenizers, weights in full precision as safetensors, the licence.
    How, and what it raises: :func:`fetch_repository`.
    """

    def check(names: set[str]) -> None:
        if lacking := lacking_parts({*names, *(name.split("/")[0] for name in names)}):
            raise WeightsError(f"base_model.repo: {hub.repo} lacks {', '.join(lacking)}; give one that holds an SD3 pipeline of diffusers")

    instead = "use a folder of the model as it is with `kind: folder`"
    folder = fetch_repository(
        hub.repo, hub.revision, hub.path, needed=_is_of_pipeline, check=check, key="base_model", instead=instead, command=command
    )
    return check_base_model(folder)


def fetch_repository(
    repo: str,
    revision: str,
    folder: Path | str,
    *,
    needed: Callable[[str], bool],
    repo_type: Literal["model", "dataset"] = "model",
    check: Callable[[set[str]], None] | None = None,
    key: str = "base_model",
    place: str = "path",
    instead: str = "",
    command: str = "fetch_repository",
) -> Path:
    """Download the files of a repository whose names are ``needed`` into ``folder``, and return that folder.

    A ``revision`` that is a branch is fixed to the commit it stands at when the first download begins; later calls keep that commit.
    A stopped download continues inside the file where it stopped. Every file is compared with the hash the hub lists, then the record
    ``fetched.json`` is written: ``repo``, ``asked`` (the revision given), ``revision`` (the commit), ``files`` with ``size`` and
    ``sha256``. A folder with that record and files of those sizes needs no network. Files of an earlier revision are removed.

    ``HF_TOKEN`` opens gated repositories and goes to the hub only; ``HF_ENDPOINT`` says where the hub is. ``check`` sees the needed
    names before anything is downloaded and raises what it has against them. Messages name the configuration's keys ``{key}.repo``,
    ``{key}.revision`` and ``{key}.{place}`` (the folder), what to run where there is a network (``command``) and what helps without
    the hub (``instead``).

    Raises WeightsError for a model and DataError for a dataset (no access, no such repository, no network, wrong content, a name that
    leads out of the folder), and ResourceError (no space on the disk, a folder that cannot be written).
    """
    wish = _Wish(repo, revision, Path(folder), needed, repo_type, check, key, place, instead, command)
    if not wish.whole():
        endpoint, token = _access(wish)
        with _explained(wish, endpoint, token), exclusive(wish.folder):
            if not wish.whole():  # another job may just have fetched it
                _fetch(wish, endpoint, token)
    return wish.folder


def is_fetched(repo: str, revision: str, folder: Path | str) -> bool:
    """Whether ``folder`` holds what :func:`fetch_repository` fetched of this revision, by its record and the files' sizes."""
    return _Wish(repo, revision, Path(folder)).whole()


def require_token(hub: HubBase) -> None:
    """Raise WeightsError when a repository that is known to be gated is to be fetched without HF_TOKEN, or with one that cannot be."""
    wish = _Wish(hub.repo, hub.revision, Path(hub.path))
    endpoint, token = _access(wish)
    if hub.repo.startswith(GATED) and not token:
        raise WeightsError(
            f"base_model.repo: {hub.repo} is gated and HF_TOKEN is not set (a token that the hub's own login stored is not read); accept "
            f"its licence at {endpoint}/{hub.repo} and `export HF_TOKEN=...`, a token of that account with the right to read gated "
            "repositories, or use a folder of the model as it is with `kind: folder`"
        )


def name_fault(name: str) -> str:
    """Why a file of a listing or an archive must not be written below a folder under its own name; "" if it may."""
    parts = PurePosixPath(name).parts
    if "\\" in name:
        return "holds a backslash"
    if re.match(r"[A-Za-z]:", name):
        return "begins with a drive letter"
    if name.startswith("/"):
        return "is absolute"
    if ".." in parts:
        return "leads upwards"
    if not parts:
        return "is empty"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "holds control characters"
    return "is too long" if any(len(part.encode(errors="surrogatepass")) > 255 for part in parts) else ""


def _access(wish: _Wish) -> tuple[str, str]:
    """The hub's address and the token ("" for none), from the environment as it is now."""
    from huggingface_hub import constants

    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise wish.fault("HF_TOKEN holds characters that no token has; set it to the token and nothing else")
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if "@" in endpoint:
        raise wish.fault("HF_ENDPOINT holds a name or password, which messages would show; give the address alone")
    return endpoint, token


def _fetch(wish: _Wish, endpoint: str, token: str) -> None:
    """Bring the folder to the wanted revision, file by file; what is there and right is kept."""
    folder, record = wish.folder, wish.record()
    begun = (record.get("revision") or record.get("begun")) if wish.is_of(record) else None
    commit, files = _listing(wish, begun or wish.revision, endpoint, token)
    missing = {name: file for name, file in files.items() if not _matches(folder / name, file)}
    ours = record.get("files", {})
    if foreign := [name for name in missing if not ours and (folder / name).exists()]:
        raise wish.fault(
            f"{wish.key}.{wish.place}: {folder / foreign[0]} is there already and is not the file of {wish.repo} at {commit}; "
            f"delete it, set another path{', or ' + wish.instead if wish.instead else ''}"
        )
    # The library's own downloads begin a broken-off file anew; here its bytes are kept, under its name and hash.
    partial = folder / ".partial"
    partial.mkdir(exist_ok=True)
    parts = {name: partial / hash_of(name, file.lfs.sha256 if file.lfs else file.blob_id) for name, file in missing.items()}
    kept = sum(part.stat().st_size for part in parts.values() if part.exists())
    needed = sum(file.size for file in missing.values()) - kept
    require_disk(folder, needed, f"set {wish.key}.{wish.place} to a folder on another disk")

    ours |= dict.fromkeys(files)
    asked = {"repo": wish.repo, "asked": wish.revision}
    write_json(folder / RECORD, asked | {"revision": None, "begun": commit, "files": ours})  # ours, and not whole before the last line

    def fetch_one(number: int, name: str) -> None:
        print(f"{name}, {files[name].size} bytes ({number} of {len(missing)})", flush=True)
        _fetch_file(wish, name, files[name], commit, parts[name], endpoint, token)

    numbered = list(enumerate(sorted(missing, key=lambda name: files[name].size), 1))
    few = [(number, name) for number, name in numbered if files[name].size > SMALL]
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(fetch_one, number, name) for number, name in numbered[: len(numbered) - len(few)]]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for number, name in few:
        fetch_one(number, name)
    for stale in ours.keys() - files.keys():  # of another revision
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(partial)
    record = {n: {"size": f.size, "sha256": f.lfs.sha256 if f.lfs else sha256_of(folder / n)} for n, f in sorted(files.items())}
    write_json(folder / RECORD, asked | {"revision": commit, "files": record})


def _listing(wish: _Wish, revision: str, endpoint: str, token: str) -> tuple[str, dict[str, RepoFile]]:
    """The commit that ``revision`` stands for, and its needed files by name, with sizes and hashes.

    The files come from the tree, page by page: the list that comes with the commit is cut off for repositories of many files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint, token=token or False)
    try:
        commit = api.repo_info(wish.repo, revision=revision, repo_type=wish.repo_type, timeout=30).sha
        if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
            raise ValueError(f"it gives {commit!r} as the commit of {revision}")
        tree = list(api.list_repo_tree(wish.repo, recursive=True, revision=commit, repo_type=wish.repo_type))
    except (KeyError, TypeError) as error:  # JSON, but none of a hub
        raise ValueError(repr(error)) from None
    files = {file.path: file for file in tree if isinstance(file, RepoFile) and wish.needed(file.path)}
    for name in files:
        if fault := name_fault(name) or ("is one of ours" if name.split("/")[0] in (RECORD, ".partial", ".lock") else ""):
            raise wish.fault(f"{wish.key}.repo: {wish.repo} lists a file {name!r}, whose name {fault}; nothing of it is fetched")
    if wish.check:
        wish.check(set(files))
    if not files:
        raise wish.fault(f"{wish.key}.repo: {wish.repo} at {commit} holds none of the files that are needed; give another repository")
    return commit, files


def _fetch_file(wish: _Wish, name: str, file: RepoFile, commit: str, part: Path, endpoint: str, token: str) -> None:
    """Download a file to ``part``, check it and give it its name."""
    _download(wish, name, file, commit, part, endpoint, token)
    if not _matches(part, file):
        found = part.stat().st_size
        part.unlink()
        raise wish.fault(
            f"{wish.repo}: {name} came with {found} bytes that are not the {file.size} bytes of its checksum at {endpoint}; "
            f"they are deleted, run `{wish.command}` again"
        )
    (wish.folder / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, wish.folder / name)


def _download(wish: _Wish, name: str, file: RepoFile, commit: str, part: Path, endpoint: str, token: str) -> None:
    """Append to ``part`` what it lacks of a file. On its way to another host, a request loses the token."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token or False) | {"Accept-Encoding": "identity"}
    with part.open("ab") as handle:
        if (begin := handle.tell()) < file.size:
            url = hf_hub_url(wish.repo, name, repo_type=wish.repo_type, revision=commit, endpoint=endpoint)
            http_get(url, handle, resume_size=begin, headers=headers, displayed_filename=name)


def _is_of_pipeline(name: str) -> bool:
    """Whether a pipeline loads the file: none in half precision, no checkpoint in one file, nothing that can run code."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return file == "model_index.json" or file.startswith("LICENSE")
    return folder in COMPONENTS and Path(file).suffix in (".json", ".safetensors", ".txt", ".model") and ".fp16" not in file


def _matches(path: Path, file: RepoFile) -> bool:
    """Whether ``path`` is the listed file, by size and by SHA-256 (large files) or git's hash of a blob (the others)."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs:
        return sha256_of(path) == file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.blob_id


@contextlib.contextmanager
def _explained(wish: _Wish, endpoint: str, token: str) -> Iterator[None]:
    """Turn what the hub's library raises into messages that say what to accept, set or do; none of them holds the token."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, key, page = wish.repo, f"{wish.key}.repo", f"{endpoint}/{wish.url}"
    again = f"run `{wish.command}` again with the same configuration, it continues where it stopped"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, GatedRepoError) or status == 403:
            message = (
                f"{key}: {repo} is gated and {'the token in HF_TOKEN does not open it' if token else 'HF_TOKEN is not set'}; "
                f"accept its licence at {page} and set HF_TOKEN to a token of that account, with the right to read gated repositories"
            )
        elif isinstance(error, RevisionNotFoundError):
            fixed = wish.record().get("begun") or wish.record().get("revision")
            message = f"{wish.key}.revision: {repo} has no revision {wish.revision}; take one of {page}/commits/main"
            if fixed not in (None, wish.revision):
                message += f", or delete {wish.folder / RECORD}, which fixed it to {fixed}"
        elif status == 401 and token:
            message = f"{key}: {endpoint} refuses the token in HF_TOKEN; set it to a valid one of an account that may read {page}"
        elif status == 401:
            message = f"{key}: {endpoint} wants a token for {repo}, or has no such {wish.repo_type}; set HF_TOKEN, and check the name"
        elif isinstance(error, RepositoryNotFoundError) or status == 404:
            message = f"{key}: {endpoint} has no {repo} that may be read with this HF_TOKEN; check the name and the token's account"
        else:
            message = f"{key}: {page} answered with status {status}; wait, then {again}"
        raise wish.fault(message) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        cause = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else f"{type(error).__name__}: {error}"
        raise wish.fault(
            f"{key}: cannot reach {endpoint} ({cause}); where there is a network, such as the login node of a cluster, {again}"
            f"{', or ' + wish.instead if wish.instead else ''}"
        ) from None
    except ValueError as error:
        raise wish.fault(f"{key}: {endpoint} does not answer as a model hub ({error}); check HF_ENDPOINT and the network") from None
    except OSError as error:
        raise ResourceError(f"{wish.key}.{wish.place}: {error}; free some space there or set it to another folder, then {again}") from None
