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
from urllib.parse import urlsplit

from crfm_core import CrfmError, DataError, ResourceError, WeightsError
from crfm_core.checkpoints import COMPONENTS, check_base_model, missing_parts
from crfm_core.files import exclusive, hash_of, read_json, require_disk, sha256_of, write_json
from crfm_core.settings import HubBase

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

FETCH_RECORD = "fetched.json"
GATED = "stabilityai/stable-diffusion-3"  #: the names of repositories begin so whose licence must be accepted on their page
SMALL_FILE = 10_000_000  # bytes; files up to it are fetched several at a time, as most of their time is waiting for the answer
WORKERS = 8


@dataclass(frozen=True)
class Repository:
    """A repository of the model hub at one revision, and the folder it is fetched to.

    Args:
        revision: a commit; or a branch, which is fixed to its commit when the first download begins.
        needed: which files, by name, are fetched.
        check: gets the needed names before anything is downloaded and raises what is wrong with them.
        key, place: messages name the configuration's keys ``{key}.repo``, ``{key}.revision`` and ``{key}.{place}`` (the folder).
        instead: what helps without the hub, for messages.
        command: what to run again where there is a network, for messages.

    The token for gated repositories is that of the hub's own library: ``HF_TOKEN``, or what ``hf auth login`` stored (``HF_TOKEN_PATH``,
    ``HF_HOME``). It is sent to huggingface.co alone, and to a mirror in ``HF_ENDPOINT`` only where ``CRFM_TOKEN_HOST`` is that mirror's
    host; hosts that the hub redirects to do not get it. Files in the library's cache (``HF_HUB_CACHE``, ``HF_HOME``) are copied instead
    of downloaded.
    """

    repo: str
    revision: str
    folder: Path
    needed: Callable[[str], bool] = bool
    repo_type: Literal["model", "dataset"] = "model"
    check: Callable[[set[str]], None] | None = None
    key: str = "base_model"
    place: str = "path"
    instead: str = ""
    command: str = "fetch"

    def fetch(self) -> Path:
        """Download the needed files into the folder, and return the folder.

        A stopped download continues inside the file where it stopped. Every file is compared with the hash the hub lists, then the record
        ``fetched.json`` is written: ``repo``, ``asked`` (the configured revision), ``revision`` (the commit), ``files`` with ``size`` and
        ``sha256``. A folder with that record and files of those sizes needs no network. Files of an earlier revision are removed.

        Raises WeightsError for a model and DataError for a dataset (no access, no such repository, no network, wrong content, a name that
        leads out of the folder), and ResourceError (no space on the disk, a folder that cannot be written).
        """
        if not self.is_complete():
            access = _access(self.fault)
            if access.withheld:
                print(f"{access.no_token}; {access.give_token}", flush=True)
            with _explained(self, access), exclusive(self.folder):
                if not self.is_complete():  # another job may just have fetched it
                    _fetch(self, access)
        return self.folder

    @property
    def fault(self) -> type[CrfmError]:
        """The error that says what is wrong with the repository or the way to it."""
        return DataError if self.repo_type == "dataset" else WeightsError

    def is_complete(self) -> bool:
        """Whether all files of the revision are there, by the record and their sizes."""
        record = read_record(self.folder)
        return (
            record.get("revision") is not None
            and self.matches(record)
            and all(
                (self.folder / name).is_file() and (self.folder / name).stat().st_size == file["size"]
                for name, file in record["files"].items()
            )
        )

    def matches(self, record: dict) -> bool:
        """Whether a record is of this revision: of that commit, or of the one that a branch of that name was fixed to."""
        return record.get("repo") == self.repo and self.revision in (record.get("revision"), record.get("asked"))


def read_record(folder: Path) -> dict:
    """The record of a fetched folder; {} if there is none or it is damaged: then every file is compared with the hub's list."""
    if not (folder / FETCH_RECORD).is_file():
        return {}
    try:
        return read_json(folder / FETCH_RECORD)
    except DataError as error:
        print(f"{error}; going on without it", flush=True)
        return {}


def fetch_base_model(hub: HubBase, command: str = "fetch_base_model") -> Path:
    """Download an SD3 pipeline at a pinned revision from the model hub into ``hub.path``, and return that folder.

    Only what the pipeline loads is fetched: configurations, tokenizers, weights in full precision as safetensors, the licence.
    Errors as of :meth:`Repository.fetch`.
    """

    def check(names: set[str]) -> None:
        if lacking := missing_parts({*names, *(name.split("/")[0] for name in names)}):
            raise WeightsError(f"base_model.repo: {hub.repo} lacks {', '.join(lacking)}; give one that holds an SD3 pipeline of diffusers")

    instead = "use a folder of the model as it is with `kind: folder`"
    wanted = Repository(hub.repo, hub.revision, Path(hub.path), _is_of_pipeline, check=check, instead=instead, command=command)
    return check_base_model(wanted.fetch())


def is_fetched(repo: str, revision: str, folder: Path | str) -> bool:
    """Whether ``folder`` holds what :meth:`Repository.fetch` fetches of this revision, by its record and the files' sizes."""
    return Repository(repo, revision, Path(folder)).is_complete()


def require_token(hub: HubBase) -> None:
    """Raise WeightsError when a repository that is known to be gated is to be fetched without a token, or with one that cannot be."""
    access = _access(WeightsError)
    if hub.repo.startswith(GATED) and not access.token:
        raise WeightsError(
            f"base_model.repo: {hub.repo} is gated and {access.no_token}; accept its licence at {access.endpoint}/{hub.repo} and "
            f"{access.give_token}, or use a folder of the model as it is with `kind: folder`"
        )


def name_fault(name: str) -> str:
    """Why a file of a listing or an archive must not be written below a folder under its own name; "" if it may."""
    parts = PurePosixPath(name).parts
    faults = {
        "holds a backslash": "\\" in name,
        "begins with a drive letter": re.match(r"[A-Za-z]:", name),
        "is absolute": name.startswith("/"),
        "leads upwards": ".." in parts,
        "is empty": not parts,
        "holds control characters": any(ord(character) < 32 or ord(character) == 127 for character in name),
        "is too long": any(len(part.encode(errors="surrogatepass")) > 255 for part in parts),
    }
    return next((fault for fault, found in faults.items() if found), "")


@dataclass(frozen=True)
class _Access:
    """The hub's address and the token for it, "" for none; ``withheld`` when there is one that this address does not get."""

    endpoint: str
    token: str
    withheld: bool = False

    @property
    def no_token(self) -> str:
        """Why no token is sent."""
        if self.withheld:
            return f"the token is not sent to {self.endpoint}, which is not the hub's own address"
        return "there is no token"

    @property
    def give_token(self) -> str:
        """How to have one sent."""
        if self.withheld:
            return f"set CRFM_TOKEN_HOST={urlsplit(self.endpoint).hostname} if that mirror may have it"
        return "`export HF_TOKEN=...` or log in with `hf auth login`: a token of that account, with the right to read gated repositories"


def _access(fault: type[CrfmError]) -> _Access:
    """The hub's address and the token, from the environment and the stored login as they are now. Raises ``fault`` for what cannot be."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import DeviceCodeError, OIDCError

    try:
        token = get_token() or ""
    except (OSError, ValueError, DeviceCodeError, OIDCError) as error:
        raise fault(f"the stored login of the hub cannot be read ({type(error).__name__}); log in again, or set HF_TOKEN") from None
    if not re.fullmatch(r"[!-~]*", token):
        raise fault("HF_TOKEN, or the stored login, holds characters that no token has; set it to the token and nothing else")
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if "@" in endpoint:
        raise fault("HF_ENDPOINT holds a name or password, which messages would show; give the address alone")
    parts = urlsplit(endpoint)
    own = parts.scheme == "https" and f".{parts.hostname}".endswith(".huggingface.co")
    if token and not own and parts.hostname != os.environ.get("CRFM_TOKEN_HOST"):
        return _Access(endpoint, "", withheld=True)
    return _Access(endpoint, token)


def _fetch(wanted: Repository, access: _Access) -> None:
    """Bring the folder to the revision, file by file; right files are kept."""
    folder, record = wanted.folder, read_record(wanted.folder)
    begun = (record.get("revision") or record.get("begun")) if wanted.matches(record) else None
    commit, files = _listing(wanted, begun or wanted.revision, access)
    missing = {name: file for name, file in files.items() if not _matches(folder / name, file)}
    ours = record.get("files", {})
    if foreign := [name for name in missing if not ours and (folder / name).exists()]:
        raise wanted.fault(
            f"{wanted.key}.{wanted.place}: {folder / foreign[0]} is there already and is not the file of {wanted.repo} at {commit}; "
            f"delete it, set another path{', or ' + wanted.instead if wanted.instead else ''}"
        )
    # The library's own downloads restart an interrupted file; here its bytes are kept, under its name and hash.
    partial = folder / ".partial"
    partial.mkdir(exist_ok=True)
    parts = {name: partial / hash_of(name, file.lfs.sha256 if file.lfs else file.blob_id) for name, file in missing.items()}
    kept = sum(part.stat().st_size for part in parts.values() if part.exists())
    needed = sum(file.size for file in missing.values()) - kept
    require_disk(folder, needed, f"set {wanted.key}.{wanted.place} to a folder on another disk")

    ours |= dict.fromkeys(files)
    asked = {"repo": wanted.repo, "asked": wanted.revision}
    # the files are ours now, and complete only after the last line
    write_json(folder / FETCH_RECORD, asked | {"revision": None, "begun": commit, "files": ours})

    def fetch_one(name: str) -> None:
        print(f"{name}, {files[name].size} bytes ({rising.index(name) + 1} of {len(rising)})", flush=True)
        _fetch_file(wanted, name, files[name], commit, parts[name], access)

    rising = sorted(missing, key=lambda name: files[name].size)
    small = [name for name in rising if files[name].size <= SMALL_FILE]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(fetch_one, small))  # after an error those that wait are cancelled
    for name in rising[len(small) :]:
        fetch_one(name)
    for stale in ours.keys() - files.keys():  # of another revision
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(partial)
    record = {n: {"size": f.size, "sha256": f.lfs.sha256 if f.lfs else sha256_of(folder / n)} for n, f in sorted(files.items())}
    write_json(folder / FETCH_RECORD, asked | {"revision": commit, "files": record})


def _listing(wanted: Repository, revision: str, access: _Access) -> tuple[str, dict[str, RepoFile]]:
    """The commit that ``revision`` stands for, and its needed files by name, with sizes and hashes.

    The files come from the tree, page by page: the list that comes with the commit is cut off for repositories of many files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=access.endpoint, token=access.token or False)
    try:
        commit = api.repo_info(wanted.repo, revision=revision, repo_type=wanted.repo_type, timeout=30).sha
        if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
            raise ValueError(f"it gives {commit!r} as the commit of {revision}")
        tree = list(api.list_repo_tree(wanted.repo, recursive=True, revision=commit, repo_type=wanted.repo_type))
    except (KeyError, TypeError) as error:  # JSON, but none of a hub
        raise ValueError(repr(error)) from None
    files = {file.path: file for file in tree if isinstance(file, RepoFile) and wanted.needed(file.path)}
    for name in files:
        if fault := name_fault(name) or ("is one of ours" if name.split("/")[0] in (FETCH_RECORD, ".partial", ".lock") else ""):
            raise wanted.fault(f"{wanted.key}.repo: {wanted.repo} lists a file {name!r}, whose name {fault}; nothing of it is fetched")
    if wanted.check:
        wanted.check(set(files))
    if not files:
        raise wanted.fault(f"{wanted.key}.repo: {wanted.repo} at {commit} holds none of the files that are needed; give another repository")
    return commit, files


def _fetch_file(wanted: Repository, name: str, file: RepoFile, commit: str, part: Path, access: _Access) -> None:
    """Copy a file from the library's cache, or append to ``part`` what it lacks; check it and give it its name.

    On its way to another host, a request loses the token.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    cached = try_to_load_from_cache(wanted.repo, name, revision=commit, repo_type=wanted.repo_type)
    if isinstance(cached, str) and _matches(Path(cached), file):
        shutil.copyfile(cached, part)
    else:
        headers = build_hf_headers(token=access.token or False) | {"Accept-Encoding": "identity"}
        url = hf_hub_url(wanted.repo, name, repo_type=wanted.repo_type, revision=commit, endpoint=access.endpoint)
        with part.open("ab") as handle:
            if (begin := handle.tell()) < file.size:
                http_get(url, handle, resume_size=begin, headers=headers, displayed_filename=name)
    if not _matches(part, file):
        found = part.stat().st_size
        part.unlink()
        raise wanted.fault(
            f"{wanted.repo}: {name} came with {found} bytes that are not the {file.size} bytes of its checksum at {access.endpoint}; "
            f"they are deleted, run `{wanted.command}` again"
        )
    (wanted.folder / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, wanted.folder / name)


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
def _explained(wanted: Repository, access: _Access) -> Iterator[None]:
    """Turn what the hub's library raises into messages that say what to accept, set or do; none of them holds the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    key, endpoint = f"{wanted.key}.repo", access.endpoint
    again = f"run `{wanted.command}` again with the same configuration, it continues where it stopped"
    try:
        yield
    except HfHubHTTPError as error:
        raise wanted.fault(_refusal(wanted, access, error, again)) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        cause = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else f"{type(error).__name__}: {error}"
        raise wanted.fault(
            f"{key}: cannot reach {endpoint} ({cause}); where there is a network, such as the login node of a cluster, {again}"
            f"{', or ' + wanted.instead if wanted.instead else ''}"
        ) from None
    except ValueError as error:
        raise wanted.fault(f"{key}: {endpoint} does not answer as a model hub ({error}); check HF_ENDPOINT and the network") from None
    except OSError as error:
        raise ResourceError(
            f"{wanted.key}.{wanted.place}: {error}; free some space there or set it to another folder, then {again}"
        ) from None


def _refusal(wanted: Repository, access: _Access, error: HfHubHTTPError, again: str) -> str:
    """What an answer of the hub with an error means, by its error code and status, and what to do."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, key, endpoint, status = wanted.repo, f"{wanted.key}.repo", access.endpoint, error.response.status_code
    page, reason = f"{endpoint}/{'datasets/' * (wanted.repo_type == 'dataset')}{repo}", _reason(error, access.token)
    if isinstance(error, GatedRepoError):
        if access.token:
            return f"{key}: {repo} is gated and the token's account has no access to it{reason}; accept its licence at {page}"
        return f"{key}: {repo} is gated and {access.no_token}; accept its licence at {page} and {access.give_token}"
    if isinstance(error, DisabledRepoError):
        return f"{key}: {endpoint} has disabled {repo}; give another repository"
    if isinstance(error, RevisionNotFoundError):
        fixed = read_record(wanted.folder).get("begun") or read_record(wanted.folder).get("revision")
        message = f"{wanted.key}.revision: {repo} has no revision {wanted.revision}; take one of {page}/commits/main"
        return message + (
            f", or delete {wanted.folder / FETCH_RECORD}, which fixed it to {fixed}" if fixed not in (None, wanted.revision) else ""
        )
    if status == 403 and access.token and re.search(r"token|permission|scope", reason, re.IGNORECASE):
        return (
            f"{key}: the token lacks the right to read {repo}{reason}; give it that right in the account's settings, or set another token"
        )
    if status == 403:
        return f"{key}: {page} is forbidden{reason}; check whether this account, network and proxy may read it"
    if status == 401 and access.token:
        return f"{key}: {endpoint} refuses the token; set HF_TOKEN to a valid one of an account that may read {page}, or log in again"
    if status == 401:
        return (
            f"{key}: {endpoint} has no {wanted.repo_type} {repo}, or wants a token for it, and {access.no_token}; check the name, or "
            f"{access.give_token}"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        how = "with this token; check the name and the token's account" if access.token else f"and {access.no_token}; check the name"
        return f"{key}: {endpoint} has no {repo} that may be read {how}"
    return f"{key}: {page} answered with status {status}; wait, then {again}"


def _reason(error: HfHubHTTPError, token: str) -> str:
    """The server's own words in brackets; nothing where there are none, or they repeat the token or are no plain text."""
    text = " ".join((error.server_message or "").split())[:200]
    return f" ({text})" if text and text.isprintable() and not (token and token in text) else ""
