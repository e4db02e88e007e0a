"""Masks larger than a tile: one image without seams, in the mask's place."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from segmentor_tiles import CLASSES
from segmentors import train_on
from tiny_models import TinyCritic, tiny_pipeline, tiny_vae
from tiny_world import training_job

from crfm_core import DataError
from crfm_core.data.grid import Grid
from crfm_core.data.rasters import read_rgb, read_tags
from crfm_core.generator.training import train_generator
from crfm_core.sampling import scenes as scenes_module
from crfm_core.sampling.sampler import OpenedSampler, SamplerSpec
from crfm_core.sampling.scenes import sample_scene, synthesise_scene
from crfm_core.settings import Captions, Control, Sampler, Segmentor

STEPS = 4
MASK = np.random.default_rng(0).integers(0, 7, (11, 14)).repeat(4, 0).repeat(4, 1).astype(np.uint8)  # 44x56 pixels
TEXT = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))


def encode(parts):
    return TEXT.expand(len(parts), -1, -1), TEXT[:, 0, :24].expand(len(parts), -1)


#: Samplers that draw plainly, and that correct their first two steps.
PLAIN = Sampler(num_steps=STEPS)
CORRECTED = Sampler(num_steps=STEPS, preset="default", rectify={"steps": 2, "step_size": 0.05})


def draw(pipeline, mask=MASK, size=16, sampler=PLAIN, encode=encode, overlap=0.5):
    opened = OpenedSampler(sampler, pipeline, TinyCritic())
    return sample_scene(opened, mask, encode, size, torch.Generator().manual_seed(1), overlap)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.mark.parametrize("sampler", [PLAIN, CORRECTED], ids=["plain", "corrected"])
def test_a_mask_within_one_window_gives_what_the_pipeline_gives(pipeline, sampler):
    mask = MASK[:16, :12]
    image, _ = draw(pipeline, mask, sampler=sampler)
    own = pipeline(mask[None], prompt_embeds=TEXT, pooled_prompt_embeds=TEXT[:, 0, :24], num_inference_steps=STEPS, output_type="np",
                   critic=TinyCritic(), rectify=sampler.rectify, generator=torch.Generator().manual_seed(1),
                   progress=False).images[0]  # fmt: skip
    assert np.abs(image - (own * 255).round()).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_an_image_does_not_depend_on_how_many_windows_are_drawn_at_once(pipeline, batch_size):
    image, notes = draw(pipeline, sampler=CORRECTED.model_copy(update={"batch_size": batch_size}))
    other, _ = draw(pipeline, sampler=CORRECTED)
    assert image.shape == (44, 56, 3) and image.dtype == np.uint8
    assert (np.abs(image.astype(int) - other) <= 1).mean() > 0.999
    assert len(notes) == 5 * 6


def roughness(image: np.ndarray, period: int) -> tuple[float, float]:
    """Mean absolute difference of neighbouring columns and rows, across multiples of ``period`` and elsewhere."""
    across, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(float), axis=axis)).mean((1 - axis, 2))
        border = (np.arange(len(steps)) + 1) % period == 0
        across.append(steps[border].mean())
        elsewhere.append(steps[~border].mean())
    return float(np.mean(across)), float(np.mean(elsewhere))


class Painter:
    """In place of the network: leads each window to a colour of its own, which its prompt names."""

    def __init__(self, network, sigmas, mask, prompt, *guidance) -> None:
        self.sigma, self.colour = sigmas[0], prompt[1][:, :1, None, None]

    def __call__(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        return (latents - self.colour) / self.sigma


def test_windows_that_overlap_leave_no_seam_where_those_that_do_not_leave_one(pipeline, monkeypatch):
    monkeypatch.setattr(scenes_module, "GuidedVelocity", Painter)
    colours = np.random.default_rng(3)

    def any_colour(parts):
        return TEXT.expand(len(parts), -1, -1), torch.tensor(colours.normal(size=(len(parts), 1)) * 2, dtype=torch.float32)

    ratios = []
    for overlap in (0.5, 0):
        image, _ = draw(pipeline, np.zeros((128, 128), np.uint8), 32, encode=any_colour, overlap=overlap)
        across, elsewhere = roughness(image, 32)
        ratios.append(across / elsewhere)
    assert ratios[0] < 1.2 and ratios[1] > 2


def test_each_window_is_corrected_by_its_own_mask(pipeline):
    sampler = Sampler(num_steps=STEPS, preset="default", rectify={"steps": STEPS, "step_size": 0.05})
    mask = MASK.copy()
    mask[:, :28] = 255
    image, notes = draw(pipeline, mask, sampler=sampler)
    plain, _ = draw(pipeline, mask)
    changed = np.abs(image.astype(int) - plain).max((0, 2))
    assert changed[:8].max() == 0 and changed[36:].min() > 0
    assert {"", "no labelled pixel: not corrected"} == set(notes)


def test_a_scene_is_drawn_from_raster_to_raster(world, tmp_path):
    generator, critic = tmp_path / "generator", tmp_path / "checkpoint.pth"
    train_generator(training_job(world, tmp_path, Control(steps=1, batch_size=2, learning_rate=1e-3, caption_dropout=0.1), out=generator))
    segmentor = Segmentor(architecture="segformer_tiny", iterations=2, batch_size=2, learning_rate=2e-3)
    train_on(world.tiles, critic, segmentor, root=world.root)
    mask = np.random.default_rng(1).integers(0, 3, (5, 7)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    mask[:3, :3] = 255
    grid = Grid(70, 50, "EPSG:32631", Affine(0.5, 0, 500000, 0, -0.5, 5400000))
    settings = Sampler(num_steps=2, preset="adaptive", rectify={"steps": 1}, guidance_scale=1.5, batch_size=3)
    sampler = SamplerSpec("crfm", settings, generator, CLASSES, critic)
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        synthesise_scene(sampler, "scene-1", mask, grid, Captions(), size=32, seed=seed, out=tmp_path / f"{name}.tif")
    with rasterio.open(tmp_path / "a.tif") as ours:
        assert ours.crs == "EPSG:32631" and ours.transform == grid.transform and ours.shape == (50, 70)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    assert not np.array_equal(read_rgb(tmp_path / "a.tif"), read_rgb(tmp_path / "c.tif"))
    tags = read_tags(tmp_path / "a.tif")
    assert (tags["mask_of"], tags["sampler"]) == ("scene-1", "crfm") and len(tags["generator"]) == 12
    with pytest.raises(DataError, match=r"scene scene-1: all pixels are ignored"):
        synthesise_scene(sampler, "scene-1", np.full_like(mask, 255), grid, Captions(), size=32, seed=0, out=tmp_path / "d.tif")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 18}, "size=18: must be divisible by 4"),
        ({"overlap": 1.0}, r"overlap=1\.0"),
        ({"mask": MASK + 1}, r"masks holds ids \[7\]"),
    ],
)
def test_wrong_inputs_are_refused(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **changes)


def test_large_decoders_overlap_rows_too():
    """Four levels: a latent is eight pixels, windows overlap by three quarters."""
    pipeline = tiny_pipeline(vae=tiny_vae((4, 4, 8, 8)))
    mask = np.zeros((80, 112), np.uint8)
    image, _ = draw(pipeline, mask, size=32, overlap=0.75, sampler=Sampler(num_steps=1))
    assert image.shape == (80, 112, 3) and image.std() > 0
