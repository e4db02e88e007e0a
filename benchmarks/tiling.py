"""Tiles per second: ours against gdal_retile.py and against a loop over torchgeo's GridGeoSampler that saves its chips.

    python benchmarks/tiling.py --side 10000 --rounds 5 --torchgeo /path/to/python    # of an environment with torchgeo

An RGB scene with labels (invented landscape, mirrored to size) is cut into 512x512 GeoTIFFs, images and labels, compressed alike
(deflate at its default level, with a horizontal predictor for images). Each contender is a process of its own, whose time includes its
start and imports; they take turns, so that a round's ratio compares neighbours in time. Memory is the greatest sum over a contender's
processes of what each holds alone plus its part of what they share (PSS), sampled every 50 ms in a round of its own, whose times do not
count, as looking takes a good part of a core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio

SIZE = 512
IMAGE, LABEL = ("COMPRESS=DEFLATE", "PREDICTOR=2"), ("COMPRESS=DEFLATE",)


def write_scene(folder: Path, side: int) -> None:
    """Write ``image.tif`` and ``label.tif`` of ``side`` x ``side`` pixels, tiled and compressed as such scenes are delivered."""
    from crfm_core.data.sources.embedded import draw_scene

    part = min(side, 1000)
    arrays = draw_scene(3, part)
    across = -(-side // part)
    for name, array in zip(("image", "label"), arrays, strict=True):
        lines = [[array[:: -1 if (i + j) % 2 else 1, :: -1 if j % 3 else 1] for j in range(across)] for i in range(across)]
        whole = np.concatenate([np.concatenate(line, axis=1) for line in lines])[:side, :side]
        bands = whole[None] if whole.ndim == 2 else np.moveaxis(whole, -1, 0)
        profile = {"driver": "GTiff", "count": len(bands), "height": side, "width": side, "dtype": "uint8", "crs": "EPSG:32631"}
        profile |= {"transform": rasterio.Affine(0.3, 0, 4e5, 0, -0.3, 5e6), "compress": "deflate", "tiled": True}
        with rasterio.open(folder / f"{name}.tif", "w", blockxsize=512, blockysize=512, **profile) as target:
            target.write(bands)


# ------------------------------------------------------------------------------------------------------------ contenders


def ours(scene: Path, out: Path, processes: int) -> dict:
    from crfm_core.data.tiling import tile_scene
    from crfm_core.manifest import write_manifest

    begun = time.perf_counter()
    rows = tile_scene(scene / "image.tif", scene / "label.tif", out / "tiles", SIZE, num_classes=7, edge="pad", processes=processes)
    write_manifest(out / "tiles.parquet", rows)
    return {"tiles": len(rows), "call": time.perf_counter() - begun}


def torchgeo(scene: Path, out: Path) -> dict:
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler, Units

    class Images(RasterDataset):
        filename_glob = "image.tif"

    class Labels(RasterDataset):
        filename_glob = "label.tif"
        is_image = False

    begun = time.perf_counter()
    chips = Images(scene) & Labels(scene)
    sampler = GridGeoSampler(chips, size=SIZE, stride=SIZE, units=Units.PIXELS)
    out.mkdir()
    for number, place in enumerate(sampler):
        chip = chips[place]
        left, top = place[0].start, place[1].stop
        profile = {"driver": "GTiff", "height": SIZE, "width": SIZE, "dtype": "uint8", "crs": chips.crs, "compress": "deflate"}
        profile["transform"] = rasterio.Affine(0.3, 0, left, 0, -0.3, top)
        for kind, options in (("image", {"photometric": "RGB", "predictor": 2}), ("mask", {})):
            bands = chip[kind].numpy().astype(np.uint8)
            bands = bands if bands.ndim == 3 else bands[None]
            with rasterio.open(out / f"{kind}_{number}.tif", "w", count=len(bands), **profile, **options) as target:
                target.write(bands)
    return {"tiles": number + 1, "call": time.perf_counter() - begun}


def gdal_retile(scene: Path, out: Path) -> list[list[str]]:
    """Its command lines: one for the image, one for the labels."""
    commands = []
    for name, options in (("image", IMAGE), ("label", LABEL)):
        (out / name).mkdir(parents=True)
        flags = [flag for option in options for flag in ("-co", option)]
        commands.append(
            ["gdal_retile.py", "-q", "-ps", str(SIZE), str(SIZE), *flags, "-targetDir", str(out / name), str(scene / f"{name}.tif")]
        )
    return commands


# ------------------------------------------------------------------------------------------------------------- measuring


def timed(commands: list[list[str]]) -> dict:
    """Run commands one after the other: seconds, and what the last one printed as JSON, if it did."""
    begun = time.perf_counter()
    for command in commands:
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {"seconds": time.perf_counter() - begun}
    return found | (json.loads(said.splitlines()[-1]) if said.strip().startswith("{") else {})


def peak_memory(commands: list[list[str]]) -> float:
    """Run commands one after the other: the greatest memory in MB."""
    import psutil

    peak = 0
    for command in commands:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            family = psutil.Process(process.pid)
            while process.poll() is None:
                total = 0
                for one in [family, *_children(family)]:
                    try:
                        total += one.memory_full_info().pss
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue
                peak = max(peak, total)
                time.sleep(0.05)
    return peak / 1e6


def _children(process) -> list:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=10_000, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchgeo", help="python of an environment with torchgeo; none: leave it out")
    parser.add_argument("--one", nargs=4, metavar=("WHO", "SCENE", "OUT", "PROCESSES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, scene, out, processes = options.one
        print(json.dumps(ours(Path(scene), Path(out), int(processes)) if who == "ours" else torchgeo(Path(scene), Path(out))))
        return
    with tempfile.TemporaryDirectory() as folder:
        scene, out = Path(folder) / "scene", Path(folder) / "out"
        scene.mkdir()
        write_scene(scene, options.side)
        me = [sys.executable, __file__, "--one", "ours", str(scene), str(out)]
        contenders = {"ours, 1 process": lambda: [[*me, "1"]], "ours, 2 processes": lambda: [[*me, "2"]]}
        if shutil.which("gdal_retile.py"):
            contenders["gdal_retile.py"] = lambda: gdal_retile(scene, out)
        if options.torchgeo:
            contenders["torchgeo loop"] = lambda: [[options.torchgeo, __file__, "--one", "torchgeo", str(scene), str(out), "1"]]
        results: dict[str, list[dict]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, commands in contenders.items():
                found = timed(commands())
                written = [path.stat().st_size for path in out.rglob("*.tif")]
                results[name].append(found | {"files": len(written), "bytes": sum(written)})
                shutil.rmtree(out)
        memory = {}
        for name, commands in contenders.items():
            memory[name] = peak_memory(commands())
            shutil.rmtree(out)
        report(results, memory, options.side)


def report(results: dict[str, list[dict]], memory: dict[str, float], side: int) -> None:
    """A table: medians; ratios per round against ours with two processes."""
    head = f"{'':18} {'seconds':>8} {'tiles/s':>8} {'MB/s':>7} {'MB out':>7} {'peak MB':>8}"
    print(f"{head}  over ours with 2       without start and imports")
    base = results["ours, 2 processes"]
    for name, rounds in results.items():
        seconds = statistics.median(found["seconds"] for found in rounds)
        tiles, pixels = rounds[0]["files"] / 2, 4 * side * side / 1e6
        ratios = [found["seconds"] / ours["seconds"] for found, ours in zip(rounds, base, strict=True)]
        calls = [found.get("call", found["seconds"]) / ours["call"] for found, ours in zip(rounds, base, strict=True)]
        print(
            f"{name:18} {seconds:8.2f} {tiles / seconds:8.1f} {pixels / seconds:7.1f} {rounds[0]['bytes'] / 1e6:7.1f} {memory[name]:8.0f}  "
            f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"{'':11}{statistics.median(calls):5.2f} ({min(calls):.2f} to {max(calls):.2f})"
        )


if __name__ == "__main__":
    main()
