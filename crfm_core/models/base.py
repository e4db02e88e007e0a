"""The base model: at full scale SD3.5-medium, at the embedded scale a tiny pipeline folder of the same classes.

Everything after this stage reads a diffusers pipeline folder and does not know which of the two it got.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn import functional as F
from tqdm import tqdm

from crfm_core import WeightsError
from crfm_core.checkpoints import first_readable
from crfm_core.data.rasters import read_label, read_rgb
from crfm_core.files import atomic_path, hash_of, work_folder
from crfm_core.manifest import paths_of, read_manifest
from crfm_core.models.latent_space import encode_mask_levels
from crfm_core.settings import EmbeddedBase, EmbeddedVAE

#: Training steps of the autoencoder between checkpoints to resume from.
CHECKPOINT_EVERY = 100


def build_base_model(
    manifest: Path, root: Path, num_classes: int, captions: list[str], settings: EmbeddedBase, out: Path, work: Path
) -> None:
    """Build the embedded base model from the training tiles and write it as a pipeline folder.

    The autoencoder is trained on the tiles (and on their masks as grey images, which it will have to encode too); the
    transformer and the text encoders are initialised, not trained: the generator's stage trains what it needs.

    Args:
        manifest: training tiles; all of one size divisible by the autoencoder's shrinking factor.
        root: folder that the manifest's paths must stay in.
        num_classes: K, for the grey levels of the masks.
        captions: texts whose words the vocabularies hold; the longest sets the encoders' length.
        settings: sizes and lengths.
        out: the folder to write.
        work: folder of resumable state.
    """
    table = read_manifest(manifest)
    images = np.stack([read_rgb(path) for path in paths_of(manifest, table, "image", root)])
    labels = np.stack([read_label(path) for path in paths_of(manifest, table, "label", root)])
    fingerprint = hash_of(settings.model_dump(), sorted(table.digest), num_classes)
    with work_folder(work, fingerprint) as state:
        vae = train_autoencoder(images, labels, num_classes, settings.vae, settings.seed, state)
        components = _text_components(captions, settings) | {
            "vae": vae,
            "transformer": _transformer(images.shape[1], settings),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
        with atomic_path(out) as temporary:
            StableDiffusion3Pipeline(**components).save_pretrained(temporary)


def autoencoder(settings: EmbeddedVAE) -> AutoencoderKL:
    """The untrained small autoencoder: 2^(levels-1)x down, SD3's layout (no quantisation convolutions).

    It has to learn in a minute, so normalisation runs over all channels at once (in small groups it would remove the colours
    that the image is made of) and every residual block starts as the identity.
    """
    levels = len(settings.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(settings.channels),
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


def train_autoencoder(
    images: np.ndarray, labels: np.ndarray, num_classes: int, settings: EmbeddedVAE, seed: int, work: Path
) -> AutoencoderKL:
    """Train the small autoencoder on random flipped and turned crops; resumes from ``work`` when it holds a checkpoint.

    Loss: L1 plus L1 of the image gradients (without it the textures that tell classes apart blur away), a weak KL term.
    At the end the latents' mean and spread over the training tiles become ``shift_factor`` and ``scaling_factor``.

    Args:
        images: uint8 [N,H,W,3].
        labels: uint8 [N,H,W].
    """
    torch.manual_seed(seed)
    vae = autoencoder(settings).to(memory_format=torch.channels_last).train()
    grey = encode_mask_levels(torch.from_numpy(labels.astype(np.int64)), num_classes)
    pixels = torch.cat([torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, grey.float()])
    is_mask = len(images)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=0.15)
    checkpoint = work / "autoencoder.pt"
    start = 0
    if state := first_readable([checkpoint] if checkpoint.is_file() else [], "training begins anew"):
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    for step in tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc="autoencoder", disable=None):
        # the step's randomness depends on the step alone, so a resumed run continues as if never stopped
        rng = np.random.default_rng([seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = _crops(pixels, is_mask, settings.batch_size, rng)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        gradients = sum(F.l1_loss(decoded.diff(dim=d), batch.diff(dim=d)) for d in (-1, -2))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(decoded, batch) + 0.5 * gradients + 1e-4 * kl
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if not math.isfinite(loss.item()):
            raise WeightsError(f"autoencoder: loss is {loss.item()} at step {step}; lower base_model.vae.learning_rate")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            print(f"autoencoder step {step + 1}/{settings.steps} loss {loss.item():.4f}", flush=True)
            state = {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(), "step": step + 1}
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)
    vae.eval().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels[:is_mask].split(16)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def _crops(pixels: torch.Tensor, is_mask: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    """``count`` half-size crops, flipped and turned; one in eight is a mask, the others change their light and tint (the training
    tiles come from few scenes, and the autoencoder has to keep the colours of others too)."""
    side = pixels.shape[-1] // 2
    chosen = []
    for index in range(count):
        source = rng.integers(is_mask, len(pixels)) if index % 8 == 7 else rng.integers(is_mask)
        top, left = rng.integers(pixels.shape[-2] - side + 1), rng.integers(pixels.shape[-1] - side + 1)
        crop = pixels[source, :, top : top + side, left : left + side]
        crop = torch.rot90(crop, int(rng.integers(4)), (1, 2))
        if source < is_mask:
            gain = torch.from_numpy(rng.uniform(0.75, 1.25, (3, 1, 1)).astype(np.float32))
            crop = ((crop + 1) * gain - 1).clamp(-1, 1)
        chosen.append(crop.flip(-1) if rng.integers(2) else crop)
    return torch.stack(chosen).contiguous(memory_format=torch.channels_last)


def _transformer(tile: int, settings: EmbeddedBase) -> SD3Transformer2DModel:
    """An SD3 transformer with dual attention in its first half (as SD3.5-medium) and qk-norm, initialised as DiT is: Xavier weights and
    closed gates, so that every block starts as the identity."""
    sizes, levels = settings.transformer, len(settings.vae.channels)
    latent, largest = (side // 2 ** (levels - 1) for side in (tile, settings.transformer.largest_tile or tile))
    width = sizes.heads * sizes.head_dim
    torch.manual_seed(settings.seed + 1)
    model = SD3Transformer2DModel(
        sample_size=latent,
        patch_size=sizes.patch_size,
        in_channels=settings.vae.latent_channels,
        out_channels=settings.vae.latent_channels,
        num_layers=sizes.layers,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=2 * sizes.text_dim,
        caption_projection_dim=width,
        pooled_projection_dim=2 * sizes.text_dim,
        pos_embed_max_size=largest // sizes.patch_size,
        dual_attention_layers=tuple(range(sizes.layers // 2)),
        qk_norm="rms_norm",
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            torch.nn.init.zeros_(module.weight)
    return model


def _text_components(captions: list[str], settings: EmbeddedBase) -> dict[str, object]:
    """Two tiny CLIP text encoders and a tiny T5 encoder with tokenizers whose vocabulary holds the captions' words whole.

    T5 reads a word with its comma as one token and, unless told otherwise, takes the longest caption; the CLIPs read it apart and cut
    what is longer, as those of SD3.5 do at 77 tokens. Every token costs training time.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    width = settings.transformer.text_dim
    known = [*captions, *settings.transformer.words]
    words = sorted({word for text in known for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    spaced = sorted({word for text in known for word in text.split()} | set(words))
    length = settings.transformer.text_length or max(len(text.split()) for text in captions) + 1  # and the end token
    vocabulary, merges = _clip_vocabulary(words)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(piece, -1.0) for word in spaced for piece in (f"▁{word}", word)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-" if letter not in spaced]
    torch.manual_seed(settings.seed + 2)
    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=length,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    t5 = T5Config(
        vocab_size=len(pieces), d_model=2 * width, d_kv=width, d_ff=2 * width, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length),
        "tokenizer_2": CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length),
        "tokenizer_3": T5Tokenizer(vocab=pieces, extra_ids=0, additional_special_tokens=[], model_max_length=length),
        "text_encoder": CLIPTextModelWithProjection(clip).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(clip).eval(),
        "text_encoder_3": T5EncoderModel(t5).eval(),
    }


def _clip_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level vocabulary and merges under which each word becomes one token and any other text still has tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    tokens, merges = symbols + [f"{symbol}</w>" for symbol in symbols], []
    for word in words:
        spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        letters = [*spelled[:-1], f"{spelled[-1]}</w>"]
        built = letters[0]
        for letter in letters[1:]:
            if (built, letter) not in merges:
                merges.append((built, letter))
                tokens.append(built + letter)
            built += letter
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: index for index, token in enumerate(tokens)}, merges
