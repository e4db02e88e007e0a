"""Small tiles that a segmentor can learn: the colour of a pixel tells its class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crfm_core.data.rasters import write_raster
from crfm_core.files import sha256_of
from crfm_core.manifest import write_manifest
from crfm_core.segmentor.mmseg import architectures

CLASSES = ["soil", "water", "wood"]
PALETTE = [(150, 110, 70), (30, 60, 120), (40, 120, 40)]


def write_tiles(
    manifest: Path, count: int, size: int = 32, seed: int = 0, prefix: str = "t", georeferenced: bool = False, **columns
) -> Path:
    """Write tiles of 8-pixel blocks of random classes, a tenth ignored, and their manifest; return its path."""
    rng = np.random.default_rng(seed)
    crs, transform = ("EPSG:32631", [0.3, 0.0, 5e5, 0.0, -0.3, 5e6]) if georeferenced else ("", [])
    suffix = ".tif" if georeferenced else ".png"
    rows = []
    for i in range(count):
        label = np.kron(rng.integers(len(CLASSES), size=(size // 8, size // 8)), np.ones((8, 8))).astype(np.uint8)
        image = np.clip(np.array(PALETTE)[label] + rng.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
        label[rng.random(label.shape) < 0.1] = 255
        name = f"{prefix}{i}"
        paths = {kind: f"{manifest.stem}/{kind}s/{name}{suffix}" for kind in ("image", "label")}
        write_raster(manifest.parent / paths["image"], image, crs or None, transform or None)
        write_raster(manifest.parent / paths["label"], label, crs or None, transform or None)
        pixels = np.bincount(label[label != 255], minlength=len(CLASSES))
        rows.append({
            "tile_id": name, "dataset": "d", "split": "train", "scene": "s", "row": 0, "col": i * size, "width": size, "height": size,
            **paths, "crs": crs, "transform": transform, "classes": np.flatnonzero(pixels).tolist(), "pixels": pixels.tolist(),
            "digest": sha256_of(*(manifest.parent / path for path in paths.values())),
            **{column: values[i] for column, values in columns.items()},
        })  # fmt: skip
    write_manifest(manifest, rows)
    return manifest


def with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let segformer_tiny drop out, so that randomness inside the network is part of what a test claims."""
    monkeypatch.setitem(
        architectures.ARCHITECTURES, "segformer_tiny", lambda k: architectures._segformer(k, 16, [1, 1, 1, 1], [1, 2, 4, 8], 32, drop=0.2)
    )


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, hook: type, iteration: int) -> Iterator[None]:
    """Within it training ends, as by Ctrl-C, when ``hook`` is done with its iteration (counted from 1)."""
    done = hook.after_train_iter

    def stop(self, runner, batch_idx, *args, **kwargs):
        done(self, runner, batch_idx, *args, **kwargs)
        if batch_idx == iteration - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hook, "after_train_iter", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
