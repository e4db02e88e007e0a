"""Tiny models of transformers that describe images, in folders as the hub has them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

PROMPT = "describe this satellite image"


WORDS = ["road", "water", "forest", "field", "house\n\n", "river", "tree", "grey", "green", "blue", "wide", "with", "and", *PROMPT.split()]


#: As chat templates are written: a turn of the user, with the image's sign, then the beginning of the answer.
CHAT = (
    "{% for turn in messages %}{{ turn.role }} {% for part in turn.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, between begin and end for models without chat; padded on the wrong side unless told otherwise."""
    known = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user", "assistant", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="right",
    )  # fmt: skip


def language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> Path:
    """Write a model's folder; it never says the image's sign, as a trained one would not."""
    model.generation_config.suppress_tokens = [4]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_llava(folder: Path, seed: int = 0, chat: str | None = CHAT) -> Path:
    """Every image is scaled to 16x16 pixels and becomes four tokens."""
    tokenizer = word_tokenizer()
    seen = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16)
    config = LlavaConfig(vision_config=seen, text_config=language_model(tokenizer), image_token_index=4, vision_feature_layer=-1)
    scale = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        scale, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=chat
    )
    torch.manual_seed(seed)
    return save(LlavaForConditionalGeneration(config), processor, folder)


def write_idefics3(folder: Path) -> Path:
    """Images are cut into parts of 32x32 pixels, as many as they have, so prompts differ in length."""
    tokenizer = word_tokenizer()
    cut = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(cut, tokenizer, image_seq_len=4, chat_template=CHAT)
    config = Idefics3Config(
        vision_config=SIZES | {"image_size": 32, "patch_size": 8}, text_config=language_model(tokenizer), image_token_id=4,
        scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(Idefics3ForConditionalGeneration(config), processor, folder)


def write_blip(folder: Path) -> Path:
    """No chat template, tied weights, and generation that drops the prompt's end."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    text = SIZES | {
        "hidden_size": 32, "encoder_hidden_size": 16, "vocab_size": len(tokenizer), "projection_dim": 16, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5,
    }  # fmt: skip
    seen = SIZES | {"image_size": 16, "patch_size": 8, "initializer_range": 0.5}
    config = BlipConfig(text_config=text, vision_config=seen, projection_dim=16, image_text_hidden_size=16)
    torch.manual_seed(3)
    scale = BlipImageProcessorPil(size={"height": 16, "width": 16})
    return save(BlipForConditionalGeneration(config), BlipProcessor(scale, tokenizer), folder)
