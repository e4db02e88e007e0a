"""Prompts to embeddings as Stable Diffusion 3 makes them (CLIP-L, CLIP-G, T5), and the cache of embeddings by prompt.

Each distinct prompt is encoded once, by itself, so that an embedding never depends on what else was encoded with it. The
cache is one safetensors file: ``{key}.embeds`` [T, D] and ``{key}.pooled`` [P] per prompt, with ``key`` = :func:`prompt_key`
of its text; the file's metadata holds the texts and the hash of the encoders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from crfm_core import DataError, WeightsError
from crfm_core.files import atomic_path, hash_of, sha256_of

T5_LENGTH = 256
PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")


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

        kinds = (CLIPTokenizer, CLIPTextModelWithProjection) * 2 + (T5TokenizerFast, T5EncoderModel)
        parts = {}
        for name, kind in zip(PARTS, kinds, strict=True):
            place = Path(folder) / name
            if not place.is_dir():
                raise WeightsError(f"{place} is missing; the folder must be a diffusers pipeline with all three text encoders")
            loading = {"dtype": dtype, "use_safetensors": True} if "encoder" in name else {}
            try:
                part = kind.from_pretrained(place, local_files_only=True, **loading)
            except (OSError, ValueError, SafetensorError) as error:
                raise WeightsError(f"{place} cannot be loaded ({error}); fetch the model again") from None
            parts[name] = part.to(device).eval() if "encoder" in name else part
        return cls(**parts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L₁ + L₂, D] and pooled embeddings [B, P] of prompts; for SD3 [B, 77 + 256, 4096] and [B, 2048].

        CLIP: the penultimate layer's states of both encoders side by side, padded with zeros to T5's width, and their pooled
        projections side by side. T5: the last layer's states, after CLIP's along the tokens. Too long prompts are cut.
        """
        states, pooled = zip(*(self._clip(tokenizer, encoder, prompts) for tokenizer, encoder in self.clips), strict=True)
        tokenizer, encoder = self.t5
        t5 = encoder(_tokens(tokenizer, prompts, self.t5_length, encoder))[0]
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)

    def _clip(self, tokenizer, encoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = encoder(_tokens(tokenizer, prompts, self.clip_length, encoder), output_hidden_states=True)
        return encoded.hidden_states[-2], encoded.text_embeds


def _tokens(tokenizer, prompts: Sequence[str], length: int, encoder) -> Tensor:
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.to(encoder.device)


def prompt_key(prompt: str) -> str:
    """The name of a prompt in the cache and in manifests, 16 hex digits."""
    return hash_of(prompt)[:16]


#: The empty prompt's name in every cache: what generators are trained with caption dropout on, and guidance leads away from.
NO_PROMPT = prompt_key("")


def encode_prompts_file(
    base_folder: Path | str, prompts: Iterable[str], out: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Encode the distinct prompts among ``prompts``, and the empty one, by the encoders of a pipeline folder; write the cache ``out``."""
    distinct = set(prompts)
    if not distinct:
        raise DataError(f"{out}: no prompts to encode; the captions stage before it wrote none")
    distinct = sorted(distinct | {""})
    encoders = TextEncoders.from_folder(base_folder, device, dtype)
    tensors = {}
    for prompt in tqdm(distinct, desc="prompts", disable=None):
        embeds, pooled = encoders.encode([prompt])
        key = prompt_key(prompt)
        tensors[f"{key}.embeds"], tensors[f"{key}.pooled"] = embeds[0].cpu().contiguous(), pooled[0].cpu().contiguous()
    with atomic_path(out) as aside:
        texts = {prompt_key(prompt): prompt for prompt in distinct}
        save_file(tensors, aside, metadata={"prompts": json.dumps(texts), "encoders": hash_of_encoders(base_folder)})


def hash_of_encoders(folder: Path | str) -> str:
    """Hash of the text encoders and tokenizers of a pipeline folder: equal ones give equal embeddings."""
    return sha256_of(*(Path(folder) / name for name in PARTS))


class PromptCache:
    """Embeddings by prompt, read from the file when asked for. ``prompts`` maps each key to its text."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not a readable prompt cache ({error}); delete it and run the workflow again") from None
        metadata = self._file.metadata() or {}
        self.prompts, self._encoders = json.loads(metadata.get("prompts", "{}")), metadata.get("encoders")

    @property
    def tokens(self) -> int:
        """Tokens T of an embedding."""
        return self._file.get_slice(f"{next(iter(self.prompts))}.embeds").get_shape()[0]

    def check(self, base: Path | str) -> None:
        """Raise DataError unless the text encoders of the pipeline folder ``base`` made these embeddings."""
        if self._encoders != hash_of_encoders(base):
            raise DataError(f"{self.path}: embeddings of other text encoders than those of {base}; delete it and run the workflow again")

    def take(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D] and pooled embeddings [B, P] of the prompts with these keys. Raises DataError naming unknown keys."""
        unknown = [key for key in keys if key not in self.prompts]
        if unknown:
            raise DataError(f"{self.path}: no embedding of prompt {', '.join(unknown[:5])}; delete the file and run the workflow again")
        return tuple(torch.stack([self._file.get_tensor(f"{key}.{part}") for key in keys]) for part in ("embeds", "pooled"))


def read_prompts(path: Path | str) -> PromptCache:
    """Open the prompt cache ``path``. Raises DataError when it is missing or damaged."""
    return PromptCache(path)
