"""Tiny CLIP-like models of the kinds that transformers has, in folders as the hub has them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

LENGTH = 8  # tokens, with begin and end
WORDS = ["road", "water", "forest", "field", "house"]
END = 3 + len(WORDS)  # the highest, as it is in CLIP
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, between begin and end."""
    known = ["<pad>", "<s>", "<unk>", *WORDS, "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """With weights far enough from nothing that different inputs give different features."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model


def write_clip(folder: Path) -> Path:
    tokenizer = word_tokenizer()
    text = SIZES | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
    }
    config = CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 16, "patch_size": 8}, projection_dim=12)
    scrambled(CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_siglip(folder: Path) -> Path:
    tokenizer = word_tokenizer()
    text = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config=SIZES | {"image_size": 16, "patch_size": 8})
    scrambled(SiglipModel(config)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
