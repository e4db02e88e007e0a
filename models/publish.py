"""Write models/embedded from a finished pre-training (configs/pretraining.yaml): the exported pipeline in 16 bits, its log and its card.

python models/publish.py results/countries models/embedded
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from crfm_core.checkpoints import CARD
from crfm_core.files import atomic_path, read_json, sha256_of, write_json, write_text

CONTROL = "pretraining"


def publish(results: Path, out: Path) -> None:
    """Write the folder ``out`` from the results of the dataset ``countries``; it appears whole or not at all."""
    record = read_json(results / "generators" / CONTROL / "training.json")
    log = (results.parent / "logs" / results.name / f"train_generator-{CONTROL}.log").read_text(encoding="utf-8")
    losses = re.findall(r"^generator step (\d+)/\d+ loss ([\d.]+)", log, re.MULTILINE)
    with atomic_path(out) as folder:
        pipeline = StableDiffusion3Pipeline.from_pretrained(results / "exports" / CONTROL)
        pipeline.to(torch.float16).save_pretrained(folder)
        for path in folder.rglob("*.json"):  # where the pipeline was on this machine is of no use
            if read_json(path).pop("_name_or_path", None):
                write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})
        write_text(folder / "training.csv", "step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
        made = {"control": record["control"], "held_out": record["validation"], "versions": {"torch": str(torch.__version__)}}
        write_json(folder / CARD, {"sha256": {name: sha256_of(folder / name) for name in files}, **made})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results of the dataset countries")
    parser.add_argument("out", type=Path, help="folder to write")
    publish(**vars(parser.parse_args()))
