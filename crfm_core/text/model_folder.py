"""Folders of transformers models: fetched from the hub or the user's, with weights in safetensors, loaded without running their code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crfm_core import WeightsError
from crfm_core.files import read_json
from crfm_core.hub import Repository
from crfm_core.settings import Model

if TYPE_CHECKING:
    import torch

#: Suffixes of a model's files: configuration, tokenizer, chat template and weights.
MODEL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")

#: How every part of a model is loaded: from its folder, and without code of its own.
LOAD_OPTIONS = {"local_files_only": True, "trust_remote_code": False}


def is_model_file(name: str) -> bool:
    """Whether transformers may read the file ``name`` of a model's folder: nothing in it can run code. Weights in one other file
    ("consolidated") are a second copy."""
    return "/" not in name and Path(name).suffix in MODEL_SUFFIXES and not name.startswith(("consolidated", "fetched."))


def fetch_model(settings: Model, key: str, command: str) -> Path:
    """Download a model from the hub into its folder, and return the folder (:meth:`crfm_core.hub.Repository.fetch`).

    ``key`` is the configuration's section that messages name, ``command`` what to run where there is a network.
    """

    def check(names: set[str]) -> None:
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            raise WeightsError(f"{key}.repo: {settings.repo} has no config.json with weights in safetensors; give another model")

    instead = "give the folder of a model as path, without repo"
    repository = Repository(
        str(settings.repo), str(settings.revision), Path(settings.folder), is_model_file,
        check=check, key=key, instead=instead, command=command,
    )  # fmt: skip
    return check_folder(repository.fetch(), key)


def check_folder(folder: Path | str, key: str) -> Path:
    """Return ``folder`` if it holds a model's configuration and weights in safetensors, by their names. Raises WeightsError if not."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{key}.path: {folder} is no model folder, it has no config.json; give one of transformers, or repo and revision"
        )
    if not any(is_model_file(path.name) for path in folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)))
        found = f"its weights ({pickled}) are pickled, which can run code" if pickled else "it has no weights"
        raise WeightsError(f"{key}.path: {folder}: {found}; give a folder with weights in safetensors")
    return folder


def folder_at(place: Path | str, key: str) -> Path:
    """The checked folder of a model: ``place`` itself, or what the JSON file ``place`` says it was fetched to."""
    place = Path(place)
    if place.suffix != ".json":
        return check_folder(place, key)
    where = read_json(place)
    try:
        return check_folder(where["folder"], key)
    except WeightsError as error:
        raise WeightsError(f"{error}; delete {place} to have {where['repo']} fetched again") from None


@contextlib.contextmanager
def loading(folder: Path, key: str, kind: str) -> Iterator[None]:
    """Turn what loading a model raises into WeightsErrors that say what to install, fetch or give; ``kind`` is what it should be."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        raise WeightsError(f"{key}: {folder} needs more software; install it and run again: {first_line(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"{key}: {folder} cannot be loaded as {kind} ({first_line(error)}); fetch it again, or give one that transformers has without "
            "code of its own"
        ) from None


def load_model(kind: Any, folder: Path, key: str, dtype: torch.dtype) -> Any:
    """The model in ``folder``, by a class of transformers, for inference. Raises WeightsError when it lacks weights, which would be left
    as they were drawn."""
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, loaded = kind.from_pretrained(folder, **options, **LOAD_OPTIONS)
    if lacking := sorted(loaded["missing_keys"]):
        raise WeightsError(
            f"{key}: {folder} lacks {len(lacking)} weights of its model, first {lacking[0]}; fetch it again, or give another"
        )
    return model.eval()


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
