"""Model folders and files of weights: complete and readable, before anything is loaded from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crfm_core import WeightsError
from crfm_core.files import inside, read_json, sha256_of

# Parts of an SD3 pipeline in the diffusers layout, each with the file that configures it; those with a config.json have weights.
COMPONENTS = {
    "transformer": "config.json",
    "scheduler": "scheduler_config.json",
    "vae": "config.json",
    **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "config.json"),
    **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), "tokenizer_config.json"),
}
TRANSFORMER = "SD3Transformer2DModel"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
#: Its settings that would change the noise levels or the steps between them, each with the value that training and sampling know.
#: They read `shift` beside these; what is left (base_shift, max_shift, ...) matters under use_dynamic_shifting alone.
SCHEDULER_SETTINGS = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
#: The file in a folder that tells how its model was made, with the SHA-256 of each of its files.
CARD = "card.json"
LARGEST_HEADER = 100_000_000  # bytes, the format's own bound


def check_base_model(folder: Path | str) -> Path:
    """Return ``folder`` if it is a complete diffusers folder of an SD3 pipeline, by names and lengths.

    Files are hashed only where a model card (:data:`CARD`) says what their hashes are.

    Raises WeightsError naming what is missing, unreadable, truncated, of another architecture, or not what the card says.
    """
    folder = Path(folder)
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.exists()]
    names = {path.relative_to(folder).as_posix() for path in paths}
    if lacking := missing_parts(names):
        raise WeightsError(
            f"base_model.path: {folder} lacks {', '.join(lacking)}; it must be a diffusers folder of Stable Diffusion 3.5 with weights "
            "in safetensors (others can run code), as `hf download OWNER/NAME --local-dir ...` makes it and `kind: hub` fetches it"
        )
    names = {name for name in names if name.split("/")[0] in (*COMPONENTS, "model_index.json")}
    configs = {name: _read_config(folder / name) for name in sorted(names) if name.endswith(".json")}
    classes = {
        "model_index.json": configs["model_index.json"].get("transformer"),
        "transformer/config.json": configs["transformer/config.json"].get("_class_name"),
    }
    for name, found in classes.items():
        if found not in (TRANSFORMER, ["diffusers", TRANSFORMER]):
            raise WeightsError(f"base_model.path: {folder / name} names the transformer {found}, not {TRANSFORMER}; give a model of SD3")
    check_scheduler(configs["scheduler/scheduler_config.json"], f"base_model.path: {folder / 'scheduler' / 'scheduler_config.json'}")
    for name in sorted(names):
        if name.endswith(".safetensors"):
            _check_length(folder / name)
        elif name.endswith(".safetensors.index.json"):
            shards = {f"{name.split('/')[0]}/{shard}" for shard in configs[name].get("weight_map", {}).values()}
            if missing := sorted(shards - names):
                raise WeightsError(f"base_model.path: {folder} lacks {', '.join(missing)}, named in {name}; fetch or copy the model again")
    _check_card(folder)
    return folder


def _check_card(folder: Path) -> None:
    """Raise WeightsError for a file whose hash is not the one on the folder's model card; without a card nothing is known."""
    if not (folder / CARD).is_file():
        return
    for name, expected in _read_config(folder / CARD).get("sha256", {}).items():
        path = inside(folder, name)
        if not path.is_file() or sha256_of(path) != expected:
            raise WeightsError(
                f"base_model.path: {path} is not the file that the model card {folder / CARD} tells of; restore the folder, or remove the "
                "card if you mean to use other weights"
            )


def check_scheduler(config: Mapping[str, Any], source: str) -> None:
    """Raise WeightsError, which begins with ``source``, for a scheduler whose noise levels training and sampling would not follow."""
    name = config.get("_class_name", SCHEDULER)
    if name != SCHEDULER:
        raise WeightsError(f"{source}: names the scheduler {name}, not {SCHEDULER}; give a model of SD3 or SD3.5")
    for key, supported in SCHEDULER_SETTINGS.items():
        if (value := config.get(key, supported)) != supported:
            raise WeightsError(
                f"{source}: {key} is {value}, training and sampling support {supported} alone; "
                "give a model of SD3 or SD3.5, or remove the key if this model was trained without it"
            )


def transformer_weights(folder: Path | str) -> int:
    """Number of weights of the transformer of a base model, by the headers of its files."""
    count = 0
    for path in Path(folder, "transformer").glob("*.safetensors"):
        if ".fp16" not in path.name:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def base_folder(path: Path | str) -> Path:
    """The base model's folder: ``path`` itself, or the folder that the JSON file ``path`` names."""
    path = Path(path)
    if path.is_dir():
        return path
    where = read_json(path)
    try:
        return check_base_model(where["folder"])
    except WeightsError as error:
        if "repo" not in where:
            raise
        raise WeightsError(f"{error}; delete {path} to have {where['repo']} fetched again") from None


def missing_parts(names: set[str]) -> list[str]:
    """Parts of a pipeline that are not among ``names`` (files and folders, relative to it)."""

    def weights(part: str) -> bool:
        return any(name.startswith(f"{part}/") and name.endswith(".safetensors") and ".fp16" not in name for name in names)

    return (
        [name for name in ("model_index.json", *COMPONENTS) if name not in names]
        or [f"{part}/{config}" for part, config in COMPONENTS.items() if f"{part}/{config}" not in names]
        or [f"{part}/*.safetensors" for part, config in COMPONENTS.items() if config == "config.json" and not weights(part)]
    )


def _read_config(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"base_model.path: {path} cannot be read as JSON ({error}); fetch or copy the model again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"base_model.path: {path} holds no JSON object; fetch or copy the model again")
    return content


def _check_length(path: Path) -> None:
    """Compare a safetensors file's length with that of its tensors by its header (8 bytes: length of the JSON that follows)."""
    found = path.stat().st_size
    with path.open("rb") as file:
        needed = 8 + int.from_bytes(file.read(8), "little")
        if needed > LARGEST_HEADER:
            raise WeightsError(f"base_model.path: {path} is no safetensors file (a Git LFS pointer?); fetch or copy the model again")
        if found >= needed:
            try:
                header = json.loads(file.read(needed - 8))
                needed += max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise WeightsError(f"base_model.path: the header of {path} is damaged; fetch or copy the model again") from None
    if found != needed:
        raise WeightsError(f"base_model.path: {path} has {found} bytes and its header needs {needed}; fetch or copy the model again")


def write_tensors(path: Path | str, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes follow from its content. The library itself writes metadata in random order, which would change
    the file's hash, and with it everything that depends on the hash."""
    from safetensors.torch import save_file  # with torch, and most of this module does without

    save_file(tensors, path, metadata=metadata)
    with Path(path).open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_torch_file(path: Path | str, name: str, remedy: str, mmap: bool = False) -> Any:
    """The content of a file of ``torch.save``, on the CPU: tensors, plain values and what ``torch.serialization.safe_globals`` allows.

    No code in the file is run. Raises WeightsError, which begins with ``name`` and ends with ``remedy``, when the file is missing, damaged
    or holds anything else.
    """
    import torch  # slow, and most of this module does without

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise WeightsError(f"{name}: there is no such file; {remedy}") from None
    except Exception as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds more than weights ({foreign[1]}) and is not loaded" if foreign else f"is damaged ({type(error).__name__})"
        raise WeightsError(f"{name}: {reason}; {remedy}") from None


def first_readable(paths: Iterable[Path], otherwise: str) -> Any:
    """The content of the first of these files that :func:`read_torch_file` reads, None without one; it reports each that it cannot
    read, and what is done ``otherwise``."""
    for path in paths:
        try:
            return read_torch_file(path, str(path), otherwise, mmap=True)
        except WeightsError as error:
            print(error, flush=True)
    return None


def read_state_dict(path: Path | str, name: str, remedy: str, mmap: bool = False) -> dict[str, Any]:
    """Tensors by name from a file of ``torch.save``; errors as of :func:`read_torch_file`, also when it holds anything else."""
    import torch

    found = read_torch_file(path, name, remedy, mmap)
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()):
        raise WeightsError(f"{name}: holds no state dict (names and tensors, nothing else); {remedy}")
    return dict(found)
