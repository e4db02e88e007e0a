"""The base model from the model hub: what its pipeline needs at a pinned revision, downloaded once and compared with the hub's hashes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crfm_core import ResourceError, WeightsError
from crfm_core.checkpoints import COMPONENTS, check_base_model, lacking_parts
from crfm_core.files import exclusive, read_json, require_disk, sha256_of, write_json
from crfm_core.settings import HubBase

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

RECORD = "fetched.json"


def fetch_base_model(hub: HubBase, command: str = "fetch_base_model") -> Path:
    """Download an SD3 pipeline at a pinned revision from the model hub into ``hub.path``, and return that folder.

    Only what the pipeline loads is fetched: configurations, tokenizers, weights in full precision as safetensors, the licence.
    A stopped download continues inside the file where it stopped. Every file is compared with the hash the hub lists, then a
    record of them is written; a folder with that record needs no network. ``HF_TOKEN`` opens gated models and goes to the hub
    only; ``HF_ENDPOINT`` says where the hub is. ``command`` is what messages tell to run where there is a network.

    Raises WeightsError (no access, no such model, no network, wrong content) and ResourceError (no space on the disk).
    """
    folder = Path(hub.path)
    if not _is_whole(folder, hub):
        endpoint, token = _access()
        with _explained(hub, endpoint, token, command), exclusive(folder):
            if not _is_whole(folder, hub):  # another job may just have fetched it
                _fetch(folder, hub, endpoint, token, command)
    return check_base_model(folder)


def _is_whole(folder: Path, hub: HubBase) -> bool:
    """Whether all files of the wanted revision are there, by the record and their sizes."""
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    return (record.get("repo"), record.get("revision")) == (hub.repo, hub.revision) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == file["size"] for name, file in record["files"].items()
    )


def _access() -> tuple[str, str]:
    """The hub's address and the token ("" for none), from the environment as it is now."""
    from huggingface_hub import constants

    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise WeightsError("HF_TOKEN holds characters that no token has; set it to the token and nothing else")
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"), token


def _fetch(folder: Path, hub: HubBase, endpoint: str, token: str, command: str) -> None:
    """Bring ``folder`` to the wanted revision, file by file; what is there and right is kept."""
    files = _listing(hub, endpoint, token)
    missing = {name: file for name, file in files.items() if not _matches(folder / name, file)}
    ours = read_json(folder / RECORD)["files"] if (folder / RECORD).is_file() else {}
    if foreign := [name for name in missing if not ours and (folder / name).exists()]:
        raise WeightsError(
            f"base_model.path: {folder / foreign[0]} is there already and is not the file of {hub.repo} at {hub.revision}; "
            "delete it, set another path, or use the folder as it is with `kind: folder`"
        )
    # The library's own downloads begin a broken-off file anew; here its bytes are kept, under their hash.
    partial = folder / ".partial"
    partial.mkdir(exist_ok=True)
    parts = {name: partial / (file.lfs.sha256 if file.lfs else file.blob_id) for name, file in missing.items()}
    kept = sum(part.stat().st_size for part in partial.iterdir() if part in parts.values())
    require_disk(folder, sum(file.size for file in missing.values()) - kept, "set base_model.path to a folder on another disk")

    ours |= dict.fromkeys(files)
    write_json(folder / RECORD, {"repo": hub.repo, "revision": None, "files": ours})  # ours, and not whole before the last line
    for number, (name, file) in enumerate(missing.items(), 1):
        print(f"{name}, {file.size} bytes ({number} of {len(missing)})", flush=True)
        _download(name, file, parts[name], hub, endpoint, token)
        if not _matches(parts[name], file):
            found = parts[name].stat().st_size
            parts[name].unlink()
            raise WeightsError(
                f"{hub.repo}: {name} came with {found} bytes that are not the {file.size} bytes of its checksum at {endpoint}; "
                f"they are deleted, run `{command}` again"
            )
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(parts[name], folder / name)
    for stale in ours.keys() - files.keys():  # of another revision
        (folder / stale).unlink(missing_ok=True)
    shutil.rmtree(partial)
    record = {n: {"size": f.size, "sha256": f.lfs.sha256 if f.lfs else sha256_of(folder / n)} for n, f in sorted(files.items())}
    write_json(folder / RECORD, {"repo": hub.repo, "revision": hub.revision, "files": record})


def _listing(hub: HubBase, endpoint: str, token: str) -> dict[str, RepoSibling]:
    """The needed files of the revision by name, with sizes and hashes."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token or False)
    listing = api.model_info(hub.repo, revision=hub.revision, files_metadata=True, timeout=30).siblings
    files = {file.rfilename: file for file in listing if _is_needed(file.rfilename)}
    if lacking := lacking_parts({*files, *(name.split("/")[0] for name in files)}):
        raise WeightsError(f"base_model.repo: {hub.repo} lacks {', '.join(lacking)}; give one that holds an SD3 pipeline of diffusers")
    return files


def _download(name: str, file: RepoSibling, part: Path, hub: HubBase, endpoint: str, token: str) -> None:
    """Append to ``part`` what it lacks of a file. On its way to another host, a request loses the token."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(token=token or False) | {"Accept-Encoding": "identity"}
    with part.open("ab") as handle:
        if (begin := handle.tell()) < file.size:
            url = hf_hub_url(hub.repo, name, revision=hub.revision, endpoint=endpoint)
            http_get(url, handle, resume_size=begin, headers=headers, displayed_filename=name)


def _is_needed(name: str) -> bool:
    """Whether a pipeline loads the file: none in half precision, no checkpoint in one file, nothing that can run code."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return file == "model_index.json" or file.startswith("LICENSE")
    return folder in COMPONENTS and Path(file).suffix in (".json", ".safetensors", ".txt", ".model") and ".fp16" not in file


def _matches(path: Path, file: RepoSibling) -> bool:
    """Whether ``path`` is the listed file, by size and by SHA-256 (large files) or git's hash of a blob (the others)."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs:
        return sha256_of(path) == file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.blob_id


@contextlib.contextmanager
def _explained(hub: HubBase, endpoint: str, token: str, command: str) -> Iterator[None]:
    """Turn what the hub's library raises into messages that say what to accept, set or do; none of them holds the token."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page, again = f"{endpoint}/{hub.repo}", f"run `{command}` again with the same configuration, it continues where it stopped"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, GatedRepoError) or status == 403:
            message = (
                f"base_model.repo: {hub.repo} is gated and {'the token in HF_TOKEN does not open it' if token else 'HF_TOKEN is not set'}; "
                f"accept its licence at {page} and set HF_TOKEN to a token of that account, with the right to read gated repositories"
            )
        elif isinstance(error, RevisionNotFoundError):
            message = f"base_model.revision: {hub.repo} has no revision {hub.revision}; take one of {page}/commits/main"
        elif status == 401 and token:
            message = f"base_model.repo: {endpoint} refuses the token in HF_TOKEN; set it to a valid one of an account that may read {page}"
        elif status == 401:
            message = f"base_model.repo: {endpoint} wants a token for {hub.repo}, or has no such model; set HF_TOKEN, and check the name"
        elif isinstance(error, RepositoryNotFoundError) or status == 404:
            message = (
                f"base_model.repo: {endpoint} has no {hub.repo} that may be read with this HF_TOKEN; check the name and the token's account"
            )
        else:
            message = f"base_model.repo: {page} answered with status {status}; wait, then {again}"
        raise WeightsError(message) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        cause = "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else f"{type(error).__name__}: {error}"
        raise WeightsError(
            f"base_model.repo: cannot reach {endpoint} ({cause}); where there is a network, such as the login node of a cluster, {again}, "
            "or copy a folder of the model here and set `kind: folder`"
        ) from None
    except ValueError as error:
        raise WeightsError(
            f"base_model.repo: {endpoint} does not answer as a model hub ({error}); check HF_ENDPOINT and the network"
        ) from None
    except OSError as error:
        raise ResourceError(f"base_model.path: {error}; free some space there or set it to another folder, then {again}") from None
