"""The rates that ship with the workflow: refused when they are not whole, complete, and those of the networks."""

from __future__ import annotations

import re

import pytest
import yaml
from paths import ROOT
from planned_jobs import RATES, configuration, planned

from crfm_core import ConfigError
from crfm_core.planning.jobs import Job
from crfm_core.planning.rates import read_rates

AUTOENCODER = 84e6  #: weights of that of SD3.5-medium


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": {"core": 0, "share": 0.4, "gpus": {"H100": 989}}}, "speed.core: Input should be greater than 0"),
        ({"speeds": 1}, "speeds: Extra inputs are not permitted"),
        ({"size": {}}, "size.tile: Field required"),
    ],
)
def test_rates_that_are_not_whole_are_refused_by_key(tmp_path, change, message):
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(RATES.model_dump() | change))
    with pytest.raises(ConfigError, match=rf"rates.yaml: .*{re.escape(message)}.*; restore the file that ships with the workflow"):
        read_rates(file)


def test_rates_are_of_rules_that_there_are():
    text = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    rules = re.findall(r"^\s*(?:rule|use rule \w+ as) (\w+)(?: with)?:", text, re.MULTILINE)
    assert set(RATES.jobs) <= set(rules)


def test_an_unknown_unit_is_refused(tmp_path):
    file = tmp_path / "rates.yaml"
    jobs = RATES.model_dump()["jobs"] | {"mix_tiles": {"unit": "apples"}}
    file.write_text(yaml.safe_dump(RATES.model_dump() | {"jobs": jobs}))
    with pytest.raises(ConfigError, match=r"jobs.mix_tiles.unit: Input should be 'jobs'"):
        read_rates(file)


@pytest.mark.parametrize(("name", "gpu"), [("config.yaml", False), ("configs/paper.yaml", True)])
def test_every_kind_of_work_has_a_rate(tmp_path, name, gpu):
    """So that what is not known is downloads, or a user's own networks."""
    settings, found = configuration(name, tmp_path, {"tables": "all"})
    dataset = next(iter(found.values()))
    same = {"dataset": dataset.name, "split": dataset.train, "control": "triattention", "sampler": "crfm", "recipe": "real"}
    rules = [
        "encode_latents",
        "encode_set_latents",
        "encode_prompts",
        "sample_validation",
        "measure_agreement",
        "measure_reconstruction",
        "measure_generation",
    ]
    jobs = [Job(rule, same) for rule in (*rules, "measure_class_losses", "mix_tiles", "make_report")]
    jobs += [Job("train_generator", same | {"control": control}) for control in settings.controls]
    jobs += [Job(rule, same | {"segmentor": one}) for rule in ("train_segmentor", "evaluate_segmentor") for one in settings.segmentors]
    jobs += [Job("synthesise_shard", same | {"sampler": sampler}) for sampler in settings.samplers]
    jobs += [Job("filter_tiles", same | {"filter": name}) for name in settings.filters]
    jobs += [Job("compare_corrections", same | {"preset": preset}) for preset in ("plain", *settings.comparison.presets)]
    gpu_rules = {job.rule for job in jobs} if gpu else ()
    cut = [Job("tile_scenes", same), Job("caption_tiles", same), Job("draw_layouts", same | {"layouts": "new"})]
    plan = planned(jobs + cut, tmp_path, name, {"tables": "all"}, gpu_rules)
    assert {stage.rule: stage.basis for stage in plan.stages if "not known" in stage.basis} == {}
    assert plan.total(gpu) > 600


def test_the_counted_work_is_that_of_the_networks():
    import torch

    from crfm_core.generator.memory import SD35_MEDIUM, CudaCount, meta_network, training_memory
    from crfm_core.settings import Control

    training = RATES.jobs["train_generator"]
    trained, forward = training.tflop, RATES.jobs["synthesise_shard"].tflop
    for scheme, checkpointing in (("triattention", True), ("adapter", False)):
        control = Control(scheme=scheme, steps=1, batch_size=1, learning_rate=1e-5, precision="bf16", gradient_checkpointing=checkpointing)
        network = meta_network(SD35_MEDIUM, control)
        tflop = trained[scheme] + (forward[scheme] if checkpointing else 0)
        assert tflop == pytest.approx(training_memory(network, control, (16, 64, 64)).flops / 1e12, rel=0.005)
        size = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
        assert training.bytes[scheme] == pytest.approx(4 * (size + AUTOENCODER), rel=0.005)
        if checkpointing:
            continue
        with torch.device("meta"), CudaCount([network.requires_grad_(False)], True) as count:
            network(
                torch.empty(1, 16, 64, 64),
                torch.empty(1, 333, 4096),
                torch.empty(1, 2048),
                torch.empty(1),
                mask_latents=torch.empty(1, 16, 64, 64),
                return_dict=False,
            )
        assert forward[scheme] == pytest.approx(count.forward / 1e12, rel=0.005)


@pytest.mark.parametrize("architecture", ["pspnet_r50", "segformer_b2", "upernet_convnext_t", "deeplabv3plus_r50"])
def test_the_counted_work_of_the_segmentors_is_theirs(architecture):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from crfm_core.segmentor.mmseg.networks import build_model

    network = build_model(architecture, 17).to("meta").train()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.decode_head.forward(network.extract_feat(torch.empty(2, 3, 512, 512)))
    counted = RATES.jobs["evaluate_segmentor"].tflop
    assert counted[architecture] == pytest.approx(counter.get_total_flops() / 2e12, rel=0.01)
    size = sum(parameter.numel() for parameter in network.parameters())
    assert RATES.jobs["train_segmentor"].bytes[architecture] == pytest.approx(4 * size, rel=0.01)
