"""The pipeline's promises: files that come back, samples that stand alone, corrections that are recorded, inputs checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderTiny
from paths import ROOT
from tiny_models import TinyCritic, tiny_pipeline, tiny_transformer, tiny_vae

from crfm_core import WeightsError
from crfm_core.models.latent_space import mask_latents
from crfm_core.sampling.flow import euler_step, noise_levels
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.sampling.rectify import RectifySettings
from crfm_core.sampling.sampler import open_decoder
from crfm_core.text.encoders import TextEncoders

STEPS = 5
MASKS = torch.randint(0, 7, (3, 16, 16), generator=torch.Generator().manual_seed(1))


def embeddings(count: int = 3) -> dict[str, torch.Tensor]:
    embeds = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(2))
    return {"prompt_embeds": embeds[:count], "pooled_prompt_embeds": embeds[:count, 0, :24]}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline: MaskToImagePipeline, masks=MASKS, **changes):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "progress": False, "generator": generators(*range(len(masks)))}
    return pipeline(masks, **(arguments | ({} if "prompts" in changes else embeddings(len(masks))) | changes))


@pytest.fixture(scope="module")
def pipeline() -> MaskToImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def critic() -> TinyCritic:
    return TinyCritic()


@torch.no_grad()
def test_plain_sampling_is_euler_along_the_networks_velocity(pipeline):
    latents = torch.stack([torch.randn(16, 8, 8, generator=own) for own in generators(0, 1, 2)])
    mask = mask_latents(MASKS, pipeline.vae, 7)
    text = embeddings()
    levels = noise_levels(STEPS).tolist()
    for sigma, following in pairwise(levels):
        time = torch.full((3,), 1000 * sigma)
        velocity = pipeline.transformer(latents, text["prompt_embeds"], text["pooled_prompt_embeds"], time, mask).sample
        latents = euler_step(latents, velocity, sigma, following)
    drawn = draw(pipeline)
    assert torch.allclose(drawn.images, latents, rtol=0, atol=1e-5)
    assert drawn.records == [[], [], []] and drawn.notes == ["", "", ""]


def test_a_sample_does_not_depend_on_its_batch(pipeline, critic):
    settings = RectifySettings(steps=2)
    together = draw(pipeline, critic=critic, rectify=settings)
    text = {name: value[1:2] for name, value in embeddings().items()}
    alone = draw(pipeline, MASKS[1:2], critic=critic, rectify=settings, generator=generators(1), **text)
    assert torch.allclose(together.images[1:2], alone.images, rtol=0, atol=1e-4)
    assert together.records[1] == [pytest.approx(record, rel=1e-3) for record in alone.records[0]]


def test_the_same_seeds_give_the_same_images_and_one_generator_serves_all_masks(pipeline):
    assert torch.equal(draw(pipeline).images, draw(pipeline).images)
    single = [draw(pipeline, generator=torch.Generator().manual_seed(0)).images for _ in range(2)]
    assert torch.equal(*single)
    assert torch.equal(single[0][0], draw(pipeline).images[0]) and not torch.equal(single[0][1], draw(pipeline).images[1])


def test_corrections_are_recorded_and_lower_the_critics_loss(pipeline, critic):
    drawn = draw(pipeline, critic=critic, rectify=RectifySettings(steps=3, step_size=0.02, schedule="linear_decrease"))
    assert [len(record) for record in drawn.records] == [3, 3, 3]
    for record in drawn.records:
        assert [entry["step"] for entry in record] == [0, 1, 2]
        assert [entry["sigma"] for entry in record] == noise_levels(STEPS).tolist()[:3]
        assert [entry["step_size"] for entry in record] == pytest.approx([0.016, 0.012, 0.008])
        for entry in record:
            assert entry["loss_after"] < entry["loss_before"]
            assert entry["gradient_ratio"] == pytest.approx(entry["step_size"], rel=1e-4)
            assert entry["clamp_ratio"] == 0
    json.dumps(drawn.records)


def test_a_mask_without_labels_is_sampled_plainly(pipeline, critic):
    masks = MASKS.clone()
    masks[0] = 255
    plain, corrected = draw(pipeline, masks), draw(pipeline, masks, critic=critic, rectify=RectifySettings())
    assert torch.equal(corrected.images[0], plain.images[0]) and not torch.equal(corrected.images[1], plain.images[1])
    assert [len(record) for record in corrected.records] == [0, 4, 4]
    assert corrected.notes == ["no labelled pixel: not corrected", "", ""]


def test_the_state_stays_in_float32_when_the_networks_do_not(critic):
    pipeline = tiny_pipeline(transformer=tiny_transformer().to(torch.bfloat16), vae=tiny_vae().to(torch.bfloat16))
    drawn = draw(pipeline, critic=critic, rectify=RectifySettings(steps=1, step_size=1e-4))
    assert drawn.images.dtype == torch.float32
    assert drawn.records[0][0]["gradient_ratio"] == pytest.approx(1e-4, rel=1e-2)


def test_a_folder_comes_back_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["num_classes"], index["mask_code"]) == (7, "grey")
    assert not list(tmp_path.rglob("*.bin"))
    torch.save(embeddings(), tmp_path / "text.pt")
    np.save(tmp_path / "masks.npy", MASKS.numpy())
    program = """
import sys, numpy, torch
from crfm_core.sampling.pipeline import MaskToImagePipeline
folder = sys.argv[1]
pipeline = MaskToImagePipeline.from_pretrained(folder)
text, masks = torch.load(f"{folder}/text.pt"), numpy.load(f"{folder}/masks.npy")
seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
images = pipeline(masks, **text, num_inference_steps=5, generator=seeds, output_type="latent", progress=False).images
numpy.save(f"{folder}/images.npy", images.numpy())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=tmp_path, env=environment, timeout=300)
    assert np.allclose(np.load(tmp_path / "images.npy"), draw(pipeline).images.numpy(), rtol=0, atol=1e-5)


def test_prompts_are_encoded_by_the_pipelines_own_encoders(tmp_path):
    tiny_pipeline(text=True, num_classes=9, mask_code="grey_compat").save_pretrained(tmp_path)
    pipeline = MaskToImagePipeline.from_pretrained(tmp_path)
    assert (pipeline.config.num_classes, pipeline.config.mask_code) == (9, "grey_compat")
    one_for_all = draw(pipeline, prompts="road, water").images
    assert torch.equal(one_for_all, draw(pipeline, prompts=["road, water"] * 3).images)
    assert not torch.allclose(one_for_all, draw(pipeline, prompts="forest").images)


def test_images_come_as_asked(pipeline):
    pil, array, tensor = (draw(pipeline, output_type=kind).images for kind in ("pil", "np", "pt"))
    assert [image.size for image in pil] == [(16, 16)] * 3 and pil[0].mode == "RGB"
    assert array.shape == (3, 16, 16, 3) and array.min() >= 0 and array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    images, records, notes = draw(pipeline, masks=MASKS.numpy().astype(np.uint8), return_dict=False, output_type="pt")
    assert torch.equal(images, tensor) and records == [[], [], []] and notes == ["", "", ""]


def test_a_callback_sees_every_step_and_may_replace_the_latents(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, timestep, tuple(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else None

    drawn = draw(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=("latents", "prompt_embeds"))
    assert [entry[0] for entry in seen] == list(range(STEPS))
    assert [entry[1] for entry in seen] == [1000 * sigma for sigma in noise_levels(STEPS).tolist()[:-1]]
    assert seen[0][2] == ("latents", "prompt_embeds")
    assert torch.equal(drawn.images, torch.zeros(3, 16, 8, 8))


def test_given_latents_are_the_noise(pipeline):
    latents = torch.stack([torch.randn(16, 8, 8, generator=own) for own in generators(0, 1, 2)])
    assert torch.equal(draw(pipeline, latents=latents, generator=None).images, draw(pipeline).images)


@pytest.mark.parametrize("size", [(16, 14), (13, 16), (3, 5)])
def test_a_mask_off_the_latent_grid_is_enlarged_by_its_edge_and_its_image_cropped(pipeline, critic, size):
    height, width = size
    masks = MASKS[:, :height, :width]
    settings = RectifySettings(steps=1)
    drawn = draw(pipeline, masks, critic=critic, rectify=settings, pad=True, output_type="pt").images
    assert drawn.shape == (3, 3, height, width)
    edges = np.pad(masks.numpy(), ((0, 0), (0, -height % 4), (0, -width % 4)), mode="edge")
    plain = draw(pipeline, masks, pad=True, output_type="pt").images
    assert torch.equal(plain, draw(pipeline, edges, output_type="pt").images[..., :height, :width])
    # what lies outside the mask is not judged, so the critic has another wish than for a mask of that size
    whole = draw(pipeline, edges, critic=critic, rectify=settings, output_type="pt").images[..., :height, :width]
    assert not torch.equal(drawn, whole)


def test_guidance_leads_away_from_the_empty_prompt(pipeline):
    guided = tiny_pipeline(caption_dropout=0.1)
    text, empty = embeddings(), torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    negative = {"negative_prompt_embeds": empty, "negative_pooled_prompt_embeds": empty[:, 0, :24]}
    assert torch.equal(draw(guided, guidance_scale=1.0, **negative).images, draw(pipeline).images)
    one = draw(guided, num_inference_steps=1).images
    other = draw(
        guided, num_inference_steps=1, prompt_embeds=empty.expand(3, -1, -1), pooled_prompt_embeds=empty[:, 0, :24].expand(3, -1)
    ).images
    # one Euler step from noise z to σ = 0 gives z - v, which is linear in the velocity
    strong = draw(guided, num_inference_steps=1, guidance_scale=3.0, **negative).images
    assert torch.allclose(strong, other + 3 * (one - other), rtol=0, atol=1e-4) and not torch.allclose(one, other, atol=1e-2)
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0: needs negative_prompt_embeds"):
        draw(guided, guidance_scale=3.0)
    with pytest.raises(ValueError, match="negative_prompt_embeds has 2 entries"):
        draw(guided, guidance_scale=3.0, negative_prompt_embeds=text["prompt_embeds"][:2], negative_pooled_prompt_embeds=empty[:, 0, :24])


def test_guidance_by_text_encodes_the_empty_prompt_itself(tmp_path):
    tiny_pipeline(text=True, num_classes=9, caption_dropout=0.1).save_pretrained(tmp_path)
    pipeline = MaskToImagePipeline.from_pretrained(tmp_path)
    assert pipeline.config.caption_dropout == 0.1
    embeds, pooled = TextEncoders.from_folder(tmp_path).encode(["road", ""])
    text = {"prompt_embeds": embeds[:1].expand(3, -1, -1), "pooled_prompt_embeds": pooled[:1].expand(3, -1)}
    negative = {"negative_prompt_embeds": embeds[1:], "negative_pooled_prompt_embeds": pooled[1:]}
    by_embedding = draw(pipeline, guidance_scale=2.0, **text, **negative).images
    assert torch.allclose(draw(pipeline, prompts="road", guidance_scale=2.0).images, by_embedding, rtol=0, atol=1e-4)


def test_the_critic_may_look_through_a_smaller_decoder(pipeline, critic, tmp_path):
    torch.manual_seed(8)
    AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1), scaling_factor=1.0).save_pretrained(tmp_path / "tiny")  # fmt: skip
    settings = RectifySettings(steps=2, step_size=0.02)
    small = draw(pipeline, critic=critic, critic_decoder=open_decoder(tmp_path / "tiny"), rectify=settings)
    own = draw(pipeline, critic=critic, rectify=settings)
    assert not torch.allclose(small.images, own.images, atol=1e-3)
    assert all(entry["loss_after"] < entry["loss_before"] for record in small.records for entry in record)
    tiny_transformer().save_pretrained(tmp_path / "transformer")
    with pytest.raises(WeightsError, match="holds a MaskMMDiT; critic_decoder needs one of AutoencoderTiny, AutoencoderKL"):
        open_decoder(tmp_path / "transformer")


def test_a_critic_is_a_function_or_has_a_method_logits(pipeline, critic):
    class Judge:
        def logits(self, images: torch.Tensor) -> torch.Tensor:
            return critic(images)

    one, other = (draw(pipeline, critic=each, rectify=RectifySettings(steps=2)) for each in (critic, Judge()))
    assert torch.equal(one.images, other.images)


@pytest.mark.slow
def test_compiled_networks_draw_the_same():
    pipeline, compiled = tiny_pipeline(), tiny_pipeline()
    compiled.compile_networks()
    assert torch.allclose(draw(compiled).images, draw(pipeline).images, rtol=0, atol=1e-4)


def test_models_that_wait_on_the_cpu_come_to_the_device_when_they_are_called(pipeline, critic):
    offloaded = tiny_pipeline()
    called = []
    for name in ("transformer", "vae"):
        hook = ModelHook()
        hook.pre_forward = lambda module, *args, name=name, **kwargs: (called.append(name), (args, kwargs))[1]
        add_hook_to_module(getattr(offloaded, name), hook)
    drawn = draw(offloaded, critic=critic, rectify=RectifySettings(steps=1), output_type="pt")
    assert {"transformer", "vae"} <= set(called) and called.index("vae") < called.index("transformer")
    assert torch.equal(drawn.images, draw(pipeline, critic=critic, rectify=RectifySettings(steps=1), output_type="pt").images)


def test_weights_that_are_not_numbers_are_noticed():
    broken = tiny_pipeline()
    torch.nn.init.constant_(broken.transformer.proj_out.bias, float("nan"))
    with pytest.raises(WeightsError, match="not finite"):
        draw(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": MASKS + 1}, r"masks holds ids \[7\]: the pipeline knows 0 \.\.\. 6"),
        ({"masks": MASKS.float()}, r"masks has shape \(3, 16, 16\) and type torch\.float32"),
        ({"masks": MASKS[0]}, r"masks has shape \(16, 16\)"),
        ({"masks": MASKS[:, :, :14]}, "masks has size 16x14: height and width must be divisible by 4; pad=True"),
        ({"guidance_scale": 0.5}, r"guidance_scale=0\.5: must be at least 1"),
        ({"guidance_scale": 2.0}, r"guidance_scale=2\.0: the generator never saw an empty prompt"),
        ({"mask_guidance_scale": 0.5}, r"mask_guidance_scale=0\.5: must be at least 1"),
        ({"mask_guidance_scale": 2.0}, r"mask_guidance_scale=2\.0: the generator never saw a missing mask; train one with mask_dropout"),
        ({"critic": TinyCritic(3), "rectify": RectifySettings()}, r"masks holds ids \[3, 4, 5, 6\]: the critic knows 0 \.\.\. 2"),
        ({"rectify": RectifySettings()}, "critic=None"),
        ({"critic": TinyCritic(), "rectify": RectifySettings(steps=6)}, r"rectify\.steps=6: must not exceed num_inference_steps=5"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"generator": generators(0, 1)}, "generator has 2 entries"),
        ({"latents": torch.zeros(3, 16, 4, 4)}, r"latents has shape \(3, 16, 4, 4\): needs \(3, 16, 8, 8\)"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
        ({"prompts": "road"}, "prompts='road': the pipeline has no tokenizer"),
        ({"prompt_embeds": None, "pooled_prompt_embeds": None}, "prompts=None"),
        ({"pooled_prompt_embeds": None}, "prompt_embeds and pooled_prompt_embeds go together"),
        ({"prompt_embeds": torch.zeros(2, 6, 32)}, r"prompt_embeds has shape \(2, 6, 32\)"),
        ({"pooled_prompt_embeds": torch.zeros(3, 5)}, r"pooled_prompt_embeds has shape \(3, 5\)"),
    ],
)
def test_wrong_inputs_are_refused_with_argument_and_value(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **changes)


def test_an_unknown_mask_code_or_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes=None"):
        tiny_pipeline(num_classes=None)
    with pytest.raises(ValueError, match="mask_code='colour'"):
        tiny_pipeline(mask_code="colour")
