"""The tri-attention transformer against reference numbers, against diffusers, and what its files promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from paths import GOLDEN
from tiny_models import SIZES, network_inputs, tiny_sd3, tiny_transformer

from crfm_core import ConfigError, WeightsError
from crfm_core.models.mmdit import MaskMMDiT


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "tri_attention.npz") as arrays:
        return {key: json.loads(str(arrays[key])) if key == "meta" else torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture
def released(reference) -> MaskMMDiT:
    model = MaskMMDiT(**(SIZES | {"dual_attention_layers": reference["meta"]["dual_attention_layers"]}), mask_mlp_modulation="image")
    model.load_released(weights_of(reference))
    return model


def weights_of(reference: dict) -> dict[str, torch.Tensor]:
    return {key.removeprefix("w/"): value for key, value in reference.items() if key.startswith("w/")}


@pytest.mark.parametrize(("dtype", "tag", "tolerance"), [(torch.float64, "f64", 1e-8), (torch.float32, "f32", 3e-6)])
@torch.no_grad()
def test_released_weights_give_the_reference_velocity_and_tokens(released, reference, dtype, tag, tolerance):
    tokens = {}
    for index, block in enumerate(released.blocks):
        block.register_forward_hook(
            lambda _, __, out, index=index: tokens.update(zip([f"block{index}/{n}" for n in ("image", "text", "mask")], out, strict=True))
        )
    names = ("hidden", "text", "pooled", "timestep", "mask_latent")
    velocity = released.to(dtype)(*(reference[f"in/{name}"].to(dtype) for name in names)).sample
    assert torch.allclose(velocity, reference[f"out/{tag}"], rtol=0, atol=tolerance)
    for name in ("block0/image", "block0/text", "block0/mask", "block1/image", "block1/text", "block1/mask", "block2/image"):
        assert torch.allclose(tokens[name], reference[f"mid/{tag}/{name}"], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("changes", [{}, {"dual_attention_layers": ()}, {"dual_attention_layers": (2,)}, {"qk_norm": None}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_without_a_mask_it_is_diffusers_own_transformer(changes, dtype, tolerance):
    sd3 = tiny_sd3(**changes).to(dtype)
    mine = MaskMMDiT.from_sd3(sd3)
    assert mine.dtype == dtype
    assert torch.allclose(mine(**network_inputs(dtype)).sample, sd3(**network_inputs(dtype)).sample, rtol=0, atol=tolerance)


@torch.no_grad()
def test_the_two_mask_mlp_modulations_differ_and_the_mask_matters():
    mask = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(6))
    own, image = tiny_transformer("own"), tiny_transformer("image")
    image.load_state_dict(own.state_dict())
    results = [
        own(**network_inputs()).sample,
        own(**network_inputs(), mask_latents=mask).sample,
        image(**network_inputs(), mask_latents=mask).sample,
    ]
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[1], results[2], atol=1e-4)


def test_a_copied_mask_branch_holds_the_image_branchs_weights():
    model = tiny_transformer(mask_init="copy")
    assert torch.equal(model.mask_embed.weight, model.pos_embed.proj.weight)
    for block in model.blocks:
        assert torch.equal(block.mask.attention.to_q.weight, block.image.attention.to_q.weight)
        assert torch.equal(block.mask.modulation.weight, block.image.modulation.weight[: 6 * 64])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_parameter_gets_a_gradient(checkpointing):
    model = tiny_transformer()
    if checkpointing:
        model.enable_gradient_checkpointing()
    arguments = network_inputs()
    model(**arguments, mask_latents=torch.ones_like(arguments["hidden_states"])).sample.square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert without and all(name.startswith(("blocks.2.mask.", "blocks.2.text.")) for name in without)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**network_inputs(), mask_latents=network_inputs()["hidden_states"]).sample.square().sum().backward()
        gradients.append(model.blocks[0].mask.attention.to_k.weight.grad)
    assert torch.equal(*gradients)


def test_it_trains_under_bfloat16_autocast_with_float32_weights():
    model, arguments = tiny_transformer(), network_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(**arguments, mask_latents=arguments["hidden_states"]).sample
    velocity.float().square().mean().backward()
    assert model.blocks[0].mask.attention.to_q.weight.grad.isfinite().all()
    exact = model(**arguments, mask_latents=arguments["hidden_states"]).sample
    assert torch.allclose(velocity.float(), exact, rtol=0, atol=0.05)


def test_branches_hold_each_live_parameter_once():
    model = tiny_transformer()
    branches = model.branch_parameters()
    names = [name for branch in branches.values() for name, _ in branch]
    assert sorted(names) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert {name for name, _ in branches["image"] if not name.startswith("blocks.")} == {
        f"{module}.{kind}" for module in ("pos_embed.proj", "norm_out", "proj_out") for kind in ("weight", "bias")
    }
    assert all(name.startswith("mask_embed.") or ".mask." in name for name, _ in branches["mask"])
    assert any(name.startswith("time_text_embed.") for name, _ in branches["text"])


def test_at_full_size_it_has_the_published_parameter_counts():
    with torch.device("meta"):
        model = MaskMMDiT(pos_embed_max_size=2)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    mask = sum(count for name, count in counts.items() if ".mask." in name or name.startswith("mask_embed"))
    assert round(sum(counts.values()) / 1e9, 3) == 3.263
    assert round(mask / 1e9, 3) == 1.020


@torch.no_grad()
def test_a_saved_model_comes_back_whole(tmp_path):
    model = tiny_transformer("image")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    back = MaskMMDiT.from_pretrained(tmp_path)
    assert back.config.mask_mlp_modulation == "image"
    mask = network_inputs()["hidden_states"]
    assert torch.equal(back(**network_inputs(), mask_latents=mask).sample, model(**network_inputs(), mask_latents=mask).sample)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in back.named_parameters() if not parameter.requires_grad} == frozen


def test_a_released_checkpoint_without_text_weights_keeps_the_text_branch(reference):
    model = tiny_transformer("image")
    text = {name: parameter.clone() for name, parameter in model.named_parameters() if ".text." in name}
    kept = ("norm1_context", "ff_context", "add_", "norm_added", "context_embedder", "time_text_embed", "pos_embed.pos_embed")
    model.load_released({key: value for key, value in weights_of(reference).items() if not any(part in key for part in kept)})
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in text.items())
    expected = reference["w/mmdit_blocks.1.attn.sd3_attn.to_q.weight"]
    assert torch.equal(model.blocks[1].image.attention.to_q.weight, expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("mmdit_blocks.0.attn.to_q.weight"), "missing: mmdit_blocks.0.attn.to_q.weight"),
        (lambda w: w.pop("sd3_transformer.norm_out.linear.bias"), "missing: sd3_transformer.norm_out.linear.bias"),
        (lambda w: w.update({"mmdit_blocks.7.ff.net.2.bias": torch.ones(64)}), "unexpected: mmdit_blocks.7.ff.net.2.bias"),
        (lambda w: w.update({"sd3_transformer.blocks.0.mask.to_q": torch.ones(1)}), "unexpected: sd3_transformer.blocks.0.mask.to_q"),
        (lambda w: w.update({"mmdit_blocks.1.attn2.to_k.bias": torch.ones(3)}), "mmdit_blocks.1.attn2.to_k.bias \\(3,\\) instead"),
        (lambda w: w["msk_pos_embed.pos_embed"].mul_(-1), "msk_pos_embed.pos_embed is not this model's position table"),
    ],
)
def test_a_released_checkpoint_that_does_not_fit_is_refused_by_name_and_changes_nothing(reference, change, named):
    weights = {key: value.clone() for key, value in weights_of(reference).items()}
    change(weights)
    model = tiny_transformer("image")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=named):
        model.load_released(weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_network_are_refused():
    sd3 = tiny_sd3()
    sd3.extra = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsError, match=r"unexpected extra\.bias, extra\.weight"):
        MaskMMDiT.from_sd3(sd3)


def test_wrong_settings_and_shapes_are_refused_with_their_values():
    for wrong in ({"mask_mlp_modulation": "both"}, {"qk_norm": "layer_norm"}, {"caption_projection_dim": 65}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MaskMMDiT(**(SIZES | wrong))
    with pytest.raises(ConfigError, match="mask_init='zero'"):
        tiny_transformer(mask_init="zero")
    model, arguments = tiny_transformer(), network_inputs()
    with pytest.raises(ValueError, match=r"mask_latents has shape \(2, 16, 4, 4\)"):
        model(**arguments, mask_latents=torch.zeros(2, 16, 4, 4))
    for shape in ((2, 16, 7, 8), (2, 4, 8, 8), (2, 16, 8, 26)):
        with pytest.raises(ValueError, match="hidden_states has shape"):
            model(**(arguments | {"hidden_states": torch.zeros(shape)}))
