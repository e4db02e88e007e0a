"""Indices of prompts with embeddings that no encoder made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from crfm_core.files import hash_of
from crfm_core.text.encoders import Encoding, write_embedding, write_index


def write_prompts(embeddings: Mapping[str, tuple[Tensor, Tensor]], out: Path, encoders: str | None = None) -> None:
    """Write embeddings ([T, D], [P]) by text as the index ``out`` and its store; ``encoders`` is the hash of what they pass for."""
    numbers = {text: [part.tolist() for part in parts] for text, parts in embeddings.items()}
    encoding = Encoding(encoders or hash_of(numbers), "float32", 256)
    for text, parts in embeddings.items():
        write_embedding(out.parent / "encoded" / encoding.store, text, encoding, *parts)
    write_index(out, embeddings, encoding)
