"""Prompts to embeddings as Stable Diffusion 3 makes them (CLIP-L, CLIP-G, T5), and the cache of embeddings by prompt.

Each distinct prompt is encoded once, in a batch of its own, so that an embedding never depends on other prompts. Embeddings lie in a
store, a folder with one safetensors file per prompt, ``embeds`` [T, D] and ``pooled`` [P], named by :func:`prompt_key` of its text. The
folder is named by the encoders, the dtype and T5's length, so all splits share it and after a change of captions only new ones are
encoded. A stage hands over an index: a JSON file with its prompts and the path of the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from crfm_core import DataError, WeightsError
from crfm_core.checkpoints import write_tensors
from crfm_core.files import atomic_path, hash_of, inside, read_json, require_disk, sha256_of, write_json

T5_LENGTH = 256
ENCODER_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
#: Files of a store that are kept open; they are mapped into memory, not read, so this limits handles and not memory.
OPEN_FILES = 256


class TextEncoders:
    """The three text encoders of an SD3 pipeline and their tokenizers."""

    def __init__(self, tokenizer, text_encoder, tokenizer_2, text_encoder_2, tokenizer_3, text_encoder_3) -> None:
        self.clips = ((tokenizer, text_encoder), (tokenizer_2, text_encoder_2))
        self.t5 = (tokenizer_3, text_encoder_3)
        self.clip_length = tokenizer.model_max_length  # 77 for SD3
        self.t5_length = min(T5_LENGTH, tokenizer_3.model_max_length)

    @classmethod
    def from_folder(cls, folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TextEncoders:
        """Load them from a diffusers pipeline folder. Raises WeightsError when one is missing or damaged."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        _require_parts(folder)
        kinds = (CLIPTokenizer, CLIPTextModelWithProjection) * 2 + (T5TokenizerFast, T5EncoderModel)
        parts = {}
        for name, kind in zip(ENCODER_PARTS, kinds, strict=True):
            place = Path(folder) / name
            weights = {"dtype": dtype, "use_safetensors": True} if "encoder" in name else {}
            try:
                part = kind.from_pretrained(place, local_files_only=True, **weights)
            except (OSError, ValueError, SafetensorError) as error:
                raise WeightsError(f"{place} cannot be loaded ({error}); fetch the model again") from None
            parts[name] = part.to(device).eval() if weights else part
        return cls(**parts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L₁ + L₂, D] and pooled embeddings [B, P] of prompts; for SD3 [B, 77 + 256, 4096] and [B, 2048].

        CLIP: the penultimate layer's states of both encoders side by side, padded with zeros to T5's width, and their pooled
        projections side by side. T5: the last layer's states, after CLIP's along the tokens. Prompts that are too long are truncated.
        """
        encoded = [
            encoder(_tokens(tokenizer, prompts, self.clip_length, encoder), output_hidden_states=True) for tokenizer, encoder in self.clips
        ]
        clip = torch.cat([one.hidden_states[-2] for one in encoded], dim=-1)
        tokenizer, encoder = self.t5
        t5 = encoder(_tokens(tokenizer, prompts, self.t5_length, encoder))[0]
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat([one.text_embeds for one in encoded], dim=-1)


def _tokens(tokenizer, prompts: Sequence[str], length: int, encoder) -> Tensor:
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.to(encoder.device)


def prompt_key(prompt: str) -> str:
    """The name of a prompt in the cache and in manifests, 16 hex digits."""
    return hash_of(prompt)[:16]


#: The empty prompt's name in every cache: trained with caption dropout, and the negative prompt of guidance.
NO_PROMPT = prompt_key("")


@dataclass(frozen=True)
class Encoding:
    """What an embedding depends on beside its text: the encoders' hash, the dtype's name, and the number of T5's tokens."""

    encoders: str
    dtype: str
    t5_length: int

    @classmethod
    def of(cls, folder: Path | str, dtype: torch.dtype) -> Encoding:
        """That of a pipeline folder's encoders, without loading them. Raises WeightsError when one is missing."""
        _require_parts(folder)
        length = read_json(Path(folder) / "tokenizer_3" / "tokenizer_config.json").get("model_max_length", T5_LENGTH)
        return cls(hash_of_encoders(folder), str(dtype).removeprefix("torch."), int(min(T5_LENGTH, length)))

    @property
    def store(self) -> str:
        """The name of the store's folder."""
        return f"{self.encoders[:16]}-{self.dtype}-{self.t5_length}"


def encode_prompts_file(
    base_folder: Path | str, prompts: Iterable[str], out: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Encode the distinct prompts among ``prompts``, and the empty one, by the encoders of a pipeline folder; write the index ``out``.

    Embeddings go to the store in the folder ``encoded`` beside ``out``, each as soon as it is made. Intact ones that exist are kept; when
    none is missing the encoders are not loaded.
    """
    distinct = set(prompts)
    if not distinct:
        raise DataError(f"{out}: no prompts to encode; the captions stage before it wrote none")
    texts = sorted(distinct | {""})
    encoding = Encoding.of(base_folder, dtype)
    store = Path(out).parent / "encoded" / encoding.store
    missing = [text for text in texts if not _is_stored(store, text, encoding)]
    print(f"{len(texts)} prompts, {len(texts) - len(missing)} of them already encoded", flush=True)
    encoders: Any = TextEncoders.from_folder(base_folder, device, dtype) if missing else None
    for number, text in enumerate(tqdm(missing, desc="prompts", disable=None)):
        if number and _is_stored(store, text, encoding):
            continue  # another split's job had the same prompt
        embeds, pooled = encoders.encode([text])
        path = write_embedding(store, text, encoding, embeds[0], pooled[0])
        if not number:
            require_disk(store, len(missing) * path.stat().st_size)
    write_index(Path(out), texts, encoding)


def write_index(out: Path, prompts: Iterable[str], encoding: Encoding) -> None:
    """Write the index ``out`` of prompts whose embeddings are in the store beside it."""
    keys = {prompt_key(prompt): prompt for prompt in prompts}
    write_json(out, {"store": f"encoded/{encoding.store}", **asdict(encoding), "prompts": keys})


def write_embedding(store: Path, prompt: str, encoding: Encoding, embeds: Tensor, pooled: Tensor) -> Path:
    """Write a prompt's embedding [T, D] and pooled one [P] into a store; return its file."""
    path = store / f"{prompt_key(prompt)}.safetensors"
    tensors = {"embeds": embeds.cpu().contiguous(), "pooled": pooled.cpu().contiguous()}
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, _label(prompt, encoding))
    return path


def _label(text: str, encoding: Encoding) -> dict[str, str]:
    """Metadata of a file of the store."""
    return {"prompt": text, **{name: str(value) for name, value in asdict(encoding).items()}}


def _open_embedding(path: Path, text: str, encoding: Encoding) -> safe_open:
    """The open file of a prompt's embedding. Raises DataError when it is missing, truncated or of another prompt."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable embedding of prompt {text!r} ({error})") from None
    if file.metadata() != _label(text, encoding) or set(file.keys()) != {"embeds", "pooled"}:
        raise DataError(f"{path}: not the embedding of prompt {text!r} by the encoders, dtype and length of its folder")
    return file


def _is_stored(store: Path, text: str, encoding: Encoding) -> bool:
    try:
        _open_embedding(store / f"{prompt_key(text)}.safetensors", text, encoding)
    except DataError:
        return False
    return True


def _require_parts(folder: Path | str) -> None:
    for name in ENCODER_PARTS:
        if not (Path(folder) / name).is_dir():
            raise WeightsError(f"{Path(folder) / name} is missing; the folder must be a diffusers pipeline with all three text encoders")


def hash_of_encoders(folder: Path | str) -> str:
    """Hash of the text encoders and tokenizers of a pipeline folder: equal ones give equal embeddings."""
    return sha256_of(*(Path(folder) / name for name in ENCODER_PARTS))


class PromptCache:
    """Embeddings by prompt of the index ``path``, read from their files on demand. ``prompts`` maps each key to its text.

    Raises DataError when the index, or a file of its store, is missing or damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        index = read_json(self.path)
        try:
            self.prompts, store = dict(index["prompts"]), index["store"]
            self._encoding = Encoding(index["encoders"], index["dtype"], index["t5_length"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: not an index of prompts; delete it and run the workflow again") from None
        self._store = inside(self.path.parent, store)
        self._file = lru_cache(OPEN_FILES)(self._open)
        if missing := [key for key in self.prompts if not self._path(key).is_file()]:
            raise DataError(f"{self._path(missing[0])}: missing, of {self.path}; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"delete {self.path} and run the workflow again, it encodes what is missing"

    @property
    def tokens(self) -> int:
        """Tokens T of an embedding."""
        return self._file(next(iter(self.prompts))).get_slice("embeds").get_shape()[0]

    def check(self, base: Path | str) -> None:
        """Raise DataError unless the text encoders of the pipeline folder ``base`` made these embeddings."""
        if self._encoding.encoders != hash_of_encoders(base):
            raise DataError(f"{self.path}: embeddings of other text encoders than those of {base}; delete it and run the workflow again")

    def take(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D] and pooled embeddings [B, P] of the prompts with these keys. Raises DataError naming unknown keys or the
        unreadable file."""
        unknown = [key for key in keys if key not in self.prompts]
        if unknown:
            raise DataError(f"{self.path}: no embedding of prompt {', '.join(unknown[:5])}; delete the file and run the workflow again")
        embeds, pooled = (torch.stack([self._file(key).get_tensor(part) for key in keys]) for part in ("embeds", "pooled"))
        return embeds, pooled

    def _path(self, key: str) -> Path:
        return self._store / f"{key}.safetensors"

    def _open(self, key: str) -> safe_open:
        try:
            return _open_embedding(self._path(key), self.prompts[key], self._encoding)
        except DataError as error:
            raise DataError(f"{error}; {self._remedy}") from None
