"""What a shard costs beside sampling: starting, loading, reading and writing.

    python benchmarks/sharding.py [--size tiny|middle] [--images N] [--steps S] [--shards N] [--folder DIR]

A generator, prompts and masks of the size of synthesis.py are made in a folder (random weights), then each shard is sampled by a process
of its own, as the workflow does it, one after the other on all of this machine's cores. The overhead is the share of the processes'
seconds that is not sampling. What does not grow with the number of images (start, hashes, loading) is set against 200 images as well.
With fewer steps than 23 the time of sampling is scaled to 23.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from synthesis import CLASSES, SIZES, STEPS, TEXT_TOKENS, Size, make

from crfm_core.data.rasters import write_raster
from crfm_core.files import sha256_of
from crfm_core.manifest import write_manifest
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.text.encoders import T5_LENGTH, Encoding, prompt_key, write_embedding, write_index

NAMES, CAPTION, TARGET = [f"class {index}" for index in range(CLASSES)], "a satellite image", 200
PLACE = "EPSG:32631", [0.3, 0.0, 5e5, 0.0, -0.3, 5e6]
SHARD = """
import sys
from pathlib import Path
from crfm_core.sampling.sampler import SamplerSpec
from crfm_core.sampling.shards import synthesise_shard
from crfm_core.settings import Sampler
world, shard, shards, steps, names = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5].split(",")
sampler = SamplerSpec("plain", Sampler(num_steps=steps, batch_size=2), world / "generator", names)
out = world / "synthetic" / "control" / f"plain{shards}" / f"shard-{shard}-of-{shards}.parquet"
synthesise_shard(sampler, world / "captions.parquet", world / "prompts.json", 1, 0, out, shard, shards)
"""


def make_world(folder: Path, size: Size, kind: str, images: int) -> None:
    """A dataset's folder with all that a shard reads."""
    pipeline, plain, _ = make(size, "cpu", torch.float32, kind)
    MaskToImagePipeline(
        pipeline.transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), plain.vae.requires_grad_(False), CLASSES
    ).save_pretrained(folder / "generator")
    widths = size.transformer["joint_attention_dim"], size.transformer["pooled_projection_dim"]
    embeds, pooled = torch.randn(TEXT_TOKENS, widths[0]), torch.randn(widths[1])
    encoding = Encoding("0" * 64, "float32", T5_LENGTH)
    for prompt in (CAPTION, ""):
        write_embedding(folder / "encoded" / encoding.store, prompt, encoding, embeds, pooled)
    write_index(folder / "prompts.json", (CAPTION, ""), encoding)
    rng, rows, side = np.random.default_rng(0), [], size.pixels
    for index in range(images):
        label = np.kron(rng.integers(CLASSES, size=(side // 32, side // 32)), np.ones((32, 32))).astype(np.uint8)
        path = folder / "labels" / f"t{index}.tif"
        write_raster(path, label, *PLACE)
        pixels = np.bincount(label.ravel(), minlength=CLASSES)
        rows.append({
            "tile_id": f"t{index}", "dataset": "d", "split": "train", "scene": "s", "row": 0, "col": 0, "width": side, "height": side,
            "image": f"labels/t{index}.tif", "label": f"labels/t{index}.tif", "crs": PLACE[0], "transform": PLACE[1],
            "classes": np.flatnonzero(pixels).tolist(), "pixels": pixels.tolist(), "digest": sha256_of(path),
            "caption": CAPTION, "prompt": prompt_key(CAPTION),
        })  # fmt: skip
    write_manifest(folder / "captions.parquet", rows)


def main(size_name: str, images: int, steps: int, shards: int, folder: Path) -> None:
    make_world(folder, SIZES[size_name], {"tiny": "tiny", "middle": "segformer_b0"}[size_name], images)
    whole, sampling, per_image = 0.0, 0.0, 0.0
    for shard in range(1, shards + 1):
        started = time.perf_counter()
        command = [sys.executable, "-c", SHARD, str(folder), str(shard), str(shards), str(steps), ",".join(NAMES)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        taken = time.perf_counter() - started
        line = next(line for line in said.splitlines() if "images sampled" in line)
        found = {name: float(value) for name, value in re.findall(r"(loading|sampling|input|output) ([\d.]+) s", line)}
        print(f"shard {shard} of {shards}: process {taken:.1f} s; {line}")
        whole, sampling = whole + taken, sampling + found["sampling"]
        per_image += found["input"] + found["output"]
    fixed = whole - sampling - per_image
    sampled = sampling * STEPS / steps
    print(f"{images} images: sampling {sampled:.1f} s" + (f" ({steps} steps, scaled to {STEPS})" if steps != STEPS else ""))
    print(f"  start, loading, manifests {fixed:.1f} s, waiting for reading and writing {per_image:.2f} s")
    print(f"  overhead at {images} images: {(fixed + per_image) / (fixed + per_image + sampled):.2%}")
    scale = TARGET / images
    beside = fixed + per_image * scale
    print(f"  overhead at {TARGET} images in {shards} shards: {beside / (beside + sampled * scale):.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "middle"], default="middle")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each image")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="kept afterwards; by default a temporary one")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(chosen.size, chosen.images, chosen.steps, chosen.shards, (chosen.folder or Path(temporary)).resolve() / "d")
