"""Captions by a vision-language model: each image is captioned once, and the answers are kept.

Any model of transformers for image and text to text, from a folder with its weights in safetensors. Decoding is greedy, so an image
gets the same caption each time; prompts in a batch are padded on the left, so neighbours change nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crfm_core import DataError, ResourceError, WeightsError
from crfm_core.data.rasters import hash_of_pixels, read_rgb
from crfm_core.devices import compute_dtype
from crfm_core.files import exclusive, hash_of, sha256_of
from crfm_core.settings import CaptionModel
from crfm_core.text.model_folder import LOAD_OPTIONS, check_folder, first_line, is_model_file, load_model, loading

#: The section of the configuration that messages name.
CAPTION_KEY = "captions.model"


def hash_of_model(folder: Path) -> str:
    """Hash of all files of the model."""
    return hash_of({path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file() and is_model_file(path.name)})


def describe_images(
    names: Sequence[str],
    images: Sequence[Path],
    digests: Sequence[str] | None,
    folder: Path,
    settings: CaptionModel,
    answers: Path,
    part: str,
    device: str = "cpu",
) -> list[str]:
    """The answer of the model in ``folder`` about each image, on one line, in their order.

    Answers are saved under ``answers`` by model, prompt, length and image as soon as they are made, so a stopped run continues, and images
    that occur twice, in other parts too, are captioned once. When no answer is missing the model is not loaded.

    Args:
        names: for messages.
        images: files as :func:`crfm_core.data.rasters.read_rgb` reads them.
        digests: hashes of their pixels; None: they are computed.
        part: name of this caller's part of the answers; callers with different parts may run side by side.

    Raises DataError naming the image whose answer is empty, and WeightsError or ResourceError when the model cannot be loaded or run.
    """
    folder, images = check_folder(folder, CAPTION_KEY), list(images)
    answers = Path(answers) / hash_of(hash_of_model(folder), settings.prompt, settings.max_new_tokens)[:16]
    digests = [hash_of_pixels(read_rgb(path)) for path in tqdm(images, "hashes", disable=None)] if digests is None else list(digests)
    with exclusive(answers / part):
        known = read_answers(answers)
        first = {digest: index for index, digest in reversed(list(enumerate(digests)))}  # of several with the same pixels
        missing = sorted(index for digest, index in first.items() if digest not in known)
        print(f"{len(first)} images, {len(first) - len(missing)} of them already captioned", flush=True)
        if missing:
            model = VisionLanguageModel.from_folder(folder, device)
        with tqdm(total=len(missing), desc="captions", unit="image", disable=None) as progress:
            for start in range(0, len(missing), settings.batch_size):
                batch = missing[start : start + settings.batch_size]
                answered = model.answer([read_rgb(images[index]) for index in batch], settings.prompt, settings.max_new_tokens)
                new = {digests[index]: answer for index, answer in zip(batch, answered, strict=True) if answer}
                keep_answers(answers / part / "answers.jsonl", new)
                if empty := [names[index] for index, answer in zip(batch, answered, strict=True) if not answer]:
                    raise DataError(
                        f"{folder} gives an empty answer about tile {', '.join(empty)}; set another captions.model.prompt or model"
                    )
                known |= new
                progress.update(len(batch))
    return [known[digest] for digest in digests]


def read_answers(folder: Path) -> dict[str, str]:
    """The saved answers of all parts, by the image's digest. A line that a killed job left unfinished is skipped."""
    known = {}
    for path in sorted(Path(folder).glob("*/answers.jsonl")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                known[entry["image"]] = entry["caption"]
    return known


def keep_answers(path: Path, answers: Mapping[str, str]) -> None:
    """Append answers to a file of JSON lines, and wait for the disk."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # end the line that a killed job left unfinished
                file.write(b"\n")
        file.write("".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in answers.items()).encode())
        file.flush()
        os.fsync(file.fileno())


class VisionLanguageModel:
    """A model for image and text to text, with the processor that makes its inputs."""

    def __init__(self, model, processor, folder: Path) -> None:
        self.model, self.processor, self.folder = model, processor, folder
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # an answer continues the prompt
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_folder(cls, folder: Path | str, device: str = "cpu") -> VisionLanguageModel:
        """Load it without running code from the folder, in float32 on the CPU and bfloat16 on a GPU.

        Raises WeightsError when the folder holds no such model, lacks weights, or needs software that is not installed.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

        folder = check_folder(folder, CAPTION_KEY)
        with loading(folder, CAPTION_KEY, "a model for image and text to text"):
            processor = AutoProcessor.from_pretrained(folder, **LOAD_OPTIONS)
            model = load_model(AutoModelForImageTextToText, folder, CAPTION_KEY, compute_dtype(device))
        if not isinstance(processor, ProcessorMixin):
            raise WeightsError(f"{CAPTION_KEY}: {folder} has no processor for image and text; give a folder with processor_config.json")
        return cls(model.to(device), processor, folder)

    def answer(self, images: Sequence[np.ndarray], prompt: str, max_new_tokens: int) -> list[str]:
        """The model's answers to ``prompt`` about each of the images, uint8 [H,W,3]; white space becomes single spaces.

        Raises WeightsError when prompt and images do not go together for this model, ResourceError when memory does not suffice.
        """
        import torch
        from PIL import Image

        lengths = []  # of prompt and answer after each step; what goes before the first new token is not always the prompt

        def note_length(tokens, scores, **_):
            lengths.append(tokens.shape[1])
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)  # never stops the generation

        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "stopping_criteria": [note_length]}
        try:
            with torch.inference_mode():
                inputs = self._inputs([Image.fromarray(image) for image in images], prompt).to(self.model.device, self.model.dtype)
                tokens = self.model.generate(**inputs, **options)
                texts = self.processor.batch_decode(tokens[:, lengths[0] - 1 :], skip_special_tokens=True)
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"captions.model.batch_size: {first_line(error)}; lower it, or take a smaller model") from None
        except (ValueError, IndexError, TypeError) as error:
            raise WeightsError(
                f"captions.model.prompt: {self.folder} cannot take the prompt with an image ({first_line(error)}); a model without a chat "
                "template may need its placeholder of the image in the prompt, such as <image>"
            ) from None
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: list, prompt: str):
        padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.processor.chat_template is None:
            return self.processor(images=images, text=[prompt] * len(images), **padding)
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}] for image in images],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs=padding,
        )
