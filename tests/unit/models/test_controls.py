"""The control schemes: each is the base without a mask, differs from the others as its docstring says, and can be saved."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from tiny_models import network_inputs, tiny_network, tiny_pipeline, tiny_sd3
from torch import Tensor, nn
from torch.nn import functional as F

from crfm_core import ConfigError, DataError, WeightsError
from crfm_core.generator.export import export_sd3
from crfm_core.models.controls import build_network, load_network
from crfm_core.models.mmdit import MaskMMDiT
from crfm_core.models.network import ControlNetwork
from crfm_core.models.schemes.controlnet import ControlNetMMDiT
from crfm_core.sampling.flow import euler_step, noise_levels
from crfm_core.sampling.pipeline import MaskToImagePipeline
from crfm_core.settings import SCHEMES
from crfm_core.text.encoders import TextEncoders

#: diffusers' RMSNorm squares in float32 whatever comes in.
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def a_mask(seed: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def settings(network: ModelMixin) -> dict:
    """A network's configuration, as JSON gives it back."""
    return json.loads(json.dumps({name: value for name, value in network.config.items() if not name.startswith("_")}))


@torch.no_grad()
def stir(network: ControlNetwork, branches: tuple[str, ...] = ("image", "mask", "text")) -> None:
    """Move all weights of some branches a little, those that start at zero too."""
    generator = torch.Generator().manual_seed(7)
    for branch in branches:
        for _, parameter in network.branch_parameters()[branch]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def tokens_after_the_first_block(network: MaskMMDiT, **changes) -> tuple[Tensor, ...]:
    """Image, text and mask."""
    caught = []
    hook = network.blocks[0].register_forward_hook(lambda _, __, out: caught.extend(out))
    network(**(network_inputs() | changes))
    hook.remove()
    return tuple(caught)


# ------------------------------------------------------------------------------------------------------ what they compute


@schemes
@PRECISIONS
@pytest.mark.parametrize("mask_init", ["random", "copy"])
@torch.no_grad()
def test_without_a_mask_each_is_the_base_and_so_is_its_part_for_diffusers(scheme, dtype, tolerance, mask_init):
    base = tiny_sd3(num_layers=4).to(dtype)
    network = build_network(base, scheme, mask_init)
    expected = base(**network_inputs(dtype)).sample
    assert network.dtype == dtype
    assert torch.allclose(network(**network_inputs(dtype)).sample, expected, rtol=0, atol=tolerance)
    part = network.to_sd3()
    assert type(part) is SD3Transformer2DModel and settings(part) == settings(base)
    assert torch.equal(part(**network_inputs(dtype)).sample, expected)


@pytest.mark.parametrize("scheme", ["adapter", "controlnet"])
@PRECISIONS
@pytest.mark.parametrize("mask_init", ["random", "copy"])
@torch.no_grad()
def test_adapter_and_controlnet_start_as_the_base_with_a_mask_too(scheme, dtype, tolerance, mask_init):
    base = tiny_sd3(num_layers=4).to(dtype)
    network = build_network(base, scheme, mask_init)
    expected = base(**network_inputs(dtype)).sample
    assert torch.allclose(network(**network_inputs(dtype), mask_latents=a_mask(dtype=dtype)).sample, expected, rtol=0, atol=tolerance)


@schemes
@torch.no_grad()
def test_once_its_weights_have_moved_the_mask_matters_and_without_it_still_nothing_changes(scheme):
    network = tiny_network(scheme)
    expected = network(**network_inputs()).sample
    stir(network, ("mask",))
    assert torch.equal(network(**network_inputs()).sample, expected)
    one, other = (network(**network_inputs(), mask_latents=a_mask(seed)).sample for seed in (1, 2))
    assert not torch.allclose(one, other, rtol=0, atol=1e-3) and not torch.allclose(one, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_in_the_siamese_scheme_mask_and_text_never_meet():
    siamese, joint = tiny_network("siamese"), tiny_network("triattention")
    joint.load_state_dict(siamese.state_dict())
    words = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(8))
    for network, apart in ((siamese, True), (joint, False)):
        first = tokens_after_the_first_block(network, mask_latents=a_mask(1))
        other_mask = tokens_after_the_first_block(network, mask_latents=a_mask(2))
        other_words = tokens_after_the_first_block(network, mask_latents=a_mask(1), encoder_hidden_states=words)
        assert torch.equal(first[1], other_mask[1]) is apart
        assert torch.equal(first[2], other_words[2]) is apart
        assert not torch.equal(first[0], other_mask[0]) and not torch.equal(first[0], other_words[0])
    assert torch.equal(tokens_after_the_first_block(siamese, mask_latents=a_mask())[1], tokens_after_the_first_block(siamese)[1])


@torch.no_grad()
def test_a_siamese_block_is_the_sum_of_two_attentions_written_out():
    network = tiny_network("siamese", dual_attention_layers=()).double()
    stir(network)
    block = network.blocks[1]
    generator = torch.Generator().manual_seed(9)
    tokens = {name: torch.randn(2, count, 64, generator=generator).double() for name, count in {"image": 6, "text": 5, "mask": 6}.items()}
    conditioning = torch.randn(2, 64, generator=generator).double()

    def normalised(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def heads_of(tokens: Tensor) -> Tensor:
        return tokens.reshape(2, -1, 4, 16).permute(0, 2, 1, 3)

    vectors, query, key, value = {}, {}, {}, {}
    for name in tokens:
        branch = getattr(block, name)
        own = branch.attention
        vectors[name] = branch.modulation(conditioning)[:, None].chunk(6, -1)
        read = normalised(tokens[name], vectors[name][0], vectors[name][1])
        query[name] = own.norm_q(heads_of(own.to_q(read)))
        key[name], value[name] = own.norm_k(heads_of(own.to_k(read))), heads_of(own.to_v(read))

    def sees(name: str, *others: str) -> Tensor:
        keys, values = (torch.cat([kind[other] for other in others], 2) for kind in (key, value))
        weights = torch.softmax(query[name] @ keys.transpose(2, 3) / 16**0.5, -1)
        return (weights @ values).permute(0, 2, 1, 3).reshape(2, -1, 64)

    seen = {
        "image": sees("image", "image", "text") + sees("image", "image", "mask"),
        "text": sees("text", "image", "text"),
        "mask": sees("mask", "image", "mask"),
    }
    for name, result in zip(tokens, block(*tokens.values(), conditioning), strict=True):
        branch, (_, _, gate, shift, scale, mlp_gate) = getattr(block, name), vectors[name]
        expected = tokens[name] + gate * branch.attention.to_out(seen[name])
        inner, outer = branch.feed_forward[0], branch.feed_forward[2]
        expected = expected + mlp_gate * outer(F.gelu(inner(normalised(expected, shift, scale)), approximate="tanh"))
        assert torch.allclose(result, expected, rtol=0, atol=1e-12), name


@torch.no_grad()
def test_an_adapter_block_adds_a_cross_attention_to_diffusers_own_block():
    base = tiny_sd3(num_layers=4).double()
    network = build_network(base, "adapter", "random")
    block, theirs, caught = network.blocks[1], base.transformer_blocks[1], {}
    stir(network, ("mask",))
    image, text, mask = (torch.randn(2, count, 64).double() for count in (6, 5, 6))
    raw = torch.randn(2, 64).double()
    conditioning = F.silu(raw)  # diffusers' block applies it itself
    theirs.attn.norm_q.register_forward_hook(lambda _, __, query: caught.update(query=query))
    theirs.attn.register_forward_hook(lambda _, __, out: (out[0] + caught["extra"], out[1]) if "extra" in caught else None)

    text_before, image_before = theirs(image, text, raw)
    ours = block(image, text, None, conditioning)
    assert torch.allclose(ours[0], image_before, rtol=0, atol=1e-12) and torch.allclose(ours[1], text_before, rtol=0, atol=1e-12)

    own = block.mask
    key = own.norm_k(own.to_k(mask).reshape(2, 6, 4, 16).transpose(1, 2))
    value = own.to_v(mask).reshape(2, 6, 4, 16).transpose(1, 2)
    weights = torch.softmax(caught["query"] @ key.transpose(2, 3) / 4, -1)
    caught["extra"] = own.to_out((weights @ value).transpose(1, 2).reshape(2, 6, 64))
    text_after, image_after = theirs(image, text, raw)
    ours = block(image, text, mask, conditioning)
    assert torch.allclose(ours[0], image_after, rtol=0, atol=1e-12) and torch.equal(text_after, text_before)
    assert torch.allclose(ours[1], text_after, rtol=0, atol=1e-12) and ours[2] is mask
    assert not torch.allclose(image_after, image_before, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_adapters_mask_tokens_are_the_same_in_every_block_at_every_time_and_with_every_text():
    network = tiny_network("adapter")
    stir(network, ("mask",))
    caught = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[2]))
    network(**network_inputs(), mask_latents=a_mask())
    network(**(network_inputs() | {"timestep": torch.tensor([7.0, 500.0])}), mask_latents=a_mask())
    network(
        **(network_inputs() | {"encoder_hidden_states": torch.zeros(2, 3, 32), "pooled_projections": torch.ones(2, 24)}),
        mask_latents=a_mask(),
    )
    assert len(caught) == 12 and all(torch.equal(tokens, caught[0]) for tokens in caught)
    patches = network.mask_embed(a_mask()).flatten(2).transpose(1, 2) + network.pos_embed.cropped_pos_embed(8, 12)
    assert torch.allclose(caught[0], F.layer_norm(patches, (64,), eps=1e-6), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_control_network_reads_the_mask_where_the_image_is_and_steers_all_blocks_but_the_last():
    network = tiny_network("controlnet", mask_init="copy")
    stir(network, ("mask",))
    tokens, outputs, base = [], [], []
    network.controlnet.transformer_blocks[0].register_forward_pre_hook(
        lambda _, __, named: tokens.append(named["hidden_states"]), with_kwargs=True
    )
    for mapping in network.controlnet.controlnet_blocks:
        mapping.register_forward_hook(lambda _, __, out: outputs.append(out))
    for block in network.base.transformer_blocks:
        block.register_forward_hook(lambda _, __, named, out: base.append((named["hidden_states"], out[1])), with_kwargs=True)
    network(**network_inputs(), mask_latents=a_mask())
    image = network.base.pos_embed(network_inputs()["hidden_states"])
    patches = network.controlnet.pos_embed_input.proj(a_mask()).flatten(2).transpose(1, 2)
    assert torch.allclose(tokens[0], image + patches, rtol=0, atol=1e-6)
    assert [len(outputs), len(base)] == [2, 4]
    for (_, left), (reached, _), added in zip(base[:3], base[1:], [outputs[0], outputs[0], outputs[1]], strict=True):
        assert torch.allclose(reached, left + added, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_control_network_does_not_run_without_a_mask():
    network = tiny_network("controlnet")
    network.controlnet.forward = None
    network(**network_inputs())
    with pytest.raises(TypeError):
        network(**network_inputs(), mask_latents=a_mask())


# ------------------------------------------------------------------------------------------------------- prepared for sampling

TIMES = torch.tensor([1000.0, 612.5, 3.0])


def sampling(dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy latents, and the rest of what sampling gives."""
    given = network_inputs(dtype)
    given.pop("timestep")
    return given.pop("hidden_states"), given


@schemes
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_prepared_velocities_are_those_of_forward(scheme, masked, dtype, tolerance):
    network = tiny_network(scheme, mask_mlp_modulation="image")
    stir(network)
    nn.Module.to(network, dtype)
    (latents, given), mask = sampling(dtype), a_mask(dtype=dtype) if masked else None
    prepared = network.prepare(**given, timesteps=TIMES, mask_latents=mask)
    for step, time in [*enumerate(TIMES), (0, TIMES[0])]:
        one = latents * (1 + step)
        expected = network(one, **given, timestep=time.expand(2), mask_latents=mask).sample
        velocity = network.velocity(one, prepared, step)
        assert velocity.dtype == dtype and torch.allclose(velocity, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("scheme", ["triattention", "siamese", "adapter"])
@torch.no_grad()
def test_what_the_latents_do_not_change_is_computed_once(scheme):
    network, ran = tiny_network(scheme), []
    latents, given = sampling()
    once = ["context_embedder", "time_text_embed", "mask_embed", "norm_out"]
    once += [
        name for name, _ in network.named_modules() if name.endswith(".modulation") or re.fullmatch(r"blocks\.\d\.mask\.to_[kv]", name)
    ]
    for name in once:
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    prepared = network.prepare(**given, timesteps=TIMES, mask_latents=a_mask())
    assert sorted(ran) == sorted(once)
    for step in range(len(TIMES)):
        network.velocity(latents, prepared, step)
    assert len(ran) == len(once)


@schemes
@torch.no_grad()
def test_offloaded_weights_are_there_for_prepared_velocities(scheme):
    class Coming(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            came.append(module)
            return args, kwargs

    network, came = tiny_network(scheme), []
    add_hook_to_module(network, Coming())
    latents, given = sampling()
    prepared = network.prepare(**given, timesteps=TIMES, mask_latents=a_mask())
    came.clear()
    velocity = network.velocity(latents, prepared, 1)
    assert came == [network]
    assert torch.allclose(velocity, network(latents, **given, timestep=TIMES[1].expand(2), mask_latents=a_mask()).sample, atol=1e-5)


@schemes
def test_prepared_for_another_size_is_refused(scheme):
    network = tiny_network(scheme)
    latents, given = sampling()
    prepared = network.prepare(**given, timesteps=TIMES, mask_latents=a_mask())
    with pytest.raises(ValueError, match=r"mask_latents has shape \(2, 16, 8, 12\), hidden_states \(2, 16, 8, 8\)"):
        network.velocity(latents[..., :8], prepared, 0)


# ------------------------------------------------------------------------------------------------------------ their weights


@schemes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_exactly_the_live_parameters_are_trainable_and_get_gradients(scheme, checkpointing):
    network = tiny_network(scheme)
    if checkpointing:
        network.enable_gradient_checkpointing()
    live = {name for branch in network.branch_parameters().values() for name, _ in branch}
    named = dict(network.named_parameters())
    assert live == {name for name, parameter in named.items() if parameter.requires_grad}
    network(**network_inputs(), mask_latents=a_mask()).sample.square().sum().backward()
    assert live == {name for name, parameter in named.items() if parameter.grad is not None}

    stir(network)  # what starts at zero hides the gradients of what lies before it
    network.requires_grad_(True).zero_grad()
    network(**network_inputs(), mask_latents=a_mask()).sample.square().sum().backward()
    assert live == {name for name, parameter in named.items() if parameter.grad is not None and parameter.grad.any()}
    assert len(named) - len(live) == (3 if scheme == "adapter" else 12)


@schemes
def test_gradient_checkpointing_reaches_every_block_and_changes_no_gradient(scheme):
    gradients = []
    for checkpointing in (False, True):
        network = tiny_network(scheme)
        stir(network)
        if checkpointing:
            network.enable_gradient_checkpointing()
        runs = []
        for block in network.repeated_blocks():
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        network(**network_inputs(), mask_latents=a_mask()).sample.square().sum().backward()
        assert len(runs) == (2 if checkpointing else 1) * len(network.repeated_blocks())
        gradients.append([parameter.grad for _, parameter in network.branch_parameters()["mask"]])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@schemes
def test_it_trains_under_bfloat16_autocast_with_float32_weights(scheme):
    network = tiny_network(scheme)
    stir(network, ("mask",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = network(**network_inputs(), mask_latents=a_mask()).sample
    velocity.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for branch in network.branch_parameters().values() for _, parameter in branch)
    exact = network(**network_inputs(), mask_latents=a_mask()).sample
    assert torch.allclose(velocity.float(), exact, rtol=0, atol=0.1)


MASK_NAMES = {
    "triattention": r"mask_embed\.\w+|blocks\.\d\.mask\.(attention\.(to_[qkv]|norm_[qk]|to_out)|modulation|feed_forward\.[02])\.\w+",
    "adapter": r"mask_embed\.\w+|blocks\.\d\.mask\.(to_[kv]|norm_k|to_out)\.\w+",
    "controlnet": r"controlnet\.(time_text_embed|context_embedder|transformer_blocks|controlnet_blocks|pos_embed_input)\..+",
}
MASK_NAMES["siamese"] = MASK_NAMES["triattention"]
IMAGE_NAMES = r"(pos_embed\.proj|norm_out|proj_out)\.\w+|blocks\.\d\.image\..+"
BASE_IMAGE_NAMES = (
    r"base\.(pos_embed\.proj|norm_out\.linear|proj_out)\.\w+|base\.transformer_blocks\.\d\.(norm1\.|attn2?\.(to|norm)_[qkvo]|ff\.).*"
)
# Patch map 2, three blocks of 16, the last of 7; patch map and 4 x 7; embedders 10, dual blocks 42 and 33, maps in and out 6.
COUNTS = {"triattention": 57, "siamese": 57, "adapter": 30, "controlnet": 91}


@schemes
def test_each_branch_holds_the_weights_of_its_name(scheme):
    branches = {branch: [name for name, _ in members] for branch, members in tiny_network(scheme).branch_parameters().items()}
    assert list(branches) == ["image", "mask", "text"]
    image = BASE_IMAGE_NAMES if scheme == "controlnet" else IMAGE_NAMES
    for branch, names in branches.items():
        assert names and all(bool(re.fullmatch(MASK_NAMES[scheme], name)) is (branch == "mask") for name in names)
        assert all(bool(re.fullmatch(image, name)) is (branch == "image") for name in names), branch
    assert [len(names) for names in branches.values()] == [90, COUNTS[scheme], 65]


@pytest.mark.parametrize(
    ("scheme", "whole", "mask", "live"),
    [
        ("triattention", 3.263, 1.020, 0.996),
        ("siamese", 3.263, 1.020, 0.996),
        ("adapter", 2.413, 0.170, 0.170),
        ("controlnet", 3.504, 1.261, 1.237),
    ],
)
def test_at_full_size_they_have_the_counts_of_their_docstrings(scheme, whole, mask, live):
    with torch.device("meta"):
        network = ControlNetMMDiT(pos_embed_max_size=2) if scheme == "controlnet" else MaskMMDiT(pos_embed_max_size=2, scheme=scheme)

    def billions(parameters) -> float:
        return round(sum(parameter.numel() for parameter in parameters) / 1e9, 3)

    named = list(network.named_parameters())
    assert billions(parameter for _, parameter in named) == whole
    masks = ("mask_embed.", "controlnet.")
    assert billions(parameter for name, parameter in named if name.startswith(masks) or ".mask." in name) == mask
    branches = {branch: billions(parameter for _, parameter in members) for branch, members in network.branch_parameters().items()}
    assert branches == {"image": 1.240, "mask": live, "text": 1.001}
    documented = (ControlNetMMDiT if scheme == "controlnet" else MaskMMDiT).__doc__
    assert f"({whole:.3f} B" in documented and f"{mask:.3f} B " in documented


def test_a_copy_starts_from_the_image_branch_and_leaves_the_base_alone():
    base = tiny_sd3(num_layers=4)
    config, weights = dict(base.config), {name: weight.clone() for name, weight in base.state_dict().items()}
    adapter, control = build_network(base, "adapter", "copy"), build_network(base, "controlnet", "copy").controlnet
    for block in adapter.blocks:
        for name in ("to_k.weight", "to_v.bias", "norm_k.weight"):
            assert torch.equal(block.mask.get_parameter(name), block.image.attention.get_parameter(name))
        assert not block.mask.to_out.weight.any() and not block.mask.to_out.bias.any()
    assert torch.equal(adapter.mask_embed.weight, adapter.pos_embed.proj.weight)
    copied = control.state_dict()
    zero = [name for name in copied if name.startswith(("controlnet_blocks.", "pos_embed_input."))]
    assert len(zero) == 6 and not any(copied.pop(name).any() for name in zero)
    assert all(torch.equal(weight, weights[name]) for name, weight in copied.items())
    assert dict(base.config) == config and all(torch.equal(weight, weights[name]) for name, weight in base.state_dict().items())
    drawn = build_network(base, "controlnet", "random").controlnet.transformer_blocks[0].ff.net[2].weight
    assert not torch.equal(drawn, base.transformer_blocks[0].ff.net[2].weight)


@schemes
def test_its_blocks_compile_whole(scheme):
    torch.compiler.reset()  # what other tests compiled of the same code counts towards a limit
    network = tiny_network(scheme, num_layers=2, dual_attention_layers=(0,))
    expected = network(**network_inputs(), mask_latents=a_mask()).sample
    for block in network.repeated_blocks():
        block.compile(fullgraph=True, backend="eager")
    assert torch.allclose(network(**network_inputs(), mask_latents=a_mask()).sample, expected, rtol=0, atol=1e-5)
    latents, given = sampling()
    expected = network(latents, **given, timestep=TIMES[1].expand(2), mask_latents=a_mask()).sample
    velocity = network.velocity(latents, network.prepare(**given, timesteps=TIMES, mask_latents=a_mask()), 1)
    assert torch.allclose(velocity, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- saved and loaded


@pytest.fixture
def warnings(caplog) -> list:
    """What diffusers warns of."""
    logging.enable_propagation()
    yield caplog.records
    logging.disable_propagation()


@schemes
@pytest.mark.parametrize("shard", ["10GB", "200KB"])
@torch.no_grad()
def test_a_saved_network_comes_back_whole(scheme, shard, tmp_path, warnings):
    network = tiny_network(scheme, mask_mlp_modulation="image")
    stir(network)
    network.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard == "200KB")
    back = load_network(tmp_path)
    assert type(back) is type(network) and settings(back) == settings(network)
    assert torch.equal(back(**network_inputs(), mask_latents=a_mask()).sample, network(**network_inputs(), mask_latents=a_mask()).sample)
    names = [[name for name, parameter in one.named_parameters() if parameter.requires_grad] for one in (network, back)]
    assert names[0] == names[1]
    assert [record.message for record in warnings] == []


@schemes
def test_a_pipeline_with_its_network_comes_back_and_samples(scheme, tmp_path, warnings):
    network = tiny_network(scheme)
    stir(network, ("mask",))
    pipeline = tiny_pipeline(transformer=network)
    pipeline.save_pretrained(tmp_path)
    back = MaskToImagePipeline.from_pretrained(tmp_path)
    assert type(back.transformer) is type(network)
    masks = torch.arange(256).reshape(1, 16, 16) % 7
    arguments = {"prompt_embeds": torch.ones(1, 6, 32), "pooled_prompt_embeds": torch.ones(1, 24), "num_inference_steps": 2}
    arguments |= {"latents": torch.ones(1, 16, 8, 8), "output_type": "latent", "progress": False}
    assert torch.equal(back(masks, **arguments).images, pipeline(masks, **arguments).images)
    assert not torch.equal(back(masks.flip(1), **arguments).images, pipeline(masks, **arguments).images)
    assert [record.message for record in warnings] == []


def test_a_folder_from_before_there_were_schemes_is_triattention(tmp_path):
    network = tiny_network("triattention")
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("scheme") == "triattention"
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = load_network(tmp_path)
    assert back.config.scheme == "triattention"
    assert all(torch.equal(weight, network.state_dict()[name]) for name, weight in back.state_dict().items())


def test_a_pipeline_from_before_the_schemes_had_modules_of_their_own_comes_back(tmp_path):
    tiny_pipeline(transformer=tiny_network("controlnet")).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["crfm_core.models.schemes.controlnet", "ControlNetMMDiT"]
    index["transformer"][0] = "crfm_core.models.controls"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert type(MaskToImagePipeline.from_pretrained(tmp_path).transformer) is ControlNetMMDiT


def weights_file(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def reconfigure(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(folder: Path, **changes) -> None:
    weights = load_file(weights_file(folder)) | changes
    save_file({name: weight for name, weight in weights.items() if weight is not None}, weights_file(folder))


def truncate(folder: Path) -> None:
    weights_file(folder).write_bytes(weights_file(folder).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (
            "triattention",
            lambda folder: reconfigure(folder, joint_attention_dim=48),
            r"the weights are not those of its config.json: of another shape: context_embedder.weight \(64, 32\) instead of \(64, 48\);",
        ),
        (
            "controlnet",
            lambda folder: reconfigure(folder, in_channels=4),
            r"base.pos_embed.proj.weight \(64, 16, 2, 2\) instead of \(64, 4, ",
        ),
        (
            "siamese",
            lambda folder: reconfigure(folder, scheme="adapter"),
            r": missing: blocks.0.mask.norm_k.weight, .* and \d+ more; unexpected: b",
        ),
        ("controlnet", lambda folder: reconfigure(folder, controlnet_layers=1), r"unexpected: controlnet.controlnet_blocks.1.bias"),
        ("adapter", lambda folder: reweigh(folder, **{"proj_out.bias": None}), r"missing: proj_out.bias;"),
        (
            "adapter",
            lambda folder: reconfigure(folder, _class_name="UNet2DModel"),
            "holds a UNet2DModel, needs one of MaskMMDiT, ControlNetM",
        ),
        ("adapter", truncate, r"diffusion_pytorch_model.safetensors is damaged or incomplete"),
        ("adapter", lambda folder: weights_file(folder).unlink(), r"holds no diffusion_pytorch_model\*.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_shape(tmp_path, scheme, change, message):
    tiny_network(scheme).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        load_network(tmp_path)
    assert str(tmp_path) in str(error.value)


@schemes
def test_diffusers_own_pipeline_loads_an_exported_generator_and_draws_the_same(scheme, tmp_path, warnings):
    network = tiny_network(scheme)
    stir(network)
    tiny_pipeline(text=True, transformer=network).save_pretrained(tmp_path / "generator")
    export_sd3(tmp_path / "generator", tmp_path / "sd3")
    assert not any("crfm_core" in path.read_text() for path in (tmp_path / "sd3").rglob("*.json"))
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "sd3")
    assert [record.message for record in warnings] == []
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 50, "output_type": "latent"}
    drawn = theirs("a forest, water", num_inference_steps=2, latents=noise, **arguments).images

    text, pooled = TextEncoders.from_folder(tmp_path / "generator").encode(["a forest, water"])
    latents = noise
    with torch.no_grad():
        for sigma, following in pairwise(noise_levels(2).tolist()):
            latents = euler_step(latents, network(latents, text, pooled, torch.tensor([1000 * sigma])).sample, sigma, following)
    assert torch.allclose(drawn, latents, rtol=0, atol=1e-4)
    assert not torch.allclose(drawn, noise, rtol=0, atol=0.1)


def test_an_export_shares_its_files_and_leaves_nothing_behind_when_it_fails(tmp_path):
    tiny_pipeline(text=True).save_pretrained(tmp_path / "generator")
    export_sd3(tmp_path / "generator", tmp_path / "sd3")
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "sd3" / weights).samefile(tmp_path / "generator" / weights)
    assert "num_classes" not in json.loads((tmp_path / "sd3" / "model_index.json").read_text())

    truncate(tmp_path / "generator" / "transformer")
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        export_sd3(tmp_path / "generator", tmp_path / "again")
    tiny_pipeline().save_pretrained(tmp_path / "silent")
    with pytest.raises(WeightsError, match="lacks tokenizer, text_encoder, "):
        export_sd3(tmp_path / "silent", tmp_path / "again")
    with pytest.raises(DataError, match=r"model_index\.json: no such file"):
        export_sd3(tmp_path / "nothing", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator", "sd3", "silent"]


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_unknown_names_and_sizes_are_refused():
    base = tiny_sd3(num_layers=4)
    for scheme, mask_init, options, message in (
        ("lora", "copy", {}, r"scheme='lora': must be one of adapter, controlnet, siamese, triattention"),
        ("controlnet", "zero", {}, "mask_init='zero'"),
        ("adapter", "zero", {}, "mask_init='zero'"),
        ("controlnet", "copy", {"controlnet_layers": 3}, r"controlnet_layers=3: must be 1 \.\.\. 2, half of the base's 4 blocks"),
        ("siamese", "copy", {"mask_mlp_modulation": "both"}, "mask_mlp_modulation='both'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_network(base, scheme, mask_init, **options)
    with pytest.raises(ConfigError, match="scheme='controlnet': has a network of its own"):
        MaskMMDiT(scheme="controlnet")
    assert build_network(base, "controlnet", "copy", controlnet_layers=1).config.controlnet_layers == 1
    assert build_network(tiny_sd3(num_layers=5), "controlnet", "copy").config.controlnet_layers == 2


@schemes
def test_shapes_and_weights_of_another_network_are_refused(scheme):
    network = tiny_network(scheme)
    with pytest.raises(ValueError, match=r"mask_latents has shape \(2, 16, 4, 4\), hidden_states \(2, 16, 8, 12\)"):
        network(**network_inputs(), mask_latents=torch.zeros(2, 16, 4, 4))
    for shape in ((2, 16, 7, 8), (2, 4, 8, 8), (2, 16, 8, 26)):
        with pytest.raises(ValueError, match="hidden_states has shape"):
            network(**(network_inputs() | {"hidden_states": torch.zeros(shape)}))
    base = tiny_sd3()
    base.extra = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsError, match=r"unexpected extra\.bias, extra\.weight"):
        build_network(base, scheme, "copy")


def test_a_released_checkpoint_is_for_triattention_alone():
    with pytest.raises(WeightsError, match="is for the scheme triattention; this network is of adapter"):
        tiny_network("adapter").load_released({})
